"""The Triton kernels are compiled for real GPUs on a machine without one, and their code is inspected."""

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: there is nothing to compile", allow_module_level=True)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from misa_engine.kernels.adamw import kernel as adamw
from misa_engine.kernels.adamw.kernel import REGISTERS, WARPS
from misa_engine.kernels.blockwise8 import kernel as blockwise8
from misa_engine.kernels.finalise import kernel as finalise
from misa_engine.kernels.norm import kernel as norm
from misa_engine.kernels.norm.kernel import TILES_PER_PROGRAM
from misa_engine.kernels.resident8 import kernel as resident8
from misa_engine.kernels.rest import kernel as rest
from misa_engine.kernels.split_float import kernel as split_float
from misa_engine.kernels.tiles import BLOCK, PART

KERNEL_FILES = (finalise, adamw, norm, blockwise8, split_float, rest, resident8)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
#: Datacentre and consumer cards of Ampere, Ada, Hopper and Blackwell.
ARCHITECTURES = {80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90a", 100: "sm_100a", 120: "sm_120a"}
PRECISE = {"enable_fp_fusion": False}

TABLE = {"wptr": "*i64", "length": "*i32", "slot": "*i32", "slot_bf16": "*i32", "slot_coef": "*fp32"}
ADAMW = {"m": "*fp32", "v": "*fp32", "tile_sumsq": "*fp32", "first_tile": "i32", "grad_tile": "i32"} | TABLE
MOMENTS8 = {"m": "*i8", "v": "*u8", "m_scale": "*fp32", "v_scale": "*fp32", "decoded": "*fp32"}
NO_SCALES = {"m_scale": None, "v_scale": None, "decoded": None}
FLAGS = {"ALIGNED": True, "CLOSING": False, "BLOCK": BLOCK, "measured": None} | NO_SCALES
SPLIT = ADAMW | {"grad": "*bf16", "lo": "*i16"}, FLAGS | {"BF16": True}
SPLIT_F32_GRAD = SPLIT[0] | {"grad": "*fp32"}, SPLIT[1]
NO_MASTER = ADAMW | {"grad": "*bf16"}, FLAGS | {"BF16": True, "lo": None}
FLOAT32 = ADAMW | {"grad": "*fp32"}, FLAGS | {"BF16": False, "lo": None}
CLOSING = ADAMW | {"lo": "*i16"}, FLAGS | {"BF16": True, "CLOSING": True, "grad": None}
UNALIGNED = SPLIT[0], SPLIT[1] | {"ALIGNED": False}
CLOSING[0].pop("tile_sumsq")
CLOSING[1]["tile_sumsq"] = None
INT8_SPLIT, INT8_NO_MASTER, INT8_FLOAT32, INT8_CLOSING = (
    (types | MOMENTS8, {name: value for name, value in constants.items() if name not in NO_SCALES})
    for types, constants in (SPLIT, NO_MASTER, FLOAT32, CLOSING)
)
INT8_CLOSING[0].pop("decoded")
INT8_CLOSING[1]["decoded"] = None

MEASURED, INT8_MEASURED = (
    (types | {"measured": "*fp32"}, {name: value for name, value in constants.items() if name != "measured"})
    for types, constants in (SPLIT, INT8_SPLIT)
)

#: 16-byte loads and stores of a thread, then the scalars that 8-bit moments add: the scales of its group. Of 8 elements
#: bf16 takes one access and float32 two (m, v 4 + 4, grad, weight, lo). Beside 8-bit moments a thread has 16 elements,
#: whose codes are one access each, and loads four values of the table that decodes m.
VARIANTS = {
    "split": (SPLIT, 7, 6, 0, 0),
    "no_master": (NO_MASTER, 6, 5, 0, 0),
    "float32": (FLOAT32, 8, 6, 0, 0),
    "float32_gradients": (SPLIT_F32_GRAD, 8, 6, 0, 0),
    "closing": (CLOSING, 6, 2, 0, 0),
    "split_measured": (MEASURED, 7, 6, 0, 0),
    "int8_split_measured": (INT8_MEASURED, 9, 6, 2, 2),
    "int8_split": (INT8_SPLIT, 9, 6, 2, 2),
    "int8_no_master": (INT8_NO_MASTER, 7, 4, 2, 2),
    "int8_float32": (INT8_FLOAT32, 11, 6, 2, 2),
    "int8_closing": (INT8_CLOSING, 6, 4, 2, 0),
}
#: Instructions an element that a thread runs (``executed``), about 2% above the most that was seen. bench/LOG.md has
#: what they mean beside the memory floor.
EXECUTED = {
    "split": 62.5,
    "no_master": 61,
    "float32": 51,
    "float32_gradients": 61.5,
    "closing": 42,
    "split_measured": 58,
    "int8_split_measured": 81.5,  # what the engine launches; 116 with a division for each code
    "int8_split": 84,
    "int8_no_master": 83.5,
    "int8_float32": 76.5,
    "int8_closing": 60.5,
}

COUNTS = {"n_parts": "i32", "first_tile": "i32", "end_tile": "i32", "n_slots": "i32", "n_rows": "i32"}
PER_SLOT = {"slot_group": "*i32", "slot_step": "*i32", "slot_coef": "*fp32", "hyper": "*fp32", "bias": "*fp32"}
NORM_PARTS = {"partial": "*fp32", "length": "*i32", "slot": "*i32", "slot_present": "*i32", "parts": "*fp64"}
NORM_PARTS |= {"first_tile": "i32", "end_tile": "i32"}
NORM = {"parts": "*fp64", "grad_norm": "*fp32"}
FINALISE = {"max_norm": "*fp32", "clip_coef": "*fp32", "skip": "*i32", "skipped_steps": "*i32", "slot_measured": "*i32"}
FINALISE |= {"slot_first_tile": "*i32", "slot_present": "*i32"} | NORM | PER_SLOT | COUNTS
CLOSING_SLOTS = PER_SLOT | {"n_slots": "i32", "n_rows": "i32"}
SUMS = {"grad": "*bf16", "partial": "*fp32", "length": "*i32", "first_tile": "i32", "end_tile": "i32"}
SUMS |= {"grad_tile": "i32"}
CODEC = {"m": "*fp32", "v": "*fp32", "m8": "*i8", "v8": "*u8", "m_scale": "*fp32", "v_scale": "*fp32", "n": "i32"}
REDUCE = {"tile_values": "*fp32", "out": "*fp32", "slot_first_tile": "*i32", "slot_n_tiles": "*i32"}
REDUCE |= {"slot_present": "*i32", "skip": "*i32", "first_slot": "i32"}
ROUND = {"weight": "*i16", "lo": "*i16", "numel": "i32", "first_index": "i32", "key1": "i32", "key2": "i32"}
ROW_SUMS = {"grad": "*bf16", "col_factor": "*fp32", "sums": "*fp32", "cols": "i32"}
COL_SUMS = {"grad": "*bf16", "row_factor": "*fp32", "sums": "*fp32", "rows": "i32", "cols": "i32"}
FACTORS = {"sums": "*fp32", "factor": "*fp32", "total": "*fp32", "n": "i32", "each": "i32"}
MOVE = {"weight": "*i16", "grad": "*bf16", "total": "*fp32", "row_factor": "*fp32", "col_factor": "*fp32"}
MOVE |= {"cols": "i32", "rate": "fp32", "key1": "i32", "key2": "i32"}
PIECE = {"PIECE_ROWS": rest.PIECE_ROWS, "PIECE_COLS": rest.PIECE_COLS}
MOVES = {"SIGN": False, "ROWS": True, "COLS": True, "BF16": True, "ALIGNED": True, "WIDTH": rest.WIDTH}
GROUPS8 = {"weight": "*i16", "codes": "*i8", "steps": "*i16", "cols": "i32", "n_groups": "i32"}
ROWS8 = {"weight": "*i16", "codes": "*i8", "steps": "*fp32", "cols": "i32"}
BLOCKS8 = {"weight": "*i16", "codes": "*u8", "steps": "*fp32", "rows": "i32", "cols": "i32", "n_groups": "i32"}
EXPAND8 = {"codes": "*i8", "steps": "*i16", "out": "*i16", "cols": "i32", "n_groups": "i32"}
EXPAND_FP8 = EXPAND8 | {"codes": "*u8", "steps": "*fp32"}
EXPAND_ROW8 = EXPAND8 | {"steps": "*fp32"}
EXPANDS8 = {"FP8": False, "GROUPED": True, "BLOCK_ROWS": 1, "STEP_BF16": True, "BF16": True, "ALIGNED": True}
EXPANDS8 |= {"WIDTH": resident8.WIDTH}
EXPANDS_FP8 = EXPANDS8 | {"FP8": True, "BLOCK_ROWS": 128, "STEP_BF16": False}
EXPANDS_ROW8 = EXPANDS8 | {"GROUPED": False, "STEP_BF16": False}
CODES8 = {"LARGEST": 127.0, "BF16": True, "ALIGNED": True, "WIDTH": resident8.WIDTH}
CODES_FP8 = {"LARGEST": 448.0, "BF16": True, "ALIGNED": True, "PIECE_ROWS": resident8.PIECE_ROWS}
#: Kernel, or kernel/variant.
SMALL_KERNELS = {
    "quantise_groups_kernel": (GROUPS8, CODES8, {"num_warps": 4} | PRECISE),
    "quantise_rows_kernel": (ROWS8, CODES8, {"num_warps": 4} | PRECISE),
    "quantise_blocks_kernel": (BLOCKS8, CODES_FP8, {"num_warps": 4} | PRECISE),
    "dequantise_kernel": (EXPAND8, EXPANDS8, {"num_warps": 4} | PRECISE),
    "dequantise_kernel/fp8": (EXPAND_FP8, EXPANDS_FP8, {"num_warps": 4} | PRECISE),
    "dequantise_kernel/row": (EXPAND_ROW8, EXPANDS_ROW8, {"num_warps": 4} | PRECISE),
    "row_sums_kernel": (ROW_SUMS, {"ALIGNED": True, "SCALED": True, "WIDTH": rest.WIDTH}, {"num_warps": 4} | PRECISE),
    "col_sums_kernel": (COL_SUMS, {"ALIGNED": True, "SCALED": True} | PIECE, {"num_warps": 4} | PRECISE),
    "factors_kernel": (FACTORS, {"FACTOR": True, "TOTAL": True, "TINY": 1e-36, "WIDTH": rest.WIDTH}, {"num_warps": 4}),
    "move_kernel": (MOVE, MOVES, {"num_warps": 4} | PRECISE),
    "sum_of_squares_kernel": (SUMS, {"ALIGNED": True, "ROWS": TILES_PER_PROGRAM, "BLOCK": BLOCK}, {"num_warps": 4}),
    "norm_parts_kernel": (NORM_PARTS, {"PRESENT": True, "PART": PART}, {"num_warps": 8}),
    "global_norm_kernel": (NORM | {"n_parts": "i32"}, {}, {"num_warps": 4}),
    "finalise_kernel": (FINALISE, {"SKIP_NONFINITE": True, "PRESENT": True}, {"num_warps": 8} | PRECISE),
    "closing_coefficients_kernel": (CLOSING_SLOTS, {}, {"num_warps": 4} | PRECISE),
    "reduce_slots_kernel": (REDUCE, {"ROOT": True, "PRESENT": True}, {"num_warps": 4}),
    "round_stochastic_kernel": (ROUND, {"ALIGNED": True, "BLOCK": BLOCK}, {"num_warps": 4}),
    "compress_kernel": (CODEC, {"ALIGNED": True, "BLOCK": BLOCK}, {"num_warps": 4} | PRECISE),
    "expand_kernel": (CODEC, {"ALIGNED": True, "BLOCK": BLOCK}, {"num_warps": 4} | PRECISE),
}
#: 16-byte and 8-byte loads and stores of a thread, in the kernels that move much.
WIDE_ACCESSES = {
    "sum_of_squares_kernel": {"ld.global.v4.b32": TILES_PER_PROGRAM},
    "row_sums_kernel": {"ld.global.v4.b32": 3},  # 8 bf16 and 8 float32 factors
    "move_kernel": {"ld.global.v4.b32": 4, "st.global.v4.b32": 1},
    "round_stochastic_kernel": {"ld.global.v4.b32": 2, "st.global.v4.b32": 2},
    "quantise_groups_kernel": {"ld.global.v4.b32": 2, "st.global.v4.b32": 1},  # 16 bf16, 16 codes
    "quantise_rows_kernel": {"ld.global.v4.b32": 4, "st.global.v4.b32": 1},
    "dequantise_kernel": {"ld.global.v4.b32": 1, "st.global.v4.b32": 2},
    "dequantise_kernel/fp8": {"ld.global.v4.b32": 1, "st.global.v4.b32": 2},
    "dequantise_kernel/row": {"ld.global.v4.b32": 1, "st.global.v4.b32": 2},
    "compress_kernel": {"ld.global.v4.b32": 4, "st.global.v2.b32": 2},
    "expand_kernel": {"ld.global.v2.b32": 2, "st.global.v4.b32": 4},
}

#: Instructions of a thread, slow paths included, about a tenth above the most that was seen; registers (with 64 a
#: multiprocessor holds eight programs of 4 warps); trips to memory in series.
LIMITS = {
    "quantise_groups_kernel": (610, 48, 1),
    "quantise_rows_kernel": (700, 48, 2),
    "quantise_blocks_kernel": (1400, 100, 2),
    "dequantise_kernel": (200, 48, 1),
    "dequantise_kernel/fp8": (335, 40, 1),
    "dequantise_kernel/row": (195, 48, 1),
    "row_sums_kernel": (160, 40, 1),
    "col_sums_kernel": (290, 48, 1),
    "factors_kernel": (890, 64, 1),
    "move_kernel": (350, 48, 2),
    "sum_of_squares_kernel": (260, 40, 1),
    "norm_parts_kernel": (340, 48, 1),
    "global_norm_kernel": (470, 48, 1),
    "finalise_kernel": (580, 48, 3),
    "closing_coefficients_kernel": (150, 40, 2),
    "reduce_slots_kernel": (340, 56, 2),
    "round_stochastic_kernel": (300, 48, 1),
    "compress_kernel": (730, 64, 1),
    "expand_kernel": (430, 56, 1),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")


def kernel_named(name: str):
    name = name.partition("/")[0]
    return next(getattr(module, name) for module in KERNEL_FILES if hasattr(module, name))


def compile_for(architecture: int, kernel: str, types: dict, constants: dict, options: dict):
    function = kernel_named(kernel)
    names = function.arg_names
    assert set(names) == set(types) | set(constants), set(names) ^ (set(types) | set(constants))
    source = ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").startswith("*")},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def compile_adamw(architecture: int, variant: tuple[dict, dict]):
    moments = torch.int8 if variant[0]["m"] == "*i8" else torch.float32
    options = {"num_warps": WARPS[moments]} | PRECISE | REGISTERS[moments]
    return compile_for(architecture, "adamw_kernel", *variant, options)


def global_accesses(ptx: str) -> Counter:
    return Counter(re.findall(r"\b((?:ld|st)\.global[.\w:]*)", ptx))


def trips_to_memory(ptx: str) -> list[int]:
    """Global loads between two waits (a barrier, a shuffle, a branch, a store), in program order, without empty ones.

    A proxy for the time a program waits: loads of one group are in flight together, groups follow one another.
    """
    events = re.findall(r"\b(ld\.global|bar\.sync|shfl\.sync|st\.global|bra)\b", ptx)
    groups = " ".join("L" if event == "ld.global" else "|" for event in events).split("|")
    return [group.count("L") for group in groups if "L" in group]


def precise_arithmetic(ptx: str) -> set[str]:
    """One IEEE rounding an operation and subnormals kept, or the GPU would differ from the reference."""
    single = {f"{name}{rounding}.f32" for name in ("mul", "add", "sub") for rounding in ("", ".rn")}
    arithmetic = set(re.findall(r"\b(?:fma|mul|add|sub|div|sqrt|rsqrt|rcp)[.\w]*\.f32\b", ptx))
    assert arithmetic <= single | {"div.rn.f32", "sqrt.rn.f32"}, arithmetic
    return arithmetic


def listing(sass: str) -> list[str]:
    """Instructions and labels ("name:") in program order, without what only fills up."""
    lines = re.findall(r"^(\.L_x_\d+:|\$\S+:|\s+/\*[0-9a-f]{4,}\*/ .*)", sass, re.MULTILINE)
    return [
        text
        for line in lines
        if not (text := re.sub(r"^\s+/\*[0-9a-f]{4,}\*/\s+", "", line)).startswith(("NOP", "BRA `"))
    ]


def executed(sass: str) -> list[str]:
    """Instructions that a thread of a full tile runs: not the slow paths of division and root.

    Those are subroutines behind the kernel, and what prepares a call is jumped over.
    """
    body, at = [], 0
    lines = listing(sass)
    end = next((i for i, line in enumerate(lines) if "slowpath" in line and line.endswith(":")), len(lines))
    while at < end:
        line = lines[at]
        jump = re.match(r"@!?U?P\d BRA\S* `\((\.L_x_\d+)\)", line)
        if not line.endswith(":"):
            body.append(line)
        target = lines.index(f"{jump.group(1)}:") if jump else at
        at = target if any("CALL" in skipped for skipped in lines[at:target]) else at + 1
    assert not any("CALL" in line for line in body)
    return body


def assembled(compiled, architecture: int, tmp_path: Path, *flags: str) -> dict[str, int]:
    """Registers and spilled bytes, as ptxas reports them, and instructions, as the disassembler does."""
    ptxas = TOOLS / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
    if not ptxas.exists():
        pytest.skip(f"this triton wheel has no assembler at {ptxas}")
    source = tmp_path / "kernel.ptx"
    source.write_text(compiled.asm["ptx"])
    target = f"--gpu-name={ARCHITECTURES[architecture]}"
    command = [str(ptxas), "-v", *flags, target, str(source), "-o", str(tmp_path / "kernel.cubin")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = run.stdout + run.stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", report)))
    sass = subprocess.run(
        [str(TOOLS / "nvdisasm"), "-c", str(tmp_path / "kernel.cubin")], capture_output=True, text=True
    )
    assert sass.returncode == 0, sass.stderr
    return {
        "instructions": len([line for line in listing(sass.stdout) if not line.endswith(":")]),
        "sass": sass.stdout,
        "spilled_bytes": spilled,
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_update_uses_16_byte_accesses_and_spills_nothing(variant, architecture, tmp_path):
    description, loads, stores, scale_loads, scale_stores = VARIANTS[variant]
    compiled = compile_adamw(architecture, description)
    accesses = global_accesses(compiled.asm["ptx"])
    assert accesses.pop("ld.global.v4.b32", 0) == loads
    assert accesses.pop("st.global.v4.b32", 0) == stores
    # What is left is one scalar for each table entry, coefficient and the tile's sum; a tile would be 8 of a kind.
    assert set(accesses) <= {"ld.global.b32", "ld.global.b64", "st.global.b32"}
    assert accesses["ld.global.b64"] == 1 and accesses["st.global.b32"] <= 1 + scale_stores
    # length, slot, dtype, 8 coefficients, running sum; measured sum; two scales
    assert accesses["ld.global.b32"] <= 12 + ("measured" in variant) + scale_loads
    # The table with the coefficients, then everything of the tile: nothing is loaded after the first wait in it.
    assert len(trips_to_memory(compiled.asm["ptx"])) == 2
    assert {"div.rn.f32", "sqrt.rn.f32"} <= precise_arithmetic(compiled.asm["ptx"])
    report = assembled(compiled, architecture, tmp_path, "--fmad=false")
    int8 = variant.startswith("int8")
    assert report["spilled_bytes"] == 0 and report["registers"] <= (144 if int8 else 64), report
    per_thread = 16 if int8 else 8
    assert report["instructions"] / per_thread <= (101 if int8 else 90), report
    run = len(executed(report["sass"])) / per_thread
    assert run <= EXECUTED[variant], run


def test_a_measured_sum_drops_the_barriers_of_the_sum():
    sums, measured = (compile_adamw(89, variant).asm["ptx"].count("bar.sync") for variant in (SPLIT, MEASURED))
    assert measured == sums - 3


def test_unaligned_weights_and_gradients_are_scalar_but_the_arena_is_not(tmp_path):
    compiled = compile_adamw(89, UNALIGNED)
    accesses = global_accesses(compiled.asm["ptx"])
    assert accesses["ld.global.b16"] == 16 and accesses["st.global.b16"] == 8
    assert accesses["ld.global.v4.b32"] == 5 and accesses["st.global.v4.b32"] == 5
    report = assembled(compiled, 89, tmp_path, "--fmad=false")
    assert report["spilled_bytes"] == 0 and report["registers"] <= 64, report


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", SMALL_KERNELS)
def test_other_kernels_stay_within_their_limits(kernel, architecture, tmp_path):
    compiled = compile_for(architecture, kernel, *SMALL_KERNELS[kernel])
    instructions, registers, trips = LIMITS[kernel]
    precise = SMALL_KERNELS[kernel][2].get("enable_fp_fusion", True) is False
    report = assembled(compiled, architecture, tmp_path, *(["--fmad=false"] if precise else []))
    assert report["spilled_bytes"] == 0 and report["registers"] <= registers, report
    assert report["instructions"] <= instructions, report
    assert len(trips_to_memory(compiled.asm["ptx"])) == trips
    accesses = global_accesses(compiled.asm["ptx"])
    wide = {name: number for name, number in accesses.items() if ".v" in name}
    assert wide == WIDE_ACCESSES.get(kernel, wide), accesses
    if kernel in ("compress_kernel", "expand_kernel", "move_kernel") or "quantise" in kernel:
        precise_arithmetic(compiled.asm["ptx"])


@pytest.mark.parametrize(
    ("kernel", "buffers"),
    [
        ("adamw_kernel", ("grad", "m", "v", "lo", "m_scale", "v_scale")),
        ("sum_of_squares_kernel", ("grad",)),
        ("round_stochastic_kernel", ("weight", "lo")),
        ("move_kernel", ("weight", "grad")),
        ("compress_kernel", ("m", "v", "m8", "v8", "m_scale", "v_scale")),
        ("expand_kernel", ("m", "v", "m8", "v8", "m_scale", "v_scale")),
        ("quantise_groups_kernel", ("weight", "codes", "steps")),
        ("quantise_rows_kernel", ("weight", "codes")),
        ("quantise_blocks_kernel", ("weight", "codes")),
        ("dequantise_kernel", ("codes", "steps", "out")),
    ],
)
def test_element_offsets_are_64_bit(kernel, buffers):
    """``program_id * BLOCK`` in int32 wraps at 2^31 elements, 2.1 billion active parameters, without a word."""
    types, constants, options = SMALL_KERNELS.get(kernel, (*INT8_SPLIT, PRECISE))
    code = compile_for(89, kernel, types, constants, options).asm["ttir"]
    signature = re.search(rf"@{kernel}\((.*?)\) attributes", code, re.DOTALL).group(1)
    arguments = re.findall(r"(%\w+): ", signature)
    passed = [name for name in kernel_named(kernel).arg_names if name in types]
    assert len(arguments) == len(passed)
    for name, argument in zip(passed, arguments, strict=True):
        if name in buffers:
            pointers = re.findall(rf"(%\w+) = tt\.splat {argument} : ", code)
            offsets = [re.search(rf"tt\.addptr {pointer}, .*, tensor<[\dx]+x(i\d+)>", code) for pointer in pointers]
            assert pointers and all(offset and offset.group(1) == "i64" for offset in offsets), (name, code)
    assert not re.search(rf"arith\.constant (dense<{BLOCK}> : tensor<[\dx]+xi32>|{BLOCK} : i32)", code), code
