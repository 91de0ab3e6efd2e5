"""Residents: what a model in 8 bits computes, what it trains, and what it holds and saves."""

import copy
import io
import math

import pytest
import torch

from misa_engine import MISA
from misa_engine.engine.residents import rest
from misa_engine.kernels.resident8 import FORMATS
from reference import PaperMisa
from resident_models import OPTIONS, of, optimizer_for, resting, snapshot, twin
from training import batches, loss_of, tiny, train


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_those_of_the_expanded_weights(format, dtype):
    model = resting(format, dtype)
    optimizer = optimizer_for(model)
    plain = twin(model)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in optimizer.active)
    ids = next(batches())
    loss, expected = loss_of(model, ids), loss_of(plain, ids)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    for name in optimizer.active:
        torch.testing.assert_close(model.get_parameter(name).grad, plain.get_parameter(name).grad, rtol=0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_training_equals_the_float64_reference_on_the_same_frozen_weights(format):
    """In each round the reference trains what was drawn, on the weights that the others count as."""
    model = resting(format)
    optimizer = MISA(model, preset="paper", lr=1e-3, delta=0.3, inner_steps=4)
    data = batches()
    for _ in range(5):
        plain = twin(model, torch.float64)
        exact = PaperMisa(plain, [unit.name for unit in optimizer.units], lr=1e-3)
        exact.start_round(list(optimizer.active))
        active = optimizer.active
        for step in range(4):
            ids = next(data)
            plain.zero_grad()
            loss_of(plain, ids).backward()
            exact.step()
            loss_of(model, ids).backward()
            if step == 3:
                exact.end_round()
            optimizer.step()
            optimizer.zero_grad()
        saved = model.state_dict()
        for name in active:
            # the tolerance of test_trajectory, which is that without residents
            torch.testing.assert_close(saved[name].double(), plain.get_parameter(name), rtol=0, atol=3e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"update_in": "backward"}, {"gemm_gradients": False}, {"state_dtype": "int8"}])
def test_what_was_never_drawn_is_bit_identical_and_what_was_is_exact(dtype, how):
    """A drawn matrix is saved as the arena left it: equal to a plain model trained beside frozen expanded weights."""
    model = resting("int8", dtype)
    before, plain = snapshot(model), twin(model)
    optimizer = optimizer_for(model, inner_steps=100, **how)
    other = MISA(plain, **{**OPTIONS, "inner_steps": 100, **how})
    assert other.active == optimizer.active
    for name in optimizer.active:  # trained from the exact weights, not from what they count as
        plain.get_parameter(name).data.copy_(before[name])
    losses = [train(m, o, batches(), 6) for m, o in ((model, optimizer), (plain, other))]
    assert losses[0] == losses[1]
    after = snapshot(model)  # state_dict() itself refers to the arena, where others will train
    for name, tensor in after.items():
        if name in optimizer.active:
            assert torch.equal(tensor, plain.state_dict()[name]) and not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name]), name
    drawn = optimizer.active
    optimizer.end_round()  # written back to the masters, rounded as the option says
    optimizer.remove()
    if dtype == torch.float32:
        assert all(torch.equal(model.state_dict()[name], after[name]) for name in drawn)


