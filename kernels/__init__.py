"""Kernels over the arena: for each operation a plain PyTorch reference, and a Triton kernel with the same bits.

An operation is a folder of three files, to be read in this order:

    __init__.py   the formula, the signature as a table (shape, dtype, role), the choice of the backend
    reference.py  plain PyTorch, obviously right, runs everywhere
    kernel.py     the Triton kernel and its launcher

    norm          sums of squares by tile, global norm, sums by slot
    finalise      skip, clip factor, step counts, one row of coefficients a slot
    adamw         the fused update, and line 16 of Algorithm 1
    blockwise8    moments in 8 bits
    split_float   float32 = bfloat16 + 16 bits, and stochastic rounding
    resident8     matrices in 8 bits, for those that do not train
    rest          one step without state for a matrix outside the arena

They share tiles.py (the arena and its tables), columns.py (the tables' columns inside kernels), arithmetic.py (of the
references) and backend.py. Imports go one way: blockwise8, resident8, split_float, norm < finalise < adamw,
and split_float < rest.

A folder and not one file, since ``kernel.py`` needs Triton when it is imported: ``@triton.jit`` decorates at import,
and decides there whether the interpreter runs (TRITON_INTERPRET=1). In one file with its reference the package could
not be imported without Triton, or only past a stand-in for it. The public function imports ``kernel.py`` on first use.

Rules of all kernels:

* Element offsets are int64: ``program_id * BLOCK`` in int32 wraps silently at 2^31 elements.
* Integers that change from call to call are not specialised, so that no step compiles anything.
* float32 -> bfloat16 is done in integers: Triton's interpreter truncates ``.to(tl.bfloat16)``.
* ``sqrt_rn``, ``div_rn`` and ``enable_fp_fusion=False`` round every operation once, as numpy and torch do on a CPU.
* Loops with a bound on the device are ``while`` loops: ``range`` over a tensor fails in the interpreter of Triton 3.6
  with NumPy 2.4.
"""
