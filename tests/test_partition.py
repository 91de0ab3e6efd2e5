from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from misa_engine.method.config import CHOICES
from misa_engine.method.families import FAMILIES
from misa_engine.method.partition import Partition, Unit, matches, partition
from models import MODELS, TINY

ATTENTION = {"q": 1024, "k": 512, "v": 512, "o": 1024}
LLAMA = {**ATTENTION, "gate": 1536, "up": 1536, "down": 1536}
WIDE_ATTENTION = {"q": 1024, "k": 1024, "v": 1024, "o": 1024}
ENCODER = {**WIDE_ATTENTION, "fc_in": 2048, "fc_out": 2048}
QWEN_EXPERTS = {"router": 128, "experts_gate_up": 4 * 48 * 32, "experts_down": 4 * 32 * 24}
SHARED = {"shared_gate": 1280, "shared_up": 1280, "shared_down": 1280, "shared_router": 32}

#: kind -> size, of one layer
KINDS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": LLAMA,
    "gemma3": LLAMA,
    "olmo2": LLAMA,
    "phi3": {"qkv": 2048, "o": 1024, "gate_up": 3072, "down": 1536},
    "gpt2": {"qkv": 3072, "o": 1024, "fc_in": 4096, "fc_out": 4096},
    "opt": ENCODER,
    "gpt_neox": {"qkv": 3072, "o": 1024, "fc_in": 2048, "fc_out": 2048},
    "mixtral": {**ATTENTION, "router": 128, "experts_gate_up": 4 * 96 * 32, "experts_down": 4 * 32 * 48},
    "qwen2_moe": {**ATTENTION, **QWEN_EXPERTS, **SHARED},
    "qwen3_moe": {**ATTENTION, **QWEN_EXPERTS},
    "bert": ENCODER,
    "roberta": ENCODER,
    "distilbert": ENCODER,
}

#: what a unit of layer 1 is called, by granularity; the virtual prefixes among them
BLOCKS = {
    "gpt2": ("transformer.h.1", "attn", "mlp"),
    "opt": ("model.decoder.layers.1", "self_attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers.1", "attention", "mlp"),
    "bert": ("bert.encoder.layer.1", "attention", "mlp"),
    "roberta": ("roberta.encoder.layer.1", "attention", "mlp"),
    "distilbert": ("distilbert.transformer.layer.1", "attention", "ffn"),
}


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    with torch.device("meta"):  # names and shapes are all that partition() may look at
        return {name: build() for name, build in TINY.items()}


def by_name(result: Partition) -> dict[str, Unit]:
    return {unit.name: unit for unit in result.units}


def assert_every_parameter_has_one_place(model: nn.Module, result: Partition) -> None:
    names = [name for name, _ in model.named_parameters()]
    places = [name for unit in result.units for name in unit.params] + [*result.always, *result.frozen]
    assert sorted(places) == sorted(names)
    assert result.total == sum(tensor.numel() for tensor in {id(p): p for p in model.parameters()}.values())
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    assert all(unit.numel == sum(sizes[name] for name in unit.params) > 0 for unit in result.units)
    assert len(by_name(result)) == len(result.units)


def test_tiny_models_cover_every_family():
    assert set(MODELS) == set(FAMILIES) == set(KINDS)


@pytest.mark.parametrize("options", [{}, {"include_outside": True}, {"always_train": ("norm", "head")}])
@pytest.mark.parametrize("granularity", CHOICES["granularity"])
@pytest.mark.parametrize("name", TINY)
def test_every_parameter_has_exactly_one_place(models, name, granularity, options):
    result = partition(models[name], granularity, **options)
    assert_every_parameter_has_one_place(models[name], result)
    assert (result.family, result.inferred, result.notes) == (name, False, ())
    assert {unit.layer for unit in result.units} - {None} == {0, 1}
    assert any(unit.layer is None for unit in result.units) == ("include_outside" in options)


