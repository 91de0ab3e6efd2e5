"""The kernels on a real device; the same comparisons run in the interpreter in test_adamw.py."""

import math

import pytest
import torch

from kernel_arena import (
    BF16,
    EVEN_SIZES,
    F32,
    complain,
    make_arena,
    moments_to_store,
    own_gradient,
    random_gradients,
    random_weights,
    same_bits,
)
from kernel_cases import DEVICE_CASES
from misa_engine.kernels.adamw import adamw
from misa_engine.kernels.blockwise8 import GROUP, compress, expand
from misa_engine.kernels.norm import reduce_slots
from misa_engine.kernels.split_float import join, round_stochastic_, split
from misa_engine.kernels.tiles import BLOCK

pytestmark = pytest.mark.gpu
GIB = 1 << 30


def needs_free_memory(gib: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free device memory, {free / GIB:.1f} are free")


@pytest.fixture
def error_on_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", DEVICE_CASES)
def test_kernel_on_the_device_equals_the_reference_on_the_cpu_bit_for_bit(case):
    assert DEVICE_CASES[case](device="cuda") == ""


def test_stochastic_rounding_equals_the_reference():
    master = torch.randn(100_003) * 0.02
    halves = [split(master), tuple(half.cuda() for half in split(master))]
    for (hi, lo), backend in zip(halves, ("reference", "triton"), strict=True):
        round_stochastic_(hi, lo, (1 << 62) + 12345, backend=backend, first_index=(1 << 32) - 50_000)
    assert same_bits(halves[0][0], halves[1][0].cpu()) and not halves[1][1].any()


def warmed_up(sizes, **options):
    """An arena whose kernels are compiled, with gradients in place."""
    arena = make_arena(random_weights(sizes, BF16), backend="triton", device="cuda", **options)
    arena.set_gradients(random_gradients(sizes, 0))
    arena.control.max_norm.fill_(1.0)
    arena.measure()
    arena.update()
    arena.close()
    return arena


@pytest.mark.parametrize("int8", [False, True])
def test_steps_never_wait_for_the_device_and_allocate_nothing(int8, request):
    arena = warmed_up(EVEN_SIZES, int8=int8)
    norms = torch.zeros(arena.table.slot_group.numel(), device="cuda")
    reduce_slots(arena.partial, norms, arena.table, arena.control, root=True, backend="triton")
    request.getfixturevalue("error_on_synchronisation")
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(20):
        arena.measure()
        arena.update()
        reduce_slots(arena.partial, norms, arena.table, arena.control, root=True, backend="triton")
    arena.close()
    assert torch.cuda.max_memory_allocated() == held


@pytest.mark.parametrize("int8", [False, True])
def test_captured_graph_replays_the_step_and_survives_a_skip(int8):
    arena, plain = (warmed_up(EVEN_SIZES, int8=int8) for _ in range(2))
    graph = torch.cuda.CUDAGraph()
    before = arena.everything()
    with torch.cuda.graph(graph):
        arena.measure()
        arena.update()
    assert all(map(same_bits, before, arena.everything())), "capture must not run anything"
    for step in range(3):
        for other in (arena, plain):
            other.set_gradients(random_gradients(EVEN_SIZES, step))
            other.grad[0] = math.inf if step == 1 else 0.5
        graph.replay()
        plain.measure()
        plain.update()
    assert complain(arena.state(), plain.state()) == ""
    assert arena.control.skipped_steps.item() == 1


@pytest.mark.parametrize("int8", [False, True])
def test_two_runs_agree_bit_for_bit(int8):
    states = []
    for _ in range(2):
        arena = make_arena(random_weights((5_000_000, 1000), BF16), backend="triton", device="cuda", int8=int8)
        arena.control.max_norm.fill_(0.1)
        for step in range(3):
            arena.set_gradients(random_gradients((5_000_000, 1000), step))
            arena.measure()
            arena.update()
        states.append(arena.state() | {"tile_sumsq": arena.tile_sumsq.cpu(), "norm": arena.control.grad_norm.cpu()})
    assert complain(*states) == ""


@pytest.mark.parametrize("int8", [False, True])
def test_slots_beyond_element_2_to_the_31_are_updated(int8):
    needs_free_memory(28)
    sizes = (3 * BLOCK + 16, 512)
    options = dict(backend="triton", device="cuda", first_tile=(1 << 31) // BLOCK)
    far = make_arena(random_weights(sizes, BF16), int8=int8, **options)
    near = make_arena(random_weights(sizes, BF16), int8=int8)
    for step in range(2):
        for arena in (far, near):
            arena.set_gradients(random_gradients(sizes, step))
            arena.update(normed=False)
    for gradient, slot in zip(random_gradients(sizes, 2), far.slots, strict=True):
        held = own_gradient(gradient, BF16, "cuda")
        place = dict(backend="triton", tiles=slot.tiles, grad_start=slot.start)
        adamw(held, far.m, far.v, far.lo, far.tile_sumsq, far.table, **place, **far.scales)
    near.set_gradients(random_gradients(sizes, 2))
    adamw(near.grad, near.m, near.v, near.lo, None, near.table, backend="reference", **near.scales)
    assert complain(far.state(), near.state()) == ""


def test_moments_of_millions_of_elements_are_stored_as_on_the_cpu():
    moments = moments_to_store(5_000_017)
    numel, groups = moments[0].numel(), -(-moments[0].numel() // GROUP)
    results = []
    for device, backend in (("cpu", "reference"), ("cuda", "triton"), ("cuda", "reference")):
        codes = [torch.empty(numel, dtype=dtype, device=device) for dtype in (torch.int8, torch.uint8)]
        parts = [*codes, *(torch.empty(groups, device=device) for _ in range(2))]
        compress(*(moment.to(device) for moment in moments), *parts, backend=backend)
        decoded = [torch.empty(numel, device=device) for _ in range(2)]
        expand(*parts, *decoded, backend=backend)
        results.append({str(index): part.cpu() for index, part in enumerate([*parts, *decoded])})
    assert complain(results[1], results[0]) == "" and complain(results[2], results[0]) == ""


def test_240_million_parameters_follow_fused_adamw():
    needs_free_memory(12)
    sizes, lr, decay = (4096 * 14336, 14336 * 4096, 4096 * 4096, 4096 * 1024, 14336 * 4096, 4096 * 10_000), 1e-5, 0.0
    generator = torch.Generator("cuda").manual_seed(0)
    weights = [(torch.randn(n, generator=generator, device="cuda") * 0.02).bfloat16() for n in sizes]
    parameters = [torch.nn.Parameter(weight.float()) for weight in weights]
    arena = make_arena(weights, backend="triton", device="cuda", lr=lr, weight_decay=decay)
    arena.hyper[1] = arena.hyper[0]
    arena.bias[1] = arena.bias[0]
    fused = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay, fused=True)
    for _ in range(5):
        exact = 0.0
        for parameter, gradient in zip(parameters, arena.of(arena.grad), strict=True):
            gradient.copy_(torch.randn(gradient.shape, generator=generator, device="cuda") * 1e-4)
            parameter.grad = gradient.float()
            exact += parameter.grad.double().square().sum().item()
        arena.measure()
        arena.update()
        fused.step()
        assert abs(arena.control.grad_norm.item() / math.sqrt(exact) - 1) < 1e-6
    for weight, lo, parameter in zip(arena.weights, arena.of(arena.lo), parameters, strict=True):
        # 5 steps of at most 1e-5: rounding differs by ulps of a weight of 0.1 (7e-9) and of the step.
        torch.testing.assert_close(join(weight, lo), parameter.detach(), rtol=0.0, atol=5e-8)
    assert arena.weights[0].dtype == BF16 and parameters[0].dtype == F32
