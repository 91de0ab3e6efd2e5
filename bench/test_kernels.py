"""Kernel benchmarks: update, norm, split, rounding, 8-bit moments, rest rules, accumulation; test_switch.py: switches.

    pytest bench/ --benchmark-only                       on a GPU 4M-240M parameters, on a CPU 1M-8M (--sizes 4M,64M)
    ... --benchmark-save=before                          keep the run in .benchmarks/, which git ignores
    ... --benchmark-compare --benchmark-compare-fail=median:10%     the newest saved run beside this one
    ... --benchmark-compare=bench/results/kernels_cpu.json          a committed one beside this one
    ... --benchmark-json=bench/results/kernels_cpu.json             to be committed (kernels_h200.json and so on), then
    misa bench --render bench/results/kernels_cpu.json              its tables as Markdown

Times are medians with their IQR. GB/s are the bytes that the passes of a row must move (traffic.py) over its time, and
the last column sets them against a copy of as many bytes in the same process; on a CPU an update in place can beat that
copy, whose target lines are read before they are written. On a CPU that is shared, run with OMP_NUM_THREADS=1: with a
thread on a core that something else uses, torch's own kernels wait for it (64 ms instead of 4 at 4M parameters were
seen), ours run in the calling thread. Compare commits only where the IQR is small.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from misa_engine import MisaConfig
from misa_engine.bench import traffic
from misa_engine.bench.updates import SCHEMES, bound_arena, draws, sizes_of
from misa_engine.engine.arena import Arena, padded
from misa_engine.engine.gradient_slots import GradientSlots
from misa_engine.engine.update import ArenaUpdate
from misa_engine.kernels.backend import choose_backend
from misa_engine.kernels.blockwise8 import GROUP, compress, expand
from misa_engine.kernels.rest import RestScratch, rest_step
from misa_engine.kernels.split_float import join_into, round_stochastic_, split_into

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# ---- update ----


@pytest.mark.parametrize(
    ("part", "scheme"),
    [("whole", scheme) for scheme in SCHEMES]
    # without the norm before it the last of torch's is the same as the one that clips
    + [("launch", scheme) for scheme in SCHEMES if scheme != "torch-fused-master-norm"],
)
def test_update(measure: Any, device: torch.device, parameters: int, scheme: str, part: str) -> None:
    """Norm, clipping and update ("whole"), or the pass over the parameters alone ("launch")."""
    chosen = SCHEMES[scheme]
    if reason := chosen.unavailable(device):
        pytest.skip(reason)
    sizes = sizes_of(parameters)
    update = chosen.build(sizes, device)

    def whole() -> None:
        update.before()
        update.step()

    per_parameter = chosen.update_bytes + (chosen.before_bytes if part == "whole" else 0)
    work = whole if part == "whole" else update.launch
    group = f"{'norm, clipping and update' if part == 'whole' else 'update alone'}, {parameters / 1e6:g}M parameters"
    measure(work, per_parameter * sum(sizes), group, scheme, facts=lambda: {"bytes_per_parameter": per_parameter})


# ---- norm ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["misa", "torch-foreach"])
def test_norm(measure: Any, device: torch.device, parameters: int, scheme: str, dtype: str) -> None:
    """Global gradient norm: sums of squares by tile and their sum, against torch's total norm."""
    sizes = sizes_of(parameters)
    if scheme == "misa":
        _, update, _ = bound_arena(sizes, device, DTYPES[dtype], "float32")

        def work() -> object:
            update.measure()
            return update.global_norm()
    else:
        gradients = draws(sizes, DTYPES[dtype], device, 1e-3)

        def work() -> object:
            return torch.nn.utils.get_total_norm(gradients, foreach=True)

    nbytes = traffic.NORM[DTYPES[dtype]] * sum(sizes)
    measure(work, nbytes, f"global norm, {parameters / 1e6:g}M parameters", f"{scheme}-{dtype}")


# ---- single conversions ----


