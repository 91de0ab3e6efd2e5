import math

import pytest
import torch

from kernel_arena import ODD_SIZES, make_arena, random_gradients, random_weights, same_bits
from misa_engine.kernels import backend as backends
from misa_engine.kernels.backend import check_backend, choose_backend
from misa_engine.kernels.finalise import finalise
from misa_engine.kernels.norm import global_norm, reduce_slots, sum_of_squares
from misa_engine.kernels.tiles import BLOCK, Slot, TileTable, bias_table, hyper_row

SIZES = (3 * BLOCK + 5, 700, BLOCK)


def arena_with_gradients(dtype=torch.float32, scale=1e-2):
    arena = make_arena(random_weights(SIZES, dtype), split=dtype == torch.bfloat16)
    gradients = random_gradients(SIZES, 0, scale)
    arena.set_gradients(gradients)
    arena.measure()
    return arena, gradients


def decide(arena, *, normed=True, skip_nonfinite=True):
    finalise(
        arena.partial if normed else None,
        arena.hyper,
        arena.bias,
        arena.table,
        arena.control,
        skip_nonfinite=skip_nonfinite,
        backend="reference",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_squares_are_exact_to_1e_6_and_ignore_padding(dtype):
    arena, gradients = arena_with_gradients(dtype)
    for slot, gradient in zip(arena.slots, gradients, strict=True):
        exact = torch.stack([part.double().square().sum() for part in gradient.split(BLOCK)])
        got = arena.partial[slot.first_tile : slot.first_tile + slot.n_tiles]
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0.0)
    unused = arena.table.length[: arena.table.n_tiles] == 0
    assert unused.any() and not arena.partial[: arena.table.n_tiles][unused].any()


def test_sum_of_squares_of_one_slot_leaves_the_others_alone():
    arena, _ = arena_with_gradients()
    whole = arena.partial.clone()
    arena.partial.fill_(-1)
    sum_of_squares(arena.grad, arena.partial, arena.table, backend="reference", tiles=arena.slots[1].tiles)
    own = torch.zeros_like(whole, dtype=torch.bool)
    own[arena.slots[1].first_tile] = True
    assert same_bits(arena.partial[own], whole[own]) and (arena.partial[~own] == -1).all()


def test_chunk_size_does_not_change_a_bit(monkeypatch):
    results = []
    for chunk in (2 * BLOCK, 31 * BLOCK):
        monkeypatch.setattr("misa_engine.kernels.tiles.CHUNK", chunk)
        arena, _ = arena_with_gradients(torch.bfloat16)
        arena.update()
        results.append([arena.partial[: arena.table.n_tiles], *arena.state().values()])
    assert all(map(same_bits, *results))


@pytest.mark.parametrize("max_norm", [1e-3, 0.3, 1e9, math.inf])
def test_clip_factor_is_that_of_torch(max_norm):
    arena, gradients = arena_with_gradients()
    arena.control.max_norm.fill_(max_norm)
    parameter = torch.nn.Parameter(torch.zeros(sum(SIZES)))
    parameter.grad = torch.cat(gradients)
    norm = torch.nn.utils.clip_grad_norm_([parameter], max_norm)
    decide(arena)
    torch.testing.assert_close(arena.control.grad_norm[0], norm, rtol=1e-6, atol=0.0)
    coef = arena.control.clip_coef.item()
    torch.testing.assert_close(torch.cat(gradients) * coef, parameter.grad, rtol=1e-6, atol=0.0)
    assert coef <= 1 and (max_norm < 1e9 or coef == 1)


def test_norm_covers_present_slots_only_and_counts_nothing():
    arena, gradients = arena_with_gradients()
    arena.table.slot_present[0] = 0
    before = arena.everything()
    for _ in range(2):
        global_norm(arena.partial, arena.table, arena.control, backend="reference")
    exact = math.sqrt(sum(gradient.double().square().sum() for gradient in gradients[1:]))
    assert abs(arena.control.grad_norm.item() / exact - 1) < 1e-6
    assert all(map(same_bits, before, arena.everything()))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 2e19])
def test_nonfinite_gradient_skips_the_step_and_is_counted(bad):
    arena, gradients = arena_with_gradients()
    for step in range(3):
        arena.grad[arena.slots[1].start + 5] = bad if step == 1 else 0.1
        arena.measure()
        decide(arena)
        assert arena.control.skip.item() == (step == 1)
        assert (arena.table.slot_coef[:3, 7] == (step != 1)).all()
    assert arena.control.skipped_steps.item() == 1
    assert arena.table.slot_step.tolist() == arena.table.slot_measured.tolist() == [2, 2, 2, 0]


def test_nonfinite_gradient_of_an_absent_slot_does_not_skip():
    arena, _ = arena_with_gradients()
    arena.grad[arena.slots[1].start] = math.nan
    arena.table.slot_present[1] = 0
    arena.measure()
    decide(arena)
    assert arena.control.skip.item() == 0 and arena.table.slot_step.tolist() == [1, 0, 1, 0]


def test_without_guard_or_norm_pass_nothing_is_skipped():
    arena, _ = arena_with_gradients()
    arena.grad[0] = math.nan
    arena.measure()
    decide(arena, skip_nonfinite=False)
    assert arena.control.skip.item() == 0 and arena.control.clip_coef.item() == 1
    decide(arena, normed=False)
    assert arena.control.skip.item() == 0 and arena.table.slot_step.tolist() == [2, 2, 2, 0]


