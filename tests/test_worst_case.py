"""The worst draw that the search finds, against all draws of small models and against bounds of large ones."""

import itertools
import random

import pytest
from transformers import LlamaConfig, MixtralConfig, Qwen3Config

from misa_engine import MisaConfig, plan
from misa_engine.method.partition import check_budget
from misa_engine.planner import probe
from misa_engine.planner.activations import LOSSES, MicroBatch, peak
from misa_engine.planner.cards import published_config
from misa_engine.planner.plan import most_that_fits
from misa_engine.planner.probe import measure
from misa_engine.planner.worst_case import MetaModel, WorstCase

TOLERANCE = 0.03

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")


# ---- small models: every draw ----


def exhaustive_peak(meta: MetaModel, misa: MisaConfig, micro_batch: MicroBatch) -> int:
    """The largest total over all sets of units within the budget."""
    parts = meta.partition(misa)
    best = 0

    def walk(index: int, left: int, names: tuple[str, ...]) -> None:
        nonlocal best
        if index < len(parts.units):
            walk(index + 1, left, names)
            unit = parts.units[index]
            if unit.numel <= left:
                walk(index + 1, left - unit.numel, (*names, *unit.params))
        elif names:
            layers, embedding, head = meta.places((*names, *parts.always))
            best = max(best, peak(meta.shape, micro_batch, layers, embedding=embedding, head=head).total)

    walk(0, check_budget(parts, misa.delta), ())
    return best


