"""Parameters that the model's checkpoint did not hold are always trained, and said so."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from misa_engine import MISA
from models import TINY

HEAD = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Any = tmp_path_factory.mktemp("encoder")
    TINY["bert"]().save_pretrained(place)  # type: ignore[operator]
    return place


def classifier(place: Path) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(place, num_labels=3).train()


def test_a_new_classifier_trains_in_every_step_and_is_named(encoder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = classifier(encoder)
    with caplog.at_level(logging.WARNING, "misa_engine"):
        optimizer = MISA(model, lr=1e-2, delta=0.3, inner_steps=2)
    assert optimizer.partition.new == optimizer.partition.always == HEAD
    (line,) = [record.getMessage() for record in caplog.records if "new and untrained" in record.getMessage()]
    assert "bert.pooler.dense.weight" in line and "trained in every step" in line
    assert "trained in every step" in optimizer.partition.describe()
    ids = torch.randint(2, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        before = {name: model.get_parameter(name).clone() for name in HEAD}
        model(input_ids=ids, labels=torch.tensor([0, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(not torch.equal(model.get_parameter(name), before[name]) for name in HEAD)


def test_frozen_takes_new_parameters_out_and_a_state_goes_on_with_them(encoder: Path) -> None:
    assert MISA(classifier(encoder), delta=0.3, frozen=["classifier", "pooler"]).partition.always == ()
    first = MISA(classifier(encoder), delta=0.3)
    again = MISA(classifier(encoder), delta=0.3)
    again.load_state_dict(first.state_dict())
    assert again.active == first.active


def test_a_whole_checkpoint_and_a_model_of_its_own_have_nothing_new(encoder: Path) -> None:
    from transformers import AutoModelForMaskedLM

    whole = AutoModelForMaskedLM.from_pretrained(encoder)
    for model in (whole, TINY["bert"](), TINY["llama"](tie_word_embeddings=True)):
        optimizer = MISA(model, delta=0.3)
        assert optimizer.partition.new == optimizer.partition.always == ()


def test_a_resized_head_is_new(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = TINY["llama"]()
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(70)
    assert "lm_head.weight" in MISA(model, delta=0.3).partition.new