def test_slots_are_reduced_to_sums_or_roots():
    arena, gradients = arena_with_gradients()
    exact = torch.stack([gradient.double().square().sum() for gradient in gradients])
    arena.table.slot_present[2] = 0
    out = torch.ones(4)
    reduce_slots(arena.partial, out, arena.table, arena.control, root=False, backend="reference")
    torch.testing.assert_close(out[:3].double(), 1 + exact, rtol=1e-6, atol=0.0)
    roots = torch.ones(4)
    reduce_slots(arena.partial, roots, arena.table, arena.control, root=True, backend="reference")
    torch.testing.assert_close(roots[:2].double(), 1 + exact[:2].sqrt(), rtol=1e-6, atol=0.0)
    assert roots[2:].tolist() == [1.0, 1.0]
    arena.control.skip.fill_(1)
    before = roots.clone()
    reduce_slots(arena.partial, roots, arena.table, arena.control, root=True, backend="reference")
    assert same_bits(roots, before)


# ------------------------------------------------------------------------------------------------------------- tables


def test_bias_table_is_float64_arithmetic_and_ends_at_one():
    betas = [(0.9, 0.999), (0.0, 0.95)]
    table = bias_table(betas, enabled=True, device="cpu")
    assert table.shape == (2, 17_322, 2) and table.dtype == torch.float32
    for row, (beta1, beta2) in zip(table, betas, strict=True):
        assert row[0].tolist() == [1.0, 1.0] and row[-1].tolist() == [1.0, 1.0]
        for t in (1, 2, 50, 5000):
            root = math.sqrt(1 - beta2**t)
            expected = torch.tensor([root / (1 - beta1**t), root], dtype=torch.float64).float()
            assert torch.equal(row[t], expected)
    assert torch.equal(bias_table(betas, enabled=False, device="cpu"), torch.ones(2, 2, 2))
    assert bias_table([(0.0, 0.0)], enabled=True, device="cpu").shape == (1, 2, 2)


def test_hyper_row_computes_small_differences_in_float64():
    row = hyper_row(1e-5, (0.9, 0.999), 1e-8, 0.1)
    assert row == [1e-5, 1e-5 * 0.1, 0.9, 1 - 0.9, 0.999, 1 - 0.999, 1e-8, 1e-5 * 0.9 / (1 - 0.9)]
    wrong = 1 - torch.tensor(0.999)  # in float32: 1.3e-5 off, which would go straight into v
    assert abs(wrong.item() / row[5] - 1) > 1e-5


def test_table_maps_every_tile_to_its_weights():
    arena = make_arena(random_weights(ODD_SIZES, torch.bfloat16, torch.float32))
    for index, slot in enumerate(arena.slots):
        for number, tile in enumerate(slot.tiles):
            assert arena.table.slot[tile] == index
            assert arena.table.length[tile] == min(BLOCK, slot.numel - number * BLOCK)
            assert arena.table.wptr[tile] == slot.weight[number * BLOCK :].data_ptr()
    assert int(arena.table.length.sum()) == sum(ODD_SIZES)
    assert arena.table.slot_bf16.tolist() == [1, 0, 1, 0, 0]
    assert not arena.table.aligned


def test_binding_again_keeps_the_buffers_and_the_counts():
    arena = make_arena(random_weights(ODD_SIZES, torch.float32))
    table = arena.table
    table.slot_step.fill_(3)
    pointers = [tensor.data_ptr() for tensor in vars(table).values() if isinstance(tensor, torch.Tensor)]
    table.bind([Slot(torch.zeros(100), BLOCK, 100, 1)])
    assert pointers == [tensor.data_ptr() for tensor in vars(table).values() if isinstance(tensor, torch.Tensor)]
    assert table.length.nonzero().tolist() == [[1]] and table.n_tiles == 2 and (table.slot_step == 3).all()


@pytest.mark.parametrize(
    ("slots", "complaint"),
    [
        ([Slot(torch.zeros(10), 512, 10, 0)], "multiples of 1024"),
        ([Slot(torch.zeros(2000), 0, 2000, 0), Slot(torch.zeros(10), 1024, 10, 0)], "not overlap"),
        ([Slot(torch.zeros(10, dtype=torch.float16), 0, 10, 0)], "load the model in bfloat16"),
        ([Slot(torch.zeros(10, 10).t(), 0, 100, 0)], "contiguous flat view"),
        ([Slot(torch.zeros(9000), 0, 9000, 0)], "holds 4 tiles"),
        ([Slot(torch.zeros(10), 0, 10, 0)] * 3, "holds 2 slots"),
        ([Slot(torch.zeros(10, device="meta"), 0, 10, 0)], "after moving the model"),
    ],
)
def test_slots_that_cannot_be_updated_are_refused(slots, complaint):
    with pytest.raises(ValueError, match=complaint):
        TileTable.allocate(4, 2, "cpu").bind(slots)


# ----------------------------------------------------------------------------------------------------------- backends


def test_auto_is_the_reference_on_a_cpu():
    assert choose_backend("auto", "cpu") == "reference"
    assert choose_backend("reference", "cpu") == "reference"


def test_triton_on_a_cpu_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "triton_installed", lambda: True)
    arena, _ = arena_with_gradients()
    arena.backend = "triton"
    for attempt in (lambda: choose_backend("triton", "cpu"), arena.measure, arena.update, arena.close):
        with pytest.raises(RuntimeError, match="Move the model to the GPU"):
            attempt()


def test_missing_triton_is_reported_and_auto_does_without(monkeypatch):
    monkeypatch.setattr(backends, "triton_installed", lambda: False)
    with pytest.raises(RuntimeError, match="install it"):
        check_backend("triton", "cuda")
    assert choose_backend("auto", "cuda") == "reference"


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="reference, triton"):
        check_backend("cuda", "cpu")