def small_case(seed: int) -> tuple[MetaModel, MisaConfig, MicroBatch]:
    """A random two-layer model, options and micro-batch: at most 2^16 draws."""
    pick = random.Random(seed)
    hidden, heads = pick.choice((32, 64, 128)), pick.choice((2, 4))
    kind = pick.choice((LlamaConfig, Qwen3Config))
    config = kind(
        hidden_size=hidden,
        intermediate_size=int(hidden * pick.choice((0.75, 1.5, 2.7, 3.5, 5))),
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=pick.choice((1, 2)),
        vocab_size=pick.choice((64, 300, 2000)),
        tie_word_embeddings=pick.random() < 0.4,
        **({"head_dim": hidden // heads} if kind is Qwen3Config else {}),
    )
    meta = MetaModel(config)
    options = {"granularity": pick.choice(("module", "module", "block", "layer"))}
    if pick.random() < 0.4:
        options["include_outside"] = True
    else:
        options["always_train"] = pick.choice(((), (), ("norm",), ("embed_tokens",), ("lm_head",)))
    parts = meta.partition(MisaConfig(**options))
    smallest = max(unit.numel for unit in parts.units) / parts.total
    options["delta"] = min(1.0, smallest * pick.choice((1.01, 1.3, 2)))
    micro_batch = MicroBatch(
        batch=pick.choice((1, 3)),
        length=pick.choice((16, 128, 600)),
        checkpointing=pick.random() < 0.5,
        loss=pick.choice(LOSSES),
        liger=pick.random() < 0.5,
        gemm_gradients=pick.random() < 0.7,
        padded=pick.random() < 0.3,
    )
    return meta, MisaConfig(**options, rest="none"), micro_batch


@pytest.mark.parametrize("seeds", [range(16), pytest.param(range(16, 400), marks=pytest.mark.exhaustive)], ids=str)
def test_the_search_comes_within_two_percent_of_all_draws_of_a_small_model(seeds):
    """Of 382 such cases 375 were exact; the others, all without checkpointing, fell short by up to 1.2%."""
    for seed in seeds:
        meta, misa, micro_batch = small_case(seed)
        found, best = (
            WorstCase(meta, misa, micro_batch).peak(micro_batch)[0].total,
            exhaustive_peak(meta, misa, micro_batch),
        )
        assert 0.98 * best <= found <= best, (seed, found / best, misa, micro_batch)


# ---- published models ----


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("granularity", ["module", "block", "layer"])
def test_no_random_draw_needs_more_than_the_worst_one(granularity, checkpointing):
    meta = MetaModel(published_config("llama-3-8b"))
    misa = MisaConfig(delta=0.03 if granularity != "layer" else 0.06, granularity=granularity)
    micro_batch = MicroBatch(1, 2048, checkpointing, "chunked")
    limit = WorstCase(meta, misa, micro_batch).peak(micro_batch)[0].total
    units = meta.partition(misa).units
    generator = random.Random(0)
    for _ in range(200):
        budget, chosen = meta.partition(misa).total * misa.delta, []
        for unit in generator.sample(units, len(units)):
            if unit.numel <= budget:
                chosen += unit.params
                budget -= unit.numel
        layers, embedding, head = meta.places(chosen)
        assert peak(meta.shape, micro_batch, layers, embedding=embedding, head=head).total <= limit


def test_a_family_without_formulas_is_measured_and_scaled():
    # Gemma 2: other norms, sliding windows in every second layer, eager attention
    config = published_config("gemma-2-9b")
    config.num_hidden_layers, config.layer_types = 8, config.layer_types[:8]
    meta = MetaModel(config)
    assert meta.shape is None
    micro_batch = MicroBatch(1, 1024, True, "plain")
    estimate, names = WorstCase(meta, MisaConfig(delta=0.05), micro_batch).peak(micro_batch)
    found = measure(meta.config, names, batch=1, length=1024, checkpointing=True, loss="plain")
    assert abs(estimate.total / found.peak - 1) < TOLERANCE


def small_mixtral(**fields) -> MixtralConfig:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralConfig(**sizes, vocab_size=1000, num_hidden_layers=8, num_local_experts=4, **fields)


def test_a_mixture_of_experts_is_planned_with_five_passes_and_none_is_run_twice(monkeypatch):
    passes = []

    def counted(config, names, **options):
        passes.append((config.num_hidden_layers, options["batch"], options["length"]))
        return measure(config, names, **options)

    monkeypatch.setattr(probe, "measure", counted)
    meta = MetaModel(small_mixtral())
    first = plan(meta, card="8GiB", delta=0.2, micro_batch=MicroBatch(1, 1024))
    assert first.method == "fake tensors" and len(passes) == len(set(passes)) == 5
    plan(meta, card="8GiB", delta=0.2, state_dtype="int8", micro_batch=MicroBatch(1, 1024))
    assert len(passes) == 5  # the precision of moments does not change a pass


def test_eager_attention_is_never_taken_for_straight():
    """At short lengths its square hardly shows: a line through them would promise too much at long ones."""
    config = published_config("gemma-2-9b")
    config.num_hidden_layers, config.layer_types = 8, config.layer_types[:8]
    meta, misa = MetaModel(config), MisaConfig(delta=0.05)
    micro_batch = MicroBatch(1, 1024, True, "plain")
    worst = WorstCase(meta, misa, micro_batch)
    assert not worst.grows_with_tokens(micro_batch, (256, 512, 1024))
    room = worst.peak(MicroBatch(1, 6000, True, "plain"))[0].total
    assert abs(most_that_fits(worst, micro_batch, room, "length", 1 << 17) / 6000 - 1) < TOLERANCE


@pytest.mark.parametrize("fields", [{}, {"sliding_window": 256}], ids=["tokens only", "a mask of the length's square"])
def test_what_is_said_to_fit_a_family_without_formulas_is_what_a_pass_needs(fields):
    meta, misa = MetaModel(small_mixtral(**fields)), MisaConfig(delta=0.2)
    micro_batch = MicroBatch(1, 1024, True, "plain")
    worst = WorstCase(meta, misa, micro_batch)
    assert worst.grows_with_tokens(micro_batch, (256, 512, 1024)) == (not fields)
    for size in (MicroBatch(6, 1024, True, "plain"), MicroBatch(1, 3000, True, "plain")):
        what = "batch" if size.batch > 1 else "length"
        room = worst.peak(size)[0].total
        found, most = most_that_fits(worst, micro_batch, room, what, 1 << 17), getattr(size, what)
        assert abs(found / most - 1) < TOLERANCE or abs(found - most) <= 1


@pytest.mark.parametrize("delta", [0.01, 0.03])
@pytest.mark.parametrize("name", ["llama-3-8b", "llama-2-7b", "qwen2.5-7b"])
def test_the_worst_draw_is_that_of_an_exhaustive_search(name, delta):
    meta, misa = MetaModel(published_config(name)), MisaConfig(delta=delta)
    shape, parts = meta.shape, meta.partition(misa)
    size = {unit.kind: unit.numel for unit in parts.units}
    budget, top = int(delta * parts.total), shape.layers - 1

    def found(micro_batch):
        return WorstCase(meta, misa, micro_batch).peak(micro_batch)[0].total

    # Without checkpointing only counts matter: an input of q, k or v, one of gate or up, one of down.
    micro_batch, best = MicroBatch(1, 2048, False, "chunked"), 0
    for gates, downs in itertools.product(range(shape.layers + 1), repeat=2):
        keys = min(shape.layers, (budget - gates * size["gate"] - downs * size["down"]) // size["k"])
        if keys >= 1:
            active = {layer: {"k"} for layer in range(keys)}
            for number, kind in ((gates, "gate"), (downs, "down")):
                for layer in range(shape.layers - number, shape.layers):
                    active.setdefault(layer, set()).add(kind)
            best = max(best, peak(shape, micro_batch, active).total)
    assert found(micro_batch) >= 0.997 * best  # the greedy filling may leave a little of the budget: 0.12% seen

    # With checkpointing only the top layer's matrices matter, beside one at the bottom.
    micro_batch, best = MicroBatch(1, 2048, True, "chunked"), 0
    for number in range(8):
        for kinds in itertools.combinations(("q", "k", "v", "o", "gate", "up", "down"), number):
            if size["k"] + sum(size[kind] for kind in kinds) <= budget:
                best = max(best, peak(shape, micro_batch, {0: {"k"}, top: set(kinds)}).total)
    assert found(micro_batch) >= 0.997 * best
