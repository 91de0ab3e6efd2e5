"""The plan's bytes against passes of the real models, at full size, on fake tensors."""

import itertools
import random

import pytest
import torch

from misa_engine import MisaConfig
from misa_engine.planner.activations import MicroBatch, liger_rows, peak
from misa_engine.planner.cards import published_config
from misa_engine.planner.plan import plan
from misa_engine.planner.probe import measure
from misa_engine.planner.worst_case import MetaModel, WorstCase, draws

#: What the product promises.
TOLERANCE = 0.03
SEVEN_TO_EIGHT = ("llama-3-8b", "llama-2-7b", "mistral-7b", "qwen2.5-7b")

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")


@pytest.fixture(scope="module")
def subjects():
    made = {}

    def get(name):
        if name not in made:
            made[name] = MetaModel(published_config(name))
        return made[name]

    return get


def drawn(meta, which, delta=0.03, micro_batch=None):
    """Parameter names of an active set by what it is called."""
    misa = MisaConfig(delta=delta)
    units = meta.partition(misa).units
    last = max(unit.layer for unit in units)
    if which == "worst":
        return WorstCase(meta, misa, micro_batch).peak(micro_batch)[1]
    if which == "middle":
        return [unit.name for unit in units if unit.layer == last // 2 and unit.kind in ("q", "up")]
    if which == "top":
        return [unit.name for unit in units if unit.layer == last and unit.kind in ("o", "gate")]
    order = random.Random(which).sample(units, len(units))
    budget, chosen = meta.partition(misa).total * delta, []
    for unit in order:
        if unit.numel <= budget:
            chosen.append(unit.name)
            budget -= unit.numel
    return chosen


def deviation(meta, names, micro_batch):
    layers, embedding, head = meta.places(names)
    predicted = peak(meta.shape, micro_batch, layers, embedding=embedding, head=head).total
    found = measure(
        meta.config,
        names,
        batch=micro_batch.batch,
        length=micro_batch.length,
        checkpointing=micro_batch.checkpointing,
        loss=micro_batch.loss,
        liger=micro_batch.liger,
        gemm_gradients=micro_batch.gemm_gradients,
        padded=micro_batch.padded,
    )
    return predicted / found.peak - 1


@pytest.mark.parametrize(
    ("name", "which", "micro_batch"),
    [
        ("llama-3-8b", "worst", MicroBatch(2, 2048, True, "chunked")),
        ("llama-3-8b", "worst", MicroBatch(1, 2048, False, "plain")),
        ("llama-2-7b", "worst", MicroBatch(1, 4096, True, "plain")),
        ("mistral-7b", "middle", MicroBatch(1, 512, False, "chunked")),
        ("qwen2.5-7b", "worst", MicroBatch(1, 8192, True, "chunked")),
        ("qwen2.5-7b", 1, MicroBatch(1, 2048, False, "chunked")),
        ("llama-3-8b", "top", MicroBatch(1, 2048, True, "plain")),
        ("qwen3-8b", 2, MicroBatch(1, 1024, True, "chunked")),
        ("tinyllama", 3, MicroBatch(4, 512, True, "chunked", gemm_gradients=False)),
    ],
    ids=str,
)
def test_the_predicted_peak_is_that_of_a_full_size_pass(subjects, name, which, micro_batch):
    meta = subjects(name)
    assert abs(deviation(meta, drawn(meta, which, micro_batch=micro_batch), micro_batch)) < TOLERANCE


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SEVEN_TO_EIGHT)
def test_every_combination_of_the_grid(subjects, name):
    meta, worst = subjects(name), {}
    grid = itertools.product((512, 2048, 8192), (True, False), ("chunked", "plain"), (True, False))
    for length, checkpointing, loss, gemm in grid:
        micro_batch = MicroBatch(1, length, checkpointing, loss, gemm_gradients=gemm)
        for which in ("worst", "middle", "top", 1, 2):
            worst[(micro_batch, which)] = deviation(meta, drawn(meta, which, micro_batch=micro_batch), micro_batch)
    beyond = {case: found for case, found in worst.items() if abs(found) >= TOLERANCE}
    print(name, len(worst), "cases, largest deviation", max(worst.values(), key=abs))
    assert not beyond


