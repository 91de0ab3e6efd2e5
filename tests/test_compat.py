import logging

import pytest

from misa_engine.planner import versions
from misa_engine.planner.plan import plan
from misa_engine.trainer import compat, completeness
from models import TINY


def same_model(folder, model) -> bool:
    return compat.check_same_model(folder, completeness.stored_shapes(folder), model)


# ---- tensors ----


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "qwen3_moe", "gpt_neox", "gpt2", "bert"])
def test_the_same_model_is_recognised_whatever_names_transformers_saves_it_under(tmp_path, family):
    model = TINY[family]()
    model.save_pretrained(tmp_path)
    renamed = same_model(tmp_path, model)
    assert renamed == (family in ("mixtral", "qwen3_moe", "gpt_neox"))


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(tmp_path):
    TINY["llama"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another model.*down_proj.weight is \[32, 48\] there and \[32, 64\] here"):
        same_model(tmp_path, TINY["llama"](intermediate_size=64))
    with pytest.raises(ValueError, match=r"layers.2.*is not in the checkpoint"):
        same_model(tmp_path, TINY["llama"](num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"layers.1.*is not in this model"):
        same_model(tmp_path, TINY["llama"](num_hidden_layers=1))
    with pytest.raises(ValueError, match="another model"):
        same_model(tmp_path, TINY["gpt2"]())


# ---- options ----


@pytest.mark.parametrize(
    ("kwargs", "reentrant"),
    [
        ({"use_reentrant": True}, True),
        ('{"use_reentrant": true}', True),
        ("use_reentrant=True", True),
        ({"use_reentrant": False}, False),
        ('{"use_reentrant": false}', False),
        ({}, False),
        (None, False),
    ],
)
def test_reentrant_checkpointing_is_seen_however_it_is_written(kwargs, reentrant):
    assert compat.asks_reentrant(kwargs) is reentrant


def test_the_name_of_checkpointing_follows_the_arguments_at_hand():
    assert compat.checkpointing_option({"gradient_checkpointing"}) == "gradient_checkpointing"
    assert compat.checkpointing_option({"activation_checkpointing", "bf16"}) == "activation_checkpointing"


# ---- versions ----


def test_other_versions_than_the_formulas_describe_are_named_once(monkeypatch, caplog):
    monkeypatch.setattr(versions, "installed_versions", lambda: dict(versions.DESCRIBED))
    assert versions.other_versions() is None
    for same in ("5.23.0", "5.23", "5.23.7"):
        monkeypatch.setattr(versions, "installed_versions", lambda same=same: {"transformers": same})
        assert versions.other_versions() is None
    monkeypatch.setattr(versions, "installed_versions", lambda: {"transformers": "5.230.1", "trl": "1.15.0"})
    note = versions.other_versions()
    assert "transformers 5.230.1 (described: 5.23), trl 1.15.0 (described: 1.16)" in note
    model = TINY["llama"]()
    assert note in plan(model.config, delta=0.3).notes
    compat.warn_of_versions.cache_clear()
    with caplog.at_level(logging.WARNING):
        compat.warn_of_versions()
        compat.warn_of_versions()
    assert [record.message for record in caplog.records] == [note]
    compat.warn_of_versions.cache_clear()


def test_a_plan_refuses_single_options_beside_a_config():
    from misa_engine import MisaConfig

    with pytest.raises(ValueError, match="got a MisaConfig and also delta, eta"):
        plan(TINY["llama"]().config, misa=MisaConfig(), delta=0.3, eta=2.0)