def test_quantisation_never_accumulates():
    """After 40 switches the 8 bits of every matrix are those of its master, made once."""
    model = resting("int8", torch.bfloat16)
    optimizer = optimizer_for(model, inner_steps=1)
    train(model, optimizer, batches(), 40)
    residents = of(model)
    assert len(residents.resting) + len(optimizer.active) == len(residents.names)
    fresh = tiny(dtype=torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    anew = rest(fresh, "int8")
    for name in residents.resting:
        assert torch.equal(residents.expanded(name), anew.expanded(name)), name


def test_residual_bits_kept_on_the_host_make_an_exact_master_over_all_visits():
    """With leave_rounding="keep" a matrix drawn again goes on from its 32 bits, as without residents."""
    runs = []
    for with_residents in (True, False):
        model = tiny(dtype=torch.bfloat16)
        if with_residents:
            rest(model, "int8")
        optimizer = optimizer_for(model, rule="cyclic", inner_steps=1, leave_rounding="keep", revisit="keep", lr=1e-5)
        for _ in range(30):  # the same gradients in both, whatever the neighbours count as
            for name in optimizer.active:
                parameter = model.get_parameter(name)
                parameter.grad = torch.full_like(parameter, 1e-3) * (1 + torch.arange(parameter.shape[1]))
            optimizer.step()
            optimizer.zero_grad()
        bits = {name: buffers["residual_bits"] for name, (_, buffers) in optimizer.host.state_dict().items()}
        runs.append((model.state_dict(), bits))
    (a, bits_a), (b, bits_b) = runs
    assert all(torch.equal(a[name], b[name]) for name in b) and bits_a.keys() == bits_b.keys() and bits_a
    assert all(torch.equal(bits_a[name], bits_b[name]) for name in bits_a)


def test_a_skipped_step_changes_nothing():
    model = resting()
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(), 1)
    before = snapshot(model)
    name = optimizer.active[0]
    model.get_parameter(name).grad = torch.full_like(model.get_parameter(name), math.nan)
    optimizer.step()
    optimizer.zero_grad()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    optimizer.end_round()
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"leave_rounding": "keep", "revisit": "offload", "state_dtype": "int8"}])
def test_resume_in_mid_round_is_exact(dtype, options):
    model = resting("int8", dtype)
    optimizer = optimizer_for(model, inner_steps=3, **options)
    data = batches()
    train(model, optimizer, data, 7)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(model, optimizer, data, 8)

    again = resting("int8", dtype)
    resumed = optimizer_for(again, inner_steps=3, **options)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    data = batches()
    for _ in range(7):
        next(data)
    train(again, resumed, data, 8)
    assert resumed.active == optimizer.active
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_state_loaded_over_the_same_active_matrices_keeps_their_weights():
    model = resting()
    optimizer = optimizer_for(model, inner_steps=50)
    train(model, optimizer, batches(), 2)
    state, before = copy.deepcopy(optimizer.state_dict()), snapshot(model)
    optimizer.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    train(model, optimizer, batches(), 2)


def test_weights_loaded_in_place_are_quantised_anew():
    model, other = resting(), tiny()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    model.load_state_dict(other.state_dict())
    rest(other, "int8")
    ids = next(batches())
    with torch.no_grad():
        assert torch.equal(loss_of(model, ids), loss_of(other, ids))


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_on_the_card_are_counted(format):
    """The card is the meta device, where tensors have sizes and nothing else; masters stay on the CPU."""
    model = tiny(dtype=torch.bfloat16)
    elsewhere = {id(tensor) for tensor in model.parameters()}
    residents = rest(model, format, "meta")
    assert {p.device.type for n, p in model.named_parameters() if n in residents} == {"cpu"}
    # the frozen embedding, whose rows are looked up there, and nothing else
    there = {n for n, p in model.named_parameters() if n not in residents and p.device.type == "cpu"}
    assert there == set(residents.on_host) - set(residents.names) == {"model.embed_tokens.weight"}
    assert elsewhere >= {id(model.get_parameter(name)) for name in residents.names}
    held = [m for name in residents.names for m in (residents.matrix(name).packed,) if m is not None]
    card = [residents.workspace, *(t for each in held for t in (each.codes, each.steps))]
    assert all(tensor.is_meta for tensor in card)
    sizes = residents.bytes()
    assert sum(tensor.nbytes for tensor in card) == sum(
        sizes[f"resident_{key}"] for key in ("codes", "steps", "workspace")
    )
    numel = sum(model.get_parameter(name).numel() for name in residents.names)
    assert sizes["resident_codes"] == numel and sizes["host_masters"] == 2 * numel
    assert sizes["resident_workspace"] == 2 * max(model.get_parameter(name).numel() for name in residents.names)


def test_memory_names_every_byte():
    model = resting("int8", torch.bfloat16)
    optimizer = optimizer_for(model, always_train=("model.norm",))
    sizes, residents = optimizer.memory(), of(model)
    full = sum(p.nbytes for name, p in model.named_parameters() if name not in residents.on_host)
    assert sizes["weights"] == full
    assert sizes["active_weights"] == optimizer.arena.weights.nbytes >= 2 * optimizer.budget
    # always-trained parameters have weights of their own: no place is kept for them
    assert optimizer.arena.weights.numel() < optimizer.arena.capacity
    assert {key: sizes[key] for key in residents.bytes()} == residents.bytes()
    held = dict(sizes)
    train(model, optimizer, batches(), 12)
    assert optimizer.memory() == held


def test_nothing_but_the_record_is_kept_for_backward():
    model = resting()
    optimizer_for(model)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss_of(model, next(batches()))
    shapes = {tuple(model.get_parameter(name).shape) for name in of(model).resting}
    workspace = of(model).workspace.untyped_storage().data_ptr()
    assert saved and all(t.untyped_storage().data_ptr() != workspace for t in saved)
    masters = {model.get_parameter(name).data_ptr() for name in of(model).resting}
    assert not masters & {t.data_ptr() for t in saved} and shapes