@pytest.mark.parametrize("name", TINY)
def test_a_module_unit_is_one_matrix_of_the_expected_kind(models, name):
    result = partition(models[name])
    for layer in (0, 1):
        kinds = {unit.kind: unit.numel for unit in result.units if unit.layer == layer}
        assert kinds == KINDS[name]
    assert len(result.units) == 2 * len(KINDS[name])  # no kind twice in a layer
    assert all(unit.params == (unit.name,) for unit in result.units)


@pytest.mark.parametrize("name", TINY)
def test_a_block_holds_the_matrices_of_the_attention_or_the_mlp(models, name):
    prefix, attention, mlp = BLOCKS.get(name, ("model.layers.1", "self_attn", "mlp"))
    kind_of = {unit.name: unit.kind for unit in partition(models[name]).units}
    units = {unit.kind: unit for unit in partition(models[name], "block").units if unit.layer == 1}
    assert (units["attention"].name, units["mlp"].name) == (f"{prefix}.{attention}", f"{prefix}.{mlp}")
    kinds = {key: {kind_of[p] for p in unit.params if p in kind_of} for key, unit in units.items()}
    assert kinds["attention"] == set(KINDS[name]) & {"q", "k", "v", "o", "qkv"}
    assert kinds["mlp"] == set(KINDS[name]) - kinds["attention"]


@pytest.mark.parametrize("name", TINY)
def test_a_layer_holds_everything_below_it(models, name):
    prefix = BLOCKS.get(name, ("model.layers.1",))[0]
    unit = by_name(partition(models[name], "layer"))[prefix]
    below = [key for key, _ in models[name].named_parameters() if key.startswith(f"{prefix}.")]
    assert unit == Unit(prefix, unit.numel, 1, "layer", tuple(below))


def test_a_block_includes_its_own_norms_and_biases_but_not_the_layers(models):
    attention = by_name(partition(models["qwen3"], "block"))["model.layers.0.self_attn"]
    assert "model.layers.0.self_attn.q_norm.weight" in attention.params
    assert "model.layers.0.self_attn.q_proj.bias" in partition(models["qwen2"], "block").units[0].params
    assert "model.layers.0.input_layernorm.weight" in partition(models["qwen3"], "block").frozen
    mlp = by_name(partition(models["bert"], "block"))["bert.encoder.layer.0.mlp"]
    assert mlp.params == tuple(
        f"bert.encoder.layer.0.{name}"
        for name in (
            "intermediate.dense.weight",
            "intermediate.dense.bias",
            "output.dense.weight",
            "output.dense.bias",
            "output.LayerNorm.weight",
            "output.LayerNorm.bias",
        )
    )


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("llama", {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}),
        ("gemma3", {"model.embed_tokens.weight": "embedding"}),
        ("gpt2", {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "position"}),
        (
            "bert",
            {
                "bert.embeddings.word_embeddings.weight": "embedding",
                "bert.embeddings.position_embeddings.weight": "position",
                "bert.embeddings.token_type_embeddings.weight": "token_type",
                "cls.predictions.transform.dense.weight": "head",
            },
        ),
    ],
)
def test_include_outside_adds_the_matrices_outside_the_layers(models, name, outside):
    for granularity in CHOICES["granularity"]:
        units = partition(models[name], granularity, include_outside=True).units
        assert {unit.name: unit.kind for unit in units if unit.layer is None} == outside


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bert"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_parameter(name, tied):
    with torch.device("meta"):
        model = TINY[name](tie_word_embeddings=tied)
    result = partition(model, include_outside=True)
    assert_every_parameter_has_one_place(model, result)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tied
    assert sum(unit.numel == embedding.numel() and unit.layer is None for unit in result.units) >= (1 if tied else 2)


@pytest.mark.parametrize("pattern", ["lm_head", "lm_head.weight", "*lm_head*", "head"])
def test_a_tied_head_is_found_under_its_own_name(models, pattern):
    result = partition(models["gemma2"], always_train=(pattern,))
    assert result.always == ("model.embed_tokens.weight",)


def test_weights_shared_between_layers_belong_to_the_first():
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(3))
    for layer in model.layers:
        layer["b"] = model.layers[0]["b"]
    result = partition(model, "layer")
    assert_every_parameter_has_one_place(model, result)
    assert [unit.numel for unit in result.units] == [40, 20, 20]