@pytest.mark.parametrize("always", [("norm",), ("embed_tokens",), ("lm_head",)], ids=str)
@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_is_always_trained_is_in_the_peak(subjects, always, checkpointing):
    meta = subjects("tinyllama")
    micro_batch = MicroBatch(1, 1024, checkpointing, "plain")
    misa = MisaConfig(delta=0.03, always_train=always)
    names = max(draws(meta, misa, micro_batch), key=len)
    assert abs(deviation(meta, names, micro_batch)) < TOLERANCE


def test_a_float32_model_is_measured_in_float32():
    config = published_config("tinyllama")
    config.num_hidden_layers = 4
    wide, narrow = (
        plan(config, misa=MisaConfig(delta=0.1), micro_batch=MicroBatch(1, 512, True, "plain"), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide.bytes["weights"] == pytest.approx(2 * narrow.bytes["weights"], rel=1e-6)
    assert wide.method == "fake tensors" and "residual_bits" not in wide.bytes
    passing = [
        sum(p.bytes.get(name, 0) for name in ("activations", "cross_entropy", "temporaries")) for p in (wide, narrow)
    ]
    assert 1 < passing[0] / passing[1] <= 2  # the same pass in twice as wide numbers; some are float32 in both


# ---- against the published fit table: largest micro-batches of a 24,564 MiB card ----

#: Model -> tokens with (checkpointing + fused loss, checkpointing + all logits, fused loss, all logits) for a frozen
#: draw, by hand from byte counts: float32 moments at 3%, 8-bit moments at 3%, float32 moments at 1%.
FIT = {
    "llama-3-8b": ((11.4, 3.0, 1.18, 0.90), (14.5, 3.8, 1.48, 1.13), (15.6, 4.1, 1.63, 1.24)),
    "qwen2.5-7b": ((14.0, 3.2, 1.38, 1.01), (16.9, 3.8, 1.67, 1.22), (18.0, 4.1, 1.78, 1.30)),
    "llama-2-7b": ((18.9, 12.8, 1.95, 1.82), (21.5, 14.6, 2.22, 2.07), (22.5, 15.3, 2.32, 2.17)),
    "mistral-7b": ((15.4, 11.0, 1.58, 1.48), (18.1, 13.0, 1.86, 1.74), (19.1, 13.7, 1.96, 1.84)),
}


@pytest.mark.parametrize("name", SEVEN_TO_EIGHT)
def test_the_plan_agrees_with_the_fit_by_hand(subjects, name):
    # 0% to 8% fewer tokens than the table, for two reasons. With checkpointing and a fused loss the table's slope is
    # that of a frozen layer with 2h + 4i bytes on top; where the MLP's product is differentiated, three gradients of
    # width i are alive, 2h + 6i (torch's profiler agrees: test_probe.py): 5% for Llama 3. And the plan is for the worst
    # draw, which keeps up to 4h bytes more in a recomputed layer and, without checkpointing, an input of q, k or v in
    # most layers: 2%. Never more than 2% above it, which is the rounding of the table's 3.0k.
    settings = (("float32", 0.03), ("int8", 0.03), ("float32", 0.01))
    for (state_dtype, delta), tokens in zip(settings, FIT[name], strict=True):
        passes = [
            MicroBatch(1, 1, True, "chunked"),
            MicroBatch(1, 1, True, "plain"),
            MicroBatch(1, 1, False, "chunked"),
        ]
        passes.append(MicroBatch(1, 1, False, "plain"))
        for micro_batch, thousands in zip(passes, tokens, strict=True):
            options = {"delta": delta, "state_dtype": state_dtype, "rest": "none"}
            found = plan(subjects(name), card="rtx4090", micro_batch=micro_batch, **options)
            assert 0.92 < found.max_tokens_per_micro_batch / (1000 * thousands) < 1.02, (
                micro_batch,
                state_dtype,
                delta,
            )


def test_ligers_chunks_follow_its_rule():
    # increase of vocabulary over hidden size, rounded up: 32 chunks for Llama 3; each a power of two of rows
    assert liger_rows(4096, 4096, 128256) == 128
    assert liger_rows(100, 4096, 128256) == 4
    assert liger_rows(3, 4096, 4096) == 3
