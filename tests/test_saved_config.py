"""The configuration beside a trained model is that of the model that came in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command import make_workplace, words
from misa_engine.cli.main import main
from misa_engine.trainer.model_config import CHANGED, restored_config, training_fields
from models import TINY

pytestmark = pytest.mark.filterwarnings("ignore")


def read(place: Path) -> dict[str, object]:
    config = json.loads((place / "config.json").read_text())
    return {name: config.get(name) for name in CHANGED}


def test_model_and_checkpoints_keep_use_cache(tmp_path):
    place = make_workplace(tmp_path, tmp_path / "cache")
    more = {"gradient_checkpointing": "true", "save_strategy": "steps", "save_steps": 2}
    assert main(words(place, tmp_path / "out", **more)) == 0
    assert read(place / "model")["use_cache"] is True
    assert read(tmp_path / "out") == read(tmp_path / "out/checkpoint-2") == read(place / "model")


def test_fields_are_restored_inside_and_the_trainers_own_afterwards(tmp_path):
    model = TINY["mixtral"]()
    before = training_fields(model)
    assert before["", "use_cache"] is True and before["", "output_router_logits"] is False
    model.config.use_cache, model.config.output_router_logits = False, True
    with restored_config(model, before):
        model.save_pretrained(tmp_path)
    assert read(tmp_path) == {"use_cache": True, "output_router_logits": False}
    assert model.config.use_cache is False and model.config.output_router_logits is True


def test_the_name_of_a_model_has_no_fields():
    assert training_fields("some/model") == {} == training_fields(None)
