"""What stays in full beside residents, and what a model with residents refuses."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from misa_engine import MISA
from misa_engine.engine.residents import Residents, rest
from models import TINY
from ranks import run_ranks
from resident_models import OPTIONS, of, optimizer_for, resting, snapshot
from test_sharded import shard
from training import batches, loss_of, tiny, train, weights


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
    model = tiny()
    assert rest(model, "int8", "cpu:0").device == torch.device("cpu")  # as torchrun's processes name it
    model.to("cpu:0")
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
    reason = "rest='sign' with residents in 8 bits: the rule moves weights in place on the card, by steps far smaller"
    with pytest.raises(ValueError, match=reason):
        MISA(model, **{**OPTIONS, "rest": "sign"})
    with pytest.raises(ValueError, match="shard_state=True with residents in 8 bits"):
        MISA(model, **{**OPTIONS, "shard_state": True})
    optimizer_for(model)  # nothing was changed by the refusals


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


def both_ways(rank):
    """Sharded before and after: neither rests and shards at once."""
    complaints = []
    for build in (lambda: rest(shard(tiny()), "int8"), lambda: optimizer_for(shard(resting()))):
        try:
            build()
        except (ValueError, TypeError) as error:
            complaints.append(f"{type(error).__name__}: {error}")
    return complaints


def test_sharded_weights_are_refused_by_name(tmp_path):
    for complaints in run_ranks(both_ways, tmp_path / "ranks"):
        assert not isinstance(complaints, str), complaints
        assert "sharded over processes (fully_shard), and masters on the host are not" in complaints[0]
        assert len(complaints) == 2 and "residents" in complaints[1]
