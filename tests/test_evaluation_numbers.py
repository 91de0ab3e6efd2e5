"""The numbers of an evaluation: means, errors, pairs; batches that fit and shrink."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from evaluation_cases import scripted
from misa_engine.evaluation import batch_size
from misa_engine.evaluation.generation import answers
from misa_engine.evaluation.statistics import estimate, mcnemar, paired
from misa_engine.evaluation.task import room_for
from misa_engine.planner.activations import DecoderShape
from training import tiny

# ---- statistics ----


def test_means_and_errors_are_numpys():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    found = estimate(values)
    assert math.isclose(found.value, np.mean(values)) and found.n == 5
    assert math.isclose(found.stderr, np.std(values, ddof=1) / math.sqrt(5))
    assert estimate([3.0]).stderr is None
    assert math.isclose(estimate([1.0, 3.0], [3.0, 1.0]).value, 1.5)
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_a_weighted_error_is_that_of_the_ratio():
    """By drawing items again and again (bootstrap): the formula is its limit."""
    generator = np.random.default_rng(0)
    values, weights = generator.normal(size=400), generator.uniform(1, 5, size=400)
    draws = generator.integers(0, 400, size=(4000, 400))
    means = (values[draws] * weights[draws]).sum(1) / weights[draws].sum(1)
    assert math.isclose(estimate(values.tolist(), weights.tolist()).stderr, means.std(), rel_tol=0.05)


def test_paired_differences_cancel_what_both_find_hard():
    first, second = [1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1]
    found = paired(first, second)
    assert (found.wins, found.losses, found.p_value) == (1, 0, 1.0)
    assert math.isclose(found.difference, 1 / 6) and found.stderr < estimate(first).stderr
    assert paired([0.5, 0.2], [0.1, 0.4]).p_value is None
    with pytest.raises(ValueError, match="same items"):
        paired([1], [1, 0])


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (1, 8, 0.0390625), (3, 3, 1.0), (2000, 1000, 0.0)]
)
def test_mcnemars_exact_p(wins, losses, p):
    assert mcnemar(wins, losses) == mcnemar(losses, wins) == pytest.approx(p, abs=1e-9)


# ---- batches ----


@pytest.mark.parametrize(
    ("positions", "wanted", "room", "new"), [(512, 32, 480, 32), (128, 256, 64, 64), (1, 8, 1, 1), (None, 32, None, 32)]
)
def test_prompts_and_answers_stay_within_the_models_positions(positions, wanted, room, new):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=positions))
    found = room_for(config, wanted)
    assert found[1] == new and (found[0] == room if room else found[0] > 1 << 29)


def test_memory_that_ends_halves_the_batch_and_nothing_is_lost():
    subject = scripted("one", lambda prompt: prompt[-1])
    generate = subject.model.generate

    def small(input_ids, attention_mask, **options):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids, attention_mask, **options)

    subject.model.generate = small
    prompts = [subject.tokenizer("x" * n + str(n))["input_ids"] for n in range(9)]
    made = answers(subject, prompts, new_tokens=4, batch_size=8)
    assert dict(made) == {n: str(n) for n in range(9)}
    assert made.batch_size == 2 and max(subject.model.batches) == 2


def test_an_error_that_is_not_about_memory_is_raised():
    def boom(**options):
        raise RuntimeError("another bug")

    subject = scripted("one", str)
    subject.model.generate = boom
    with pytest.raises(RuntimeError, match="another bug"):
        list(answers(subject, [[4]], new_tokens=1, batch_size=4))


def test_the_planned_batch_fits_and_the_next_does_not(monkeypatch):
    model = tiny()
    shape = DecoderShape.of(model.config)
    used = {"length": 48, "beams": 4, "generates": True}
    for wanted in (1, 3, 7):
        need = batch_size.forward_bytes(shape, wanted, 48, beams=4, generates=True)
        monkeypatch.setattr(batch_size, "free_bytes", lambda device, need=need: 2 * need)  # float32 counts twice
        assert batch_size.batch_that_fits(model, **used) == wanted
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 1 << 60)
    assert batch_size.batch_that_fits(model, **used) == batch_size.MOST_ON_CPU
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 0)
    assert batch_size.batch_that_fits(model, **used) == 1


@pytest.mark.parametrize(("batch", "length"), [(1, 512), (8, 256)])
def test_a_forward_pass_takes_no_more_than_the_arithmetic_says(batch, length):
    """The probe's pass on fake tensors, at the size of SmolLM2-135M with 4 layers."""
    from transformers import LlamaConfig

    from misa_engine.planner.probe import LiveBytes, fake_model

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3,
    )  # fmt: skip
    mode, model = fake_model(config)
    with mode, torch.no_grad(), LiveBytes(list(model.parameters())) as live:
        ids = torch.ones(batch, length, dtype=torch.long)
        _ = model(input_ids=ids, use_cache=False)
    said = batch_size.forward_bytes(DecoderShape.of(config), batch, length)
    assert live.peak <= said <= 8 * live.peak
