"""Below the lowest active unit nothing is stored and nothing computed twice, whichever way training is started.

Forward passes are counted in each layer's attention, and bytes that autograd holds when the backward pass begins are
counted per layer, for every micro-batch of runs whose lowest active layer moves.
"""

from __future__ import annotations

import json
import logging
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import ByT5Tokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from command import make_workplace, words
from misa_engine.cli import loading
from misa_engine.cli.main import main
from misa_engine.trainer import MisaFactory, MisaTrainer
from models import TINY

LAYERS, HIDDEN, HEADS, KEY_VALUE, WIDE, LENGTH = 5, 32, 4, 16, 48, 24
MISA: dict[str, Any] = {"delta": 0.05, "inner_steps": 1, "cold_start": "none", "rule": "uniform"}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    for name in ("transformers", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


@dataclass
class MicroBatch:
    """What one forward and backward pass did."""

    active: set[str]
    """Names of the parameters that require gradients."""
    stored: list[int]
    """Bytes that each layer has stored when the backward pass begins; with checkpointing its input is one of them."""
    tokens: int
    forwards: list[int]

    @property
    def lowest(self) -> int:
        return min(int(re.search(r"layers\.(\d+)\.", name).group(1)) for name in self.active)


class _Held:
    """Stands for a stored tensor; lives as long as autograd wants it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class Watch:
    """Counts on ``model``; enter it around the training. Storage is what ``saved_tensors_hooks`` see and still hold."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch):
        self.model, self.seen = model, []
        self._held: list[tuple[int, weakref.ref[_Held]]] = []
        self._place, self._tokens, self._forwards = -1, 0, [0] * LAYERS
        model.model.embed_tokens.register_forward_hook(self._begin)
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.register_forward_pre_hook(lambda *_, index=index: self._count(index))
            # what is stored between the ends of two layers belongs to the second: its checkpointed input too
            layer.register_forward_hook(lambda *_, index=index: self._move(index + 1))
        self._shared = set()
        model.model.rotary_emb.register_forward_hook(self._share)
        backward = Accelerator.backward

        def watched(accelerator: Accelerator, loss: Tensor, **kwargs: Any) -> None:
            active = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            stored = self._stored()
            backward(accelerator, loss, **kwargs)
            self.seen.append(MicroBatch(active, stored, self._tokens, list(self._forwards)))

        monkeypatch.setattr(Accelerator, "backward", watched)

    def __enter__(self) -> Watch:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self._hooks.__exit__(*args)

    def _begin(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._place, self._tokens, self._forwards, self._held = 0, args[0].numel(), [0] * LAYERS, []

    def _share(self, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        self._shared = {tensor.untyped_storage().data_ptr() for tensor in output}  # cos and sin, one for all layers

    def _count(self, index: int) -> None:
        self._forwards[index] += 1

    def _move(self, index: int) -> None:
        self._place = index

    def _pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        self._held.append((self._place, weakref.ref(held)))
        return held

    def _stored(self) -> list[int]:
        known = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()} | self._shared
        stored = [0] * LAYERS
        for place, reference in self._held:
            held = reference()
            if held is None or not 0 <= place < LAYERS:
                continue
            storage = held.tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                stored[place] += storage.nbytes()
        return stored


def build_model() -> nn.Module:
    sizes = {"num_hidden_layers": LAYERS, "vocab_size": 384, "max_position_embeddings": 128}
    return TINY["llama"](**sizes).bfloat16()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    place, cache = tmp_path_factory.mktemp("stops"), tmp_path_factory.mktemp("cache")
    make_workplace(place, cache, torch.bfloat16, num_hidden_layers=LAYERS)
    record = json.dumps({"prompt": "eight by", "completion": "te, then sixteen"}) + "\n"
    (place / "data.jsonl").write_text(24 * record)  # one length: padding needs a mask, which turns flash attention off
    return place


@pytest.fixture
def run(tmp_path, workplace, monkeypatch) -> Callable[..., list[MicroBatch]]:
    """Train by one of the public ways and return what each micro-batch did."""

    def start(way: str, checkpointing: bool) -> list[MicroBatch]:
        common = {"max_steps": 10, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        common |= {"use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
        common |= {"learning_rate": 1e-3, "gradient_checkpointing": checkpointing}
        ids = torch.randint(3, 384, (48, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        factory = (MisaFactory, {**MISA, "lr": 1e-3})
        if way == "misa train":
            watch: list[Watch] = []
            load = loading.load_model

            def load_model(*args: Any, **kwargs: Any) -> nn.Module:
                watch.append(Watch(load(*args, **kwargs), monkeypatch))
                watch[0].__enter__()
                return watch[0].model

            monkeypatch.setattr(loading, "load_model", load_model)
            options = {**MISA, **common, "gradient_checkpointing": str(checkpointing).lower()}
            del options["use_cpu"], options["disable_tqdm"]
            assert main(words(workplace, tmp_path / "out", use_cpu="true", **options)) == 0
            watch[0].__exit__(None, None, None)
            return watch[0].seen
        model = build_model()
        if way == "Trainer":
            args = TrainingArguments(str(tmp_path), **common)
            training = Trainer(model, args=args, train_dataset=data, optimizer_cls_and_kwargs=factory)
        else:
            args = SFTConfig(str(tmp_path), bf16=False, **common)
            own = {"misa": MISA} if way == "MisaTrainer" else {"optimizer_cls_and_kwargs": factory}
            make = MisaTrainer if way == "MisaTrainer" else SFTTrainer
            training = make(model, args=args, train_dataset=data, processing_class=ByT5Tokenizer(), **own)
        with Watch(model, monkeypatch) as watching:
            training.train()
        return watching.seen

    return start


def frozen_layer(active: set[str], index: int) -> int:
    """Bytes a token that a bf16 layer above the lowest active one stores, with SDPA's flash attention and no padding.

    What the backward pass of each operation needs: two fp32 upcasts in the norms (8 h) and their two fp32 scales (8),
    q and the attention's output (4 h), k and v (4 kv), its log-sum-exp (4 a head), gate, silu(gate) and up (6 i); and
    the inputs of active matrices that are not among those.
    """
    whole = 12 * HIDDEN + 4 * KEY_VALUE + 6 * WIDE + 4 * HEADS + 8
    trained = {name.split(".")[-2] for name in active if f"layers.{index}." in name}
    inputs = {"q_proj": "norm 1", "k_proj": "norm 1", "v_proj": "norm 1", "gate_proj": "norm 2", "up_proj": "norm 2"}
    whole += 2 * HIDDEN * len({inputs[name] for name in trained if name in inputs})
    return whole + (2 * WIDE if "down_proj" in trained else 0)  # o_proj's input is stored by the attention


@pytest.mark.parametrize("way", ["Trainer", "SFTTrainer", "MisaTrainer", "misa train"])
def test_nothing_is_stored_below_the_lowest_active_layer_and_only_what_is_needed_above(way, run):
    seen = run(way, checkpointing=False)
    assert len({micro.lowest for micro in seen}) > 2, "the lowest active layer moves"
    for micro in seen:
        assert micro.forwards == [1] * LAYERS
        for index, stored in enumerate(micro.stored):
            expected = micro.tokens * frozen_layer(micro.active, index)
            if index < micro.lowest:
                assert stored == 0
            elif index > micro.lowest:
                assert stored == expected, (index, micro)
            else:  # the part of the layer above its own lowest matrix
                assert 0 < stored < expected


@pytest.mark.parametrize("way", ["Trainer", "SFTTrainer", "MisaTrainer", "misa train"])
def test_with_checkpointing_layers_below_the_lowest_active_one_run_once_and_store_nothing(way, run):
    seen = run(way, checkpointing=True)
    assert len({micro.lowest for micro in seen}) > 2
    for micro in seen:
        above = LAYERS - micro.lowest
        assert micro.forwards == [1] * micro.lowest + [2] * above
        # a checkpointed layer keeps its bf16 input, whether it is the lowest one or not
        assert micro.stored == [0] * micro.lowest + [2 * HIDDEN * micro.tokens] * above
