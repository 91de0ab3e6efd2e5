from __future__ import annotations

import pytest
import torch
from torch import nn

from misa_engine.method.families import FAMILIES, family_named
from misa_engine.method.partition import partition
from models import COMMON, GROUPED, TINY


class Wrapper(nn.Module):
    """What torch.compile or a checkpoint wrapper does to names."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def bare(model: nn.Module) -> nn.Module:
    """The same modules under the same names, without a config."""
    return nn.ModuleDict(dict(model.named_children()))


def meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return TINY[name](**options)


@pytest.mark.parametrize(
    "model_type", sorted({kind for row in FAMILIES.values() for kind in row.model_types} - {"gemma3"})
)
def test_every_model_type_of_a_row_names_its_matrices_as_the_row_says(model_type):
    import transformers

    family = family_named(model_type)
    config = transformers.AutoConfig.for_model(
        model_type, **COMMON, **(GROUPED if family not in ("gpt2", "opt") else {})
    )
    auto = "AutoModelForMaskedLM" if family in ("bert", "roberta", "distilbert") else "AutoModelForCausalLM"
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(config)
    result = partition(model)
    assert (result.family, result.notes) == (family, ())
    assert {unit.kind for unit in result.units} == {unit.kind for unit in partition(meta(family)).units}


@pytest.mark.parametrize("name", TINY)
def test_a_bare_module_is_read_with_the_family_that_is_named(name):
    model = meta(name)
    expected = partition(model)
    assert partition(bare(model), family=name) == expected


@pytest.mark.parametrize("name", TINY)
def test_without_a_family_the_layers_are_inferred(name):
    model = meta(name)
    for granularity in ("module", "block", "layer"):
        known, inferred = partition(model, granularity), partition(bare(model), granularity)
        assert inferred.family == "inferred" and inferred.inferred
        assert (inferred.units, inferred.frozen) == (known.units, known.frozen)
        assert f"inferred: the model names no family; took {known.container!r}" in inferred.describe()


def test_a_model_type_is_a_name_of_its_family():
    assert partition(bare(meta("llama")), family="granite").family == "llama"


def test_one_layer_is_enough_for_a_known_family():
    result = partition(meta("llama", num_hidden_layers=1))
    assert (result.family, len(result.units)) == ("llama", 7)


def test_a_dense_layer_within_a_mixture_is_no_stranger():
    result = partition(meta("qwen3_moe", mlp_only_layers=[0]))
    assert result.notes == ()
    assert {unit.kind for unit in result.units if unit.layer == 0} == {"q", "k", "v", "o", "gate", "up", "down"}


def test_a_matrix_that_the_row_does_not_name_becomes_a_unit_and_is_reported():
    model = meta("llama")
    for layer in model.model.layers:
        layer.adapter = nn.Linear(4, 4, device="meta")
    result = partition(model)
    assert [unit.name for unit in result.units if unit.kind == "adapter"] == [
        "model.layers.0.adapter.weight",
        "model.layers.1.adapter.weight",
    ]
    assert "not in the row 'llama'" in result.describe() and "adapter" in result.notes[0]
    names = [unit.name for unit in partition(model, "block").units if unit.kind == "adapter"]
    assert names == ["model.layers.0.adapter", "model.layers.1.adapter"]


def test_a_known_model_type_with_strange_names_is_inferred_and_says_so():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))})
    model.config = type("Config", (), {"model_type": "llama"})()
    result = partition(model)
    assert result.inferred and "config.model_type is 'llama', but" in result.notes[0]
    assert [unit.layer for unit in result.units] == [0, 1, 2]


def test_inference_takes_the_largest_list_and_names_the_others():
    def tower(width: int) -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(width, width)}) for _ in range(2))

    model = nn.ModuleDict({"vision": tower(4), "text": tower(8), "codebooks": nn.ModuleList([nn.Embedding(99, 9)] * 2)})
    result = partition(model)
    assert result.container == "text"
    assert "'vision' repeats layers, too (32 parameters)" in result.describe()
    everything = partition(model, include_outside=True)
    assert sum(unit.layer is None for unit in everything.units) == 3


def test_experts_that_are_separate_modules_share_a_kind():
    def layer() -> nn.Module:
        experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 8), "w2": nn.Linear(8, 4)}) for _ in range(3))
        return nn.ModuleDict({"mixer": nn.Linear(4, 4), "moe": nn.ModuleDict({"experts": experts})})

    model = nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(2))})
    units = partition(model).units
    assert len(units) == 14
    assert {unit.kind for unit in units} == {"mixer", "moe.experts.*.w1", "moe.experts.*.w2"}
    assert {(unit.name, unit.kind) for unit in partition(model, "block").units if unit.layer == 0} == {
        ("layers.0.mixer", "mixer"),
        ("layers.0.moe", "mlp"),
    }


def test_a_bias_is_no_matrix_whatever_its_shape():
    def layer() -> nn.Module:
        experts = nn.Module()
        experts.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 4))
        experts.gate_up_proj_bias = nn.Parameter(torch.zeros(2, 4))
        return nn.ModuleDict({"experts": experts})

    result = partition(nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(2))}))
    assert [unit.name for unit in result.units] == ["layers.0.experts.gate_up_proj", "layers.1.experts.gate_up_proj"]


def test_numbered_children_of_the_root_are_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert [unit.name for unit in partition(model).units] == ["0.weight", "2.weight"]
    assert [(unit.name, unit.numel) for unit in partition(model, "layer").units] == [("0", 20), ("2", 20)]
    assert [(unit.name, unit.numel) for unit in partition(model, "block").units] == [("0", 20), ("2", 20)]


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module"])
@pytest.mark.parametrize("granularity", ["module", "block", "layer"])
def test_wrapped_layers_are_recognised_like_plain_ones(wrapper, granularity):
    plain = partition(meta("llama"), granularity)
    model = meta("llama")
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = Wrapper(wrapper, layer)
    wrapped = partition(model, granularity, always_train=("layers.0.self_attn.q_proj",))
    assert wrapped.always == (f"model.layers.0.{wrapper}.self_attn.q_proj.weight",)
    assert [unit.kind for unit in wrapped.units] == [unit.kind for unit in plain.units][
        len(plain.units) - len(wrapped.units) :
    ]
    if granularity != "module":
        assert [unit.name for unit in wrapped.units] == [unit.name for unit in plain.units]


def test_a_multimodal_gemma3_trains_its_language_model():
    import transformers

    text = {**COMMON, **GROUPED, "head_dim": 8}
    vision = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    with torch.device("meta"):
        result = partition(transformers.AutoModelForImageTextToText.from_config(config))
    assert (result.family, result.container) == ("gemma3", "model.language_model.layers")
    assert "vision_tower" in result.describe().split("note: ")[1]
