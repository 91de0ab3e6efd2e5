"""Weights divided over several processes by ``fully_shard`` (FSDP2), of which MISA trains each process's rows.

construction    the mesh and the options are looked at (mesh.py), then everybody's are compared (processes.py)
backward pass   FSDP2 averages the gradients of active matrices and hands out the rows; they go to slots (slots.py)
step            one small all-reduce of sums of squares, then the same kernels as ever on the rows (update.py)
checkpoint      whole tensors in the layout of one process, whatever the number of processes (state.py)
"""