# Patterns


def test_lisa_trains_embedding_and_head_always(models):
    result = partition(models["llama"], "layer", always_train=("embed_tokens", "lm_head"))
    assert result.always == ("model.embed_tokens.weight", "lm_head.weight")
    assert result.frozen == ("model.norm.weight",)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("granularity", CHOICES["granularity"])
def test_norm_and_bias_mean_all_norms_and_biases_of_any_family(models, name, granularity):
    flat = {key for key, tensor in models[name].named_parameters() if tensor.ndim == 1}
    words = ("norm", "bias") if any(key.endswith("bias") for key in flat) else ("norm",)
    result = partition(models[name], granularity, always_train=words)
    assert set(result.always) == flat
    assert all(models[name].get_parameter(key).ndim > 1 for unit in result.units for key in unit.params)


def test_a_kind_selects_that_kind_only(models):
    llama = models["llama"]
    gates = partition(llama, frozen=("attention", "gate"))
    assert {unit.kind for unit in gates.units} == {"up", "down"}
    assert (
        "model.layers.0.post_attention_layernorm.weight"
        in partition(llama, "layer", frozen="attention").units[0].params
    )
    assert {unit.kind for unit in partition(models["mixtral"], frozen="router").units} == set(KINDS["mixtral"]) - {
        "router"
    }
    assert {unit.kind for unit in partition(models["opt"], "block", frozen="mlp").units} == {"attention"}


def test_frozen_parameters_leave_their_unit(models):
    result = partition(models["llama"], "layer", frozen=("*.layers.0.*", "layers.1.mlp", "norm"))
    (unit,) = result.units
    assert (unit.name, unit.numel) == ("model.layers.1", sum(ATTENTION.values()))


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("model.layers.1.*", "model.layers.1.mlp.up_proj.weight", True),
        ("model.layers.1.*", "model.layers.11.mlp.up_proj.weight", False),
        ("layers.1", "model.layers.1.mlp.up_proj.weight", True),
        ("layers.1", "model.layers.11.mlp.up_proj.weight", False),
        ("layers.1", "layers.1", True),
        ("self_attn.q_proj", "model.layers.1.self_attn.q_proj.weight", True),
        ("*.LayerNorm.*", "bert.embeddings.LayerNorm.weight", True),
        ("*.layernorm.*", "bert.embeddings.LayerNorm.weight", False),
        ("norm", "bert.embeddings.LayerNorm.weight", True),
        ("norm", "model.layers.0.input_layernorm.weight", True),
        ("embed", "model.embed_tokens.weight", True),
        ("1", "model.layers.1.mlp.up_proj.weight", True),
        ("1", "model.layers.11.mlp.up_proj.weight", False),
        ("layers.[01].mlp", "model.layers.0.mlp.up_proj.weight", False),
        ("*layers.[01].mlp*", "model.layers.0.mlp.up_proj.weight", True),
        ("", "model.norm.weight", False),
    ],
)
def test_pattern_rules(pattern, name, expected):
    assert matches(pattern, name) == expected


words = st.text("abAB_", min_size=1, max_size=4)
paths = st.lists(words | st.integers(0, 12).map(str), min_size=1, max_size=5)


@settings(deadline=None)  # other processes share the cores
@given(paths, st.data())
def test_any_part_of_a_name_matches_it(parts, data):
    name = ".".join(parts)
    start = data.draw(st.integers(0, len(parts) - 1))
    stop = data.draw(st.integers(start + 1, len(parts)))
    assert matches(".".join(parts[start:stop]), name)
    assert matches("*" + ".".join(parts[start:]), name)


# Any model


