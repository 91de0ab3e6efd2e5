"""The models that the learning suite starts from: a small one that is trained here, or a directory of a real one.

A small base is a recipe: a Llama over bytes, trained by AdamW on the running Python's standard library. It is made once
in a folder of the user's, with the documentation that tasks are cut from, so that a matrix of runs over days and
several processes sees the same weights and the same text whatever is installed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from misa_engine.bench.cases import Case, Report, Row
from misa_engine.bench.presets import RECIPES
from misa_engine.bench.tasks import documentation_file
from misa_engine.bench.words import Bytes, Chat, Words
from misa_engine.bench.workload import batches, rows
from misa_engine.files import replacing


def weights_file(base: str, work: str) -> Path:
    """Where a recipe's weights are kept; other recipes of the same name have other files."""
    digest = hashlib.sha256(json.dumps(RECIPES[base], sort_keys=True).encode()).hexdigest()[:8]
    return Path(work) / f"base-{base}-{digest}.safetensors"


def new_model(base: str, seed: int = 0) -> Any:
    """A recipe's model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**RECIPES[base]["model"], bos_token_id=None, eos_token_id=1, pad_token_id=0, use_cache=False)
    return LlamaForCausalLM(config)


def load_base(base: str, work: str, dtype: torch.dtype) -> tuple[Any, Words]:
    """A base to fine-tune, and its words.

    Args:
        base: a recipe, or a model directory.
        work: the folder of recipes' weights.
        dtype: of the weights.
    """
    if base in RECIPES:
        model = new_model(base)
        load_model(model, weights_file(base, work))
        return model.to(dtype).train(), Bytes()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    model.config.use_cache = False
    return model.train(), Chat(Path(base))


def digest_of(model: Any) -> str:
    """Of a model's weights: two results compare only where it is the same."""
    found = hashlib.sha256()
    for parameter in model.parameters():  # sums are enough to tell models apart, and cheap
        found.update(repr((tuple(parameter.shape), float(parameter.detach().double().sum()))).encode())
    return found.hexdigest()[:12]


def cosine(step: int, steps: int, warm_up: float = 0.05) -> float:
    """Factor of the learning rate at ``step`` of ``steps`` (from 0): a rise over ``warm_up`` of them, then a cosine."""
    rise = max(1, round(warm_up * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@dataclass(frozen=True, kw_only=True)
class BaseCase(Case):
    """Make what all runs share: a recipe's weights and the documentation's text. What is there already stays."""

    kind: ClassVar[str] = "base"
    base: str
    work: str
    threads: int = 0

    def run(self, row: Row, report: Report) -> None:
        """Text first; then train and save."""
        if self.threads:
            torch.set_num_threads(self.threads)
        Path(self.work).mkdir(parents=True, exist_ok=True)
        documentation_file(Path(self.work))
        if self.base in RECIPES and not (target := weights_file(self.base, self.work)).exists():
            row["loss"] = self._train(target, row, report)

    def _train(self, target: Path, row: Row, report: Report) -> list[float]:
        recipe, model = RECIPES[self.base], new_model(self.base).train()
        stream = batches(rows("stdlib", recipe["length"])[0], recipe["batch"], torch.device("cpu"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["lr"], weight_decay=0.0, fused=True)
        losses: list[float] = []
        for step, ids in enumerate(islice(stream, recipe["steps"])):
            for group in optimizer.param_groups:
                group["lr"] = recipe["lr"] * cosine(step, recipe["steps"])
            loss: Tensor = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 50 == 0 or step + 1 == recipe["steps"]:
                row["loss"] = losses = [*losses, round(float(loss), 4)]
                report(row)
        with replacing(target) as part:  # two runs may make it at once
            save_model(model, str(part))
        return losses
