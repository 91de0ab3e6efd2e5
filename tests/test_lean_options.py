"""Which parts of the lean forward are chosen: by device, family, versions and the user's word."""

from __future__ import annotations

import importlib
import logging
import types

import pytest
import torch

from misa_engine.errors import UserError
from misa_engine.trainer import lean
from misa_engine.trainer.lean import lean_options


@pytest.fixture
def liger(monkeypatch):
    """A liger-kernel that knows llama only, and a way to take it out."""
    package = types.SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": None})
    monkeypatch.setattr(lean, "find_spec", lambda name: object())

    def load(name: str) -> object:
        return package if name.startswith("liger") else importlib.import_module(name)

    monkeypatch.setattr(lean, "importlib", types.SimpleNamespace(import_module=load))
    return monkeypatch


def test_liger_is_chosen_on_a_gpu_for_a_family_it_knows(liger):
    assert lean_options("llama", "cuda") == {"use_liger_kernel": True}
    assert lean_options("llama", torch.device("cuda", 1), wanted=True) == {"use_liger_kernel": True}
    assert lean_options("llama", "cuda", sft=False) == {"use_liger_kernel": True}
    assert lean_options("llama", "cuda", wanted=False) == {}
    assert lean_options("gpt2", "cuda") == {}
    assert lean_options("llama", "cpu") == {}


def test_before_trl_1_15_ligers_loss_replaces_the_chunked_one_unless_the_user_chose_that(liger):
    liger.setattr(lean, "fused_head_in_trl", lambda: False)
    assert lean_options("llama", "cuda") == {"use_liger_kernel": True, "loss_type": "nll"}
    assert lean_options("llama", "cuda", loss_type="dft") == {"use_liger_kernel": True, "loss_type": "dft"}
    assert lean_options("llama", "cuda", loss_type="chunked_nll") == {}
    assert lean_options("llama", "cuda", sft=False) == {"use_liger_kernel": True}
    with pytest.raises(UserError, match="excludes Liger"):
        lean_options("llama", "cuda", wanted=True, loss_type="chunked_nll")


def test_asking_for_liger_where_it_cannot_run_says_why(liger):
    with pytest.raises(UserError, match="need a GPU.*trains on cpu"):
        lean_options("llama", "cpu", wanted=True)
    with pytest.raises(UserError, match="no kernels for model type 'gpt2', only for llama"):
        lean_options("gpt2", "cuda", wanted=True)
    liger.setattr(lean, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed .pip install liger-kernel"):
        lean_options("llama", "cuda", wanted=True)
    assert lean_options("llama", "cuda") == {}


def test_a_liger_that_cannot_be_imported_is_a_warning_or_the_users_error(monkeypatch, caplog):
    def broken(name):
        raise ImportError("cannot import name 'LlamaFoo' from transformers")

    monkeypatch.setattr(lean, "find_spec", lambda name: object())
    monkeypatch.setattr(lean, "importlib", types.SimpleNamespace(import_module=broken))
    with caplog.at_level(logging.WARNING, "misa_engine.trainer.lean"):
        assert lean_options("llama", "cuda", sft=False) == {}
    assert "LlamaFoo" in caplog.text and "plain layers" in caplog.text
    with pytest.raises(UserError, match="LlamaFoo"):
        lean_options("llama", "cuda", sft=False, wanted=True)


def test_liger_lists_the_families_that_the_recipes_use():
    patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    assert {"llama", "mistral", "qwen2", "qwen3", "gemma2"} <= set(patch.MODEL_TYPE_TO_APPLY_LIGER_FN)