@st.composite
def modules(draw):
    """Random trees of modules: repeated lists, bare parameters of one to four dimensions, shared modules."""

    def leaf() -> nn.Module:
        choice = draw(st.integers(0, 4))
        if choice == 0:
            return nn.LayerNorm(2)
        if choice == 1:
            return nn.Embedding(3, 2)
        if choice == 2:
            module = nn.Module()
            shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
            module.register_parameter(
                draw(st.sampled_from(["w", "weight", "gate_bias"])), nn.Parameter(torch.ones(shape))
            )
            return module
        return nn.Linear(2, 3)

    def tree(depth: int) -> nn.Module:
        if depth == 0:
            return leaf()
        if draw(st.booleans()):
            return nn.ModuleList(tree(depth - 1) for _ in range(draw(st.integers(1, 3))))
        names = draw(st.lists(st.sampled_from(["attn", "mlp", "layers", "h", "norm", "head"]), min_size=1, unique=True))
        return nn.ModuleDict({name: tree(depth - 1) for name in names})

    model = nn.ModuleDict({"body": tree(3), "layers": nn.ModuleList(tree(1) for _ in range(2)), "out": nn.Linear(2, 2)})
    if draw(st.booleans()):
        model["tied"] = model["out"]
    return model


@settings(deadline=None)  # other processes share the cores
@given(modules(), st.sampled_from(CHOICES["granularity"]), st.booleans(), st.booleans())
def test_any_model_is_divided_without_remainder(model, granularity, outside, tied):
    result = partition(
        model, granularity, include_outside=True, always_train=("tied",) if "tied" in model and tied else ()
    )
    assert_every_parameter_has_one_place(model, result)
    assert result.inferred and result.describe()
    try:
        inside = partition(model, granularity)
    except ValueError as error:
        assert "repeated layers" in str(error)
    else:
        assert_every_parameter_has_one_place(model, inside)
        assert all(unit.layer is not None for unit in inside.units)


# Errors and texts


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"granularity": "tensor"}, r"unknown granularity 'tensor'.*module, block, layer"),
        ("llama", {"always_train": ("lm_haed",)}, r"always_train: .*'lm_haed' matches no parameter.*Close: lm_head"),
        (
            "llama",
            {"frozen": ("model.layers.7.*",)},
            r"frozen: .*'model.layers.7.\*' matches no.*Kinds.*embedding.*norm",
        ),
        ("llama", {"frozen": ("",)}, r"frozen: the pattern '' matches no"),
        ("llama", {"always_train": ("norm",), "frozen": ("layers.0",)}, r"both claim 2 .*layers\.0\.input_layernorm"),
        ("gemma2", {"always_train": ("head",), "frozen": ("embed_tokens",)}, r"both claim 1 .*embed_tokens"),
        ("llama", {"frozen": ("attention", "mlp")}, r"nothing is left to be sampled.*model\.layers"),
        ("llama", {"family": "lama"}, r"unknown family 'lama'.*gpt2.*Did you mean 'llama'"),
        ("llama", {"family": "gpt2"}, r"'gpt2' does not fit.*h\.<n>\.attn\.c_attn\.weight.*model\.embed_tokens"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(models, name, options, message):
    with pytest.raises(ValueError, match=message):
        partition(models[name], **options)


def test_a_model_without_repeated_layers_is_refused_unless_its_matrices_are_asked_for():
    model = nn.ModuleDict({"first": nn.Linear(4, 8), "second": nn.Linear(8, 2)})
    with pytest.raises(ValueError, match=r"no repeated layers in ModuleDict.*include_outside=True"):
        partition(model)
    result = partition(model, include_outside=True)
    assert [unit.name for unit in result.units] == ["first.weight", "second.weight"]
    assert result.container is None and "no repeated layers" in result.describe()


def test_the_description_gives_counts_and_shares(models):
    text = partition(models["mixtral"], always_train=("lm_head",)).describe()
    assert text.splitlines()[:6] == [
        "family: mixtral; granularity: module; 14 units in 2 layers (model.layers)",
        "parameters: 47,520, of which 43,264 (91.0%) in units",
        "always trained: 2,048 (4.3%)",
        "  lm_head.weight",
        "frozen: 2,208 (4.6%)",
        "  model.embed_tokens.weight",
    ]
    assert "  model.layers.*.input_layernorm.weight (2)" in text
    assert "experts_gate_up               2                       12,288         51.7%" in text
