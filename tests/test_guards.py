import pytest
import torch
from torch import nn

from misa_engine import MISA, MisaConfig
from training import batches, loss_of, tiny, train, weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.0}, "delta is the share"),
        ({"delta": -1.0}, "delta is the share"),
        ({"delta": 1.5}, "delta is the share"),
        ({"inner_steps": 0}, "inner_steps"),
        ({"inner_steps": 2.5}, "inner_steps"),
        ({"rule": "importence"}, "Did you mean 'importance'"),
        ({"preset": "papers"}, "Did you mean 'paper'"),
        ({"granularity": "matrix"}, "choose one of module, block, layer"),
        ({"family": "lama"}, "llama"),
        ({"state_dtype": "int4"}, "choose one of float32, int8"),
        ({"update_in": "backward", "max_grad_norm": 1.0}, "update_in='step'"),
        ({"update_in": "backward", "grad_dtype": "float32"}, "gradient slots"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eta": float("nan")}, "eta"),
        ({"lr": -1.0}, "lr"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"detla": 0.1}, "Did you mean 'delta'"),
        ({"parameter_groups": ({"lr": 1.0},)}, "pattern"),
        ({"delta": 0.3, "parameter_groups": ({"pattern": "nothing_here", "lr": 1.0},)}, "matches no parameter"),
        ({"delta": 0.3, "rule": "static", "static_weights": {"nothing_here": 2.0}}, "matches no unit"),
        ({"static_weights": {"*": 0.0}}, "positive"),
        ({"always_train": ("nothing_here",)}, "nothing_here"),
    ],
)
def test_bad_options_are_refused_before_anything_is_frozen(options, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        MISA(model, **options)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_budget_below_the_largest_unit_names_it_and_the_delta_that_works():
    with pytest.raises(ValueError, match="_proj.weight") as error:
        MISA(tiny(), delta=0.01)
    words = str(error.value).replace(",", " ").replace(";", " ").split()
    numbers = [float(word.rstrip(".)")) for word in words if word.rstrip(".)").replace(".", "", 1).isdigit()]
    works = [number for number in numbers if 0.01 < number <= 1]
    assert works, error.value
    MISA(tiny(), delta=min(works))


def test_config_and_options_together_are_refused():
    with pytest.raises(ValueError, match="not both"):
        MISA(tiny(), MisaConfig(delta=0.3), lr=1.0)


def test_a_float16_model_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="bfloat16"):
        MISA(tiny().half(), delta=0.3)


def test_a_frozen_model_is_refused():
    model = tiny()
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match="already frozen"):
        MISA(model, delta=0.3)


def test_data_parallel_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="DataParallel"):
        MISA(nn.DataParallel(tiny()), delta=0.3)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="DistributedDataParallel"):
            MISA(nn.parallel.DistributedDataParallel(tiny()), delta=0.3)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_memory_is_refused():
    with pytest.raises(ValueError, match="meta"):
        MISA(tiny().to("meta"), delta=0.3)


def test_reentrant_checkpointing_is_refused_at_construction_and_later():
    model = tiny()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        MISA(model, delta=0.3)
    model = tiny()
    MISA(model, delta=0.3)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        loss_of(model, next(batches()))


def _break_replaced(model, name):
    module = model.get_submodule(name.rpartition(".")[0])
    module.weight = nn.Parameter(module.weight.detach().clone())


def _break_shape(model, name):
    parameter = model.get_parameter(name)
    parameter.data = torch.cat([parameter.data, parameter.data])


def _break_memory(model, name):
    parameter = model.get_parameter(name)
    parameter.data = parameter.data.clone()


@pytest.mark.parametrize(
    ("breaks", "message"),
    [(_break_replaced, "was replaced"), (_break_shape, "changed after"), (_break_memory, "changed after")],
)
@pytest.mark.parametrize("active", [True, False])
def test_a_parameter_changed_after_construction_is_noticed_before_it_is_written(breaks, message, active):
    model = tiny()
    optimizer = MISA(model, delta=0.3, inner_steps=1)
    names = [unit.name for unit in optimizer.units]
    name = next(name for name in names if (name in optimizer.active) == active)
    loss_of(model, next(batches())).backward()
    optimizer.zero_grad(set_to_none=False)
    before = weights(model)
    breaks(model, name)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    for other, parameter in model.named_parameters():
        assert other == name or torch.equal(parameter, before[other])


def test_a_dtype_conversion_after_construction_is_noticed():
    model = tiny()
    optimizer = MISA(model, delta=0.3)
    model.bfloat16()
    with pytest.raises(ValueError, match="bfloat16"):
        train(model, optimizer, batches(), 1)


def test_a_gradient_for_an_inactive_unit_is_an_error():
    model = tiny()
    MISA(model, rest="none", delta=0.3)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="inactive"):
        loss_of(model, next(batches())).backward()


def test_parameters_cannot_be_added_later():
    optimizer = MISA(tiny(), delta=0.3)
    with pytest.raises(ValueError, match="always_train"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_trained_parameters_of_two_dtypes_are_refused():
    model = tiny(dtype=torch.bfloat16)
    model.model.norm.float()
    MISA(tiny(dtype=torch.bfloat16), delta=0.3)
    with pytest.raises(ValueError, match="one dtype"):
        MISA(model, delta=0.3, always_train=("model.norm.weight",))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"closing_momentum": True, "inner_steps": 2}, ["9 of its steps"]),
        ({"closing_momentum": True, "inner_steps": 8, "betas": (0.95, 0.999)}, ["19 of its steps"]),
        ({"closing_momentum": True, "inner_steps": 9}, []),
        ({"inner_steps": 2}, []),
    ],
)
def test_a_closing_step_longer_than_its_round_is_said(options, told, caplog):
    """Rounds of two steps with preset ``paper`` ended above the base on real text, at 2.5e-4 (bench/LOG.md)."""
    MISA(tiny(), delta=0.3, **options)
    said = [record.getMessage() for record in caplog.records if "closing_momentum" in record.getMessage()]
    assert len(said) == len(told) and all(words in text for words, text in zip(told, said, strict=True))