@pytest.mark.parametrize("scheme", ["split", "join", "cast to bf16 (torch)", "round_stochastic", "compress", "expand"])
def test_conversion(measure: Any, device: torch.device, parameters: int, scheme: str) -> None:
    """What a unit goes through when it comes or leaves, alone."""
    numel, backend = padded(parameters), choose_backend("auto", device)

    def of(dtype: torch.dtype, share: int = 1) -> Tensor:
        return torch.zeros(numel // share, dtype=dtype, device=device)

    (wide,) = draws([numel], torch.float32, device, 0.02)
    hi, lo = wide.bfloat16(), of(torch.int16)
    moments = wide * 0.1, wide.square()
    packed = of(torch.int8), of(torch.uint8), of(torch.float32, GROUP), of(torch.float32, GROUP)
    compress(*moments, *packed, backend=backend)
    works = {
        "split": (traffic.SPLIT, lambda: split_into(wide, hi, lo)),  # overwrites its input: other bits, same work
        "join": (traffic.SPLIT, lambda: join_into(hi, lo, wide)),
        "cast to bf16 (torch)": (traffic.moved([torch.float32], [torch.bfloat16]), lambda: hi.copy_(wide)),
        "round_stochastic": (traffic.ROUND_STOCHASTIC, lambda: round_stochastic_(hi, lo, 7, backend=backend)),
        "compress": (traffic.COMPRESS, lambda: compress(*moments, *packed, backend=backend)),
        "expand": (traffic.COMPRESS, lambda: expand(*packed, *moments, backend=backend)),
    }
    per_parameter, work = works[scheme]
    measure(work, per_parameter * numel, f"conversions, {parameters / 1e6:g}M parameters", scheme)


# ---- what rests ----


@pytest.mark.parametrize("rule", traffic.REST)
def test_rest(measure: Any, device: torch.device, parameters: int, rule: str) -> None:
    """One bfloat16 matrix, four times as wide as high: norms, factors and the stochastically rounded step."""
    rows = max(1, int((parameters / 4) ** 0.5))
    shape = (rows, padded(4 * rows))
    (weight,), (grad,) = (draws([rows * shape[1]], torch.bfloat16, device, scale) for scale in (0.02, 1e-3))
    scratch, sumsq = RestScratch.allocate(*shape, device), torch.zeros(1, device=device)
    backend = choose_backend("auto", device)
    matrices = weight.view(shape), grad.view(shape)

    def work() -> None:
        rest_step(*matrices, sumsq, scratch, rule=rule, rate=1e-6, seed=7, backend=backend)

    measure(work, traffic.REST[rule] * weight.numel(), f"rest rules, {parameters / 1e6:g}M parameters", rule)


# ---- accumulation ----

#: (in, out, tokens of a micro-batch) of the linear layer.
LAYERS = {"tiny": (64, 192, 32), "small": (512, 1536, 256), "large": (4096, 14336, 2048)}
MICRO_BATCHES = 4


@pytest.mark.parametrize("scheme", ["gemm", "hook", "plain", "gemm-fp32-slots"])
def test_accumulation(measure: Any, device: torch.device, shape: str, scheme: str) -> None:
    """Weight gradients of four micro-batches through one Linear: backward alone, without the gradient of its input.

    "gemm" writes into the arena slot, "hook" copies or adds a temporary there, "plain" is autograd without an arena.
    bfloat16 on a GPU, float32 on a CPU; "gemm-fp32-slots" adds a bfloat16 layer's gradients up in float32.
    """
    fan_in, fan_out, tokens = LAYERS[shape]
    wide_slots = scheme == "gemm-fp32-slots"
    dtype = torch.bfloat16 if device.type == "cuda" or wide_slots else torch.float32
    slot_dtype = torch.float32 if wide_slots else dtype
    layer = nn.Linear(fan_in, fan_out, bias=False, device=device, dtype=dtype)
    inputs = [torch.randn(tokens, fan_in, device=device, dtype=dtype) for _ in range(MICRO_BATCHES)]
    upstream = torch.randn(tokens, fan_out, device=device, dtype=dtype)
    slots: GradientSlots | None = None
    if scheme != "plain":
        arena = Arena(padded(layer.weight.numel()), 1, dtype=dtype, device=device, split=False, grad_dtype=slot_dtype)
        named = dict(layer.named_parameters())
        backend = choose_backend("auto", device)
        kernels = ArenaUpdate(arena, 1, MisaConfig(), backend)
        slots = GradientSlots(layer, named, arena, kernels, lambda: [], max_norm=1.0, gemm=scheme != "hook")
        arena.bind(named, {"weight": 0}, {})
        slots.bind()
    outputs: list[Tensor] = []

    def forward() -> None:
        layer.weight.grad = None
        if slots is not None:
            slots.forget()
        outputs[:] = [layer(x) for x in inputs]

    def backward() -> None:
        for output in outputs:
            output.backward(upstream)

    way = "gemm" if wide_slots else scheme
    gradient = traffic.accumulate(way, dtype, slot_dtype, MICRO_BATCHES) * layer.weight.numel()
    read = MICRO_BATCHES * tokens * (fan_in + fan_out) * dtype.itemsize
    group = f"gradients of {MICRO_BATCHES} micro-batches, Linear {fan_in} x {fan_out}, {tokens} tokens each"
    measure(backward, gradient + read, group, f"{scheme} ({str(dtype).removeprefix('torch.')})", setup=forward)
    if slots is not None:
        slots.remove()
