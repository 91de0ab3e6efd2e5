"""Residents: what a model in 8 bits computes, what it trains, and what it holds and saves."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from misa_engine import MISA
from misa_engine.engine.residents import Residents, rest
from misa_engine.kernels.resident8 import FORMATS
from models import TINY
from ranks import run_ranks
from reference import PaperMisa
from resident_models import OPTIONS, of, optimizer_for, resting, snapshot, twin
from training import batches, loss_of, tiny, train, weights


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


# ---- with everything else ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_and_accumulation_change_nothing(dtype):
    results = []
    for recompute in (False, True):
        model = resting("int8", dtype)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer, data = optimizer_for(model), batches()
        for _ in range(6):
            for last in (False, True):
                optimizer.last_micro_batch = last
                loss_of(model, next(data)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(snapshot(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_both_schedules_make_the_same_bits():
    results = []
    for when in ("step", "backward"):
        model = resting("int8", torch.bfloat16)
        train(model, optimizer_for(model, update_in=when), batches(), 7)
        results.append(snapshot(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_generation_and_evaluation_in_mid_run_equal_the_plain_model():
    model = resting()
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(), 5)
    plain, ids = twin(model).eval(), next(batches())
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    made = [m.generate(input_ids=ids, max_new_tokens=5, do_sample=False) for m in (model, plain)]
    assert torch.equal(*made)
    model.train()
    train(model, optimizer, batches(), 5)


@pytest.mark.parametrize(("dtype", "auto"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_autocast_multiplies_in_its_own_dtype(dtype, auto):
    model = resting("int8", dtype)
    optimizer_for(model)
    plain, ids = twin(model), next(batches())
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    losses = []
    for m in (model, plain):
        with torch.autocast("cpu", dtype=auto):
            loss = loss_of(m, ids)
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad)


def test_a_wrong_input_dtype_fails_as_in_a_plain_layer():
    model = resting("int8", torch.bfloat16)
    layer = model.get_submodule(of(model).names[0].removesuffix(".weight"))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.zeros(2, layer.in_features))


def test_second_derivatives_and_transforms():
    model = resting()
    optimizer_for(model)
    layer = model.get_submodule(of(model).resting[0].removesuffix(".weight"))
    w = of(model).expanded(of(model).resting[0])
    x = torch.randn(3, layer.in_features, requires_grad=True)
    y = layer(x)
    (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    torch.testing.assert_close(dx, 3 * (x @ w.T) ** 2 @ w)
    (again,) = torch.autograd.grad(dx.sum(), x)
    (expected,) = torch.autograd.grad((3 * (x @ w.T) ** 2 @ w).sum(), x)
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x.detach()), x.detach() @ w.T)
    torch.testing.assert_close(torch.func.jvp(layer, (x.detach(),), (x.detach(),))[1], x.detach() @ w.T)
    torch.testing.assert_close(layer(x[0]), w @ x[0])  # one token


def test_a_compiled_layer_breaks_its_graph_at_what_rests():
    model = resting()
    plain, x = twin(model).model.layers[0].mlp, torch.randn(2, 3, 32)
    compiled = torch.compile(model.model.layers[0].mlp, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x))


def test_biases_train_beside_resting_weights():
    model = tiny("qwen2")
    rest(model, "int8")
    optimizer = optimizer_for(model, always_train=("bias",))
    before = weights(model)
    train(model, optimizer, batches(), 3)
    moved = [name for name, p in model.named_parameters() if name.endswith("bias") and not torch.equal(p, before[name])]
    assert moved


def test_a_matrix_that_is_always_trained_does_not_rest():
    model = resting()
    optimizer = optimizer_for(model, always_train=("*.0.self_attn.q_proj.weight",))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert name not in of(model) and name not in of(model).names
    before = weights(model)
    train(model, optimizer, batches(), 6)
    assert not torch.equal(model.get_parameter(name), before[name])


# ---- what stays, and what is refused ----


@pytest.mark.parametrize("family", list(TINY))
def test_every_family_names_what_stays_in_full(family):
    model = TINY[family]()
    matrices = {name for name, p in model.named_parameters() if p.ndim >= 2}
    if family == "gpt2":
        with pytest.raises(ValueError, match="in Conv1D, not nn.Linear"):
            Residents(model, "int8")
        return
    residents = rest(model, "int8")
    rests, stays = set(residents.names), set(residents.staying)
    assert rests | stays == matrices and not rests & stays
    assert all(f"{name}" in residents.describe() for name in residents.staying)
    for name in residents.names:
        assert isinstance(model.get_submodule(name.removesuffix(".weight")), nn.Linear)


def test_models_with_fused_experts_train_them_in_full_beside_residents():
    model = tiny("mixtral")
    rest(model, "int8")
    assert any(reason.startswith("3-dim") for reason in of(model).staying.values())
    optimizer = optimizer_for(model, delta=0.5)
    before = weights(model)
    train(model, optimizer, batches(), 12)
    after = model.state_dict()
    trained = {name for name in before if not torch.equal(after[name], before[name])}
    assert trained & of(model).staying.keys() and trained & set(of(model).names)


def test_moving_and_converting_is_refused_and_changes_nothing():
    model = resting()
    before = snapshot(model)
    for convert in (model.half, lambda: model.to(torch.bfloat16), lambda: model.to("meta"), model.double):
        with pytest.raises(ValueError, match="the model has residents"):
            convert()
    model.to("cpu").float()
    layer = model.model.layers[0]
    with pytest.raises(ValueError, match="cannot be converted to torch.bfloat16"):
        layer.self_attn.to(torch.bfloat16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    train(model, optimizer_for(model), batches(), 3)


@pytest.mark.parametrize("copier", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_by_name(copier):
    model = resting()
    with pytest.raises(TypeError, match=r"residents cannot be copied or pickled .* model\.state_dict"):
        copier(model)
    optimizer_for(model, delta=1.0)  # nothing rests now
    with pytest.raises(TypeError, match="residents cannot be copied"):
        copier(model)


def test_a_gradient_of_what_rests_is_refused():
    model = resting()
    with pytest.raises(RuntimeError, match="rests in 8 bits, so it has no gradient"):
        loss_of(model, next(batches())).backward()
    optimizer_for(model)
    model.get_parameter(of(model).resting[0]).requires_grad_(True)
    with pytest.raises(RuntimeError, match="rests in 8 bits, so it has no gradient"):
        loss_of(model, next(batches())).backward()


def test_a_graph_from_before_a_switch_is_refused():
    model = resting()
    optimizer = optimizer_for(model, inner_steps=1)
    old = loss_of(model, next(batches()))
    train(model, optimizer, batches(), 1)
    with pytest.raises(RuntimeError, match="has changed since the forward pass|modified by an inplace operation"):
        old.backward()


def test_the_preset_rest_rule_is_switched_off_with_a_warning_and_a_named_one_refused(caplog):
    options = {name: value for name, value in OPTIONS.items() if name != "rest"}
    with caplog.at_level("WARNING"):
        optimizer = MISA(resting(), **options)
    assert optimizer.config.rest == "none" and "residents in 8 bits" in caplog.text
    model = resting()
    with pytest.raises(ValueError, match="rest='sign' with residents in 8 bits"):
        MISA(model, **{**OPTIONS, "rest": "sign"})
    optimizer_for(model)  # nothing was changed by the refusal


def build_on_a_rank(rank):
    try:
        optimizer_for(resting())
    except ValueError as error:
        return str(error)
    return ""


def test_several_processes_are_refused_on_each_of_them(tmp_path):
    complaints = run_ranks(build_on_a_rank, tmp_path / "ranks")
    assert all("the model has residents and 2 processes train it" in complaint for complaint in complaints)


def test_weights_that_are_not_finite_are_refused_where_they_rest():
    model = tiny()
    name = rest(model, "int8").names[3]
    model.get_parameter(name).data[1, 2] = math.inf
    with pytest.raises(ValueError, match=f"1 of .* parameters hold NaN or infinite weights: {name} has 1"):
        optimizer_for(model)


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: rest(tiny(), "int4"), "unknown 8-bit format 'int4'"),
        (lambda: rest(tiny(), "int8", masters="disk"), "unknown place of the masters 'disk'"),
        (lambda: rest(tiny(dtype=torch.float16), "int8"), "float32 or bfloat16"),
        (lambda: rest(resting(), "fp8"), "has residents already"),
        (lambda: rest(nn.Sequential(nn.Linear(4, 4)), "int8"), "no repeated layers"),
    ],
)
def test_bad_input_is_named(build, complaint):
    with pytest.raises(ValueError, match=complaint):
        build()


def test_released_residents_leave_an_ordinary_model():
    model = resting()
    optimizer = optimizer_for(model)
    train(model, optimizer, batches(), 3)
    before = snapshot(model)
    for refused in (of(model).release, lambda: of(model).wake(optimizer.active)):
        with pytest.raises(ValueError, match=r"trains at present, in memory of the optimizer's. Call its remove\(\)"):
            refused()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    optimizer.remove()
    expected = snapshot(model)
    of(model).release()
    copied = copy.deepcopy(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in copied.state_dict().items())
    train(model, MISA(model, **OPTIONS), batches(), 3)


def test_replaced_weights_are_refused():
    model = resting()
    model.load_state_dict(tiny().state_dict(), assign=True)
    with pytest.raises(RuntimeError, match="was replaced by another tensor while it rested"):
        loss_of(model, next(batches()))
