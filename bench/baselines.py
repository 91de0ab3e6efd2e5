"""Every method that can train the same model, behind one interface: ``build(name, model, loss, settings) -> Method``.

Each is the real package where one exists. A method that cannot run here raises ``Unavailable`` with the line that its
row shows; the others still run.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from misa_engine.bench.measure import installed
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]
Mark = Callable[[str], None]


class Unavailable(Exception):
    """The method cannot run here; the message is the status of its row."""


@dataclass(frozen=True)
class Settings:
    """What all methods share."""

    lr: float = 1e-5
    delta: float = 0.03
    """Share of the model that MISA and our uniform rule train at a time."""
    inner_steps: int = 50
    """Steps between two switches, for every method that switches."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm; None does not clip."""
    accumulation: int = 1
    """Micro-batches a step."""
    seed: int = 0
    lora_rank: int = 16
    misa: Mapping[str, Any] = field(default_factory=dict)
    """Further options of MisaConfig, for the methods that are MISA."""


@dataclass
class Method:
    """A model and what trains it."""

    name: str
    model: nn.Module
    """What trains: the model itself or an adapter's wrapper around it."""
    loss: Loss
    """Token ids (batch, length) -> mean loss."""
    optimizer: torch.optim.Optimizer
    settings: Settings
    optimizer_bytes: Callable[[], dict[str, int]]
    """Bytes beyond the model's weights by category, gradients included as held between backward and step."""
    clips_inside: bool = False
    """The optimizer clips in its own update."""
    switches: Callable[[], int] = lambda: 0
    """Switches so far."""

    @property
    def trainable_parameters(self) -> int:
        """Parameters that train now."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def step(self, micro_batches: Sequence[Tensor], mark: Mark = lambda phase: None) -> Tensor:
        """One optimizer step over the micro-batches.

        Args:
            micro_batches: token ids, each (batch, length).
            mark: called with the name of each phase when it begins: forward, backward, clip, step.

        Returns:
            The mean loss, detached, still on the device.
        """
        total = torch.zeros((), device=micro_batches[0].device)
        for ids in micro_batches:
            mark("forward")
            loss = self.loss(ids) / len(micro_batches)
            mark("backward")
            loss.backward()
            total += loss.detach()
        if self.settings.max_grad_norm is not None and not self.clips_inside:
            mark("clip")
            trained = [p for p in self.model.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(trained, self.settings.max_grad_norm)
        mark("step")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def forget_gradients(self) -> None:
        """Drop what an interrupted step left behind."""
        self.model.zero_grad(set_to_none=True)


# ---- accounts ----

#: State key of an optimizer -> category.
_CATEGORIES = {"exp_avg": "first_moment", "state1": "first_moment", "exp_avg_sq": "second_moment"}
_CATEGORIES |= {"state2": "second_moment", "master": "master_weights"}


def state_bytes(model: nn.Module, state: Mapping[Any, Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of a torch optimizer's state by category, and of the gradients that its model holds at a step."""
    totals: dict[str, int] = defaultdict(int)
    totals["gradients"] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    seen: set[int] = set()  # bitsandbytes shares one quantisation map among all states
    for entries in state.values():
        for key, value in entries.items():
            if isinstance(value, Tensor) and id(value) not in seen:
                seen.add(id(value))
                totals[_CATEGORIES.get(key, "scales_and_tables")] += value.nbytes
    return dict(totals)


def _ordinary(
    name: str, model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, settings: Settings, trained: nn.Module
) -> Method:
    account = lambda: state_bytes(trained, optimizer.state)  # noqa: E731  (one expression, used once)
    return Method(name, trained, loss, optimizer, settings, account)


# ---- all parameters ----


def _adamw(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, fused=True)
    return _ordinary("adamw", model, loss, optimizer, settings, model)


def _adamw8bit(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    import bitsandbytes

    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters(), lr=settings.lr)
    return _ordinary("adamw8bit", model, loss, optimizer, settings, model)


# ---- adapters ----


def _lora(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    from peft import LoraConfig, get_peft_model

    rank = settings.lora_rank
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)  # changes ``model`` in place, so the loss goes through the adapters
    adapters = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=settings.lr, fused=True)
    return _ordinary("lora", model, loss, optimizer, settings, wrapped)


# ---- blocks of layers ----


def _badam(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    import logging
    import os

    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):  # it prints whenever it switches
        from badam import BlockOptimizer

        base = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
        optimizer = BlockOptimizer(
            base_optimizer=base,
            named_parameters_list=list(model.named_parameters()),
            switch_block_every=settings.inner_steps,
            switch_mode="random",
            verbose=0,
        )
    logging.getLogger("badam.block_optim").setLevel(logging.WARNING)

    def account() -> dict[str, int]:
        totals = state_bytes(model, base.state)
        masters = list(optimizer.param_idx2hp.values())
        totals["master_weights"] = sum(p.nbytes for p in masters)
        totals["gradients"] += sum(p.nbytes for p in masters)  # it makes an fp32 copy of each gradient before the step
        return totals

    return Method(
        "badam", model, loss, optimizer, settings, account,
        switches=lambda: optimizer.global_step // settings.inner_steps,
    )  # fmt: skip


# ---- our own ----


def _misa(name: str, **own: Any) -> Callable[[nn.Module, Loss, Settings], Method]:
    """MISA, or one of our rules that stands for another method: MisaConfig with ``own`` options."""

    def build_misa(model: nn.Module, loss: Loss, settings: Settings) -> Method:
        from misa_engine import MISA, MisaConfig

        options = {
            "lr": settings.lr,
            "delta": settings.delta,
            "inner_steps": settings.inner_steps,
            "max_grad_norm": settings.max_grad_norm,
            "seed": settings.seed,
            "cold_start": "none",  # its one-step rounds are the beginning of a run, not what a run costs
            **own,
            **settings.misa,
        }
        try:
            config = MisaConfig.from_dict(options)
        except ValueError as error:
            raise Unavailable(f"unsupported: {error}") from error
        if config.update_in == "backward" and settings.accumulation > 1:
            raise Unavailable("unsupported: update_in='backward' updates at each micro-batch; use accumulation 1")
        optimizer = MISA(model, config)

        def account() -> dict[str, int]:
            return {key: value for key, value in optimizer.memory().items() if key != "weights"}

        return Method(
            name, model, loss, optimizer, settings, account,
            clips_inside=True, switches=lambda: optimizer.round,
        )  # fmt: skip

    return build_misa


def _lisa(model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """LISA (arXiv 2403.17919): two layers drawn uniformly, embeddings and head always trained."""
    from misa_engine.partition import partition

    outer = [getattr(model, f"get_{place}_embeddings")() for place in ("input", "output")]
    weights = {id(module.weight) for module in outer if module is not None}
    always = tuple(name for name, parameter in model.named_parameters() if id(parameter) in weights)
    parts = partition(model, "layer", always_train=always)
    two_layers = sum(sorted(unit.numel for unit in parts.units)[-2:])
    delta = min(1.0, (two_layers + 1) / parts.total)
    own = {"granularity": "layer", "rule": "uniform", "always_train": always}
    return _misa("lisa", **own)(model, loss, replace(settings, delta=delta))


# ---- registry ----


@dataclass(frozen=True)
class Baseline:
    """A row of BASELINES."""

    build: Callable[[nn.Module, Loss, Settings], Method]
    summary: str
    needs: tuple[tuple[str, str], ...] = ()
    """(module, what pip installs) of each package that it needs."""

    def missing(self) -> str | None:
        """The status of a row whose packages are not here; None when all are."""
        absent = [package for module, package in self.needs if not installed(module)]
        return f"missing: pip install {' '.join(absent)}" if absent else None


BASELINES: dict[str, Baseline] = {
    "misa": Baseline(_misa("misa"), "MISA, fp32 moments"),
    "misa-int8": Baseline(_misa("misa-int8", state_dtype="int8"), "MISA, 8-bit moments"),
    "misa-backward": Baseline(_misa("misa-backward", update_in="backward"), "MISA, update inside the backward pass"),
    "uniform": Baseline(_misa("uniform", rule="uniform"), "MISA's engine, uniform draws"),
    "lisa": Baseline(_lisa, "LISA: two layers, embeddings and head (our engine)"),
    "adamw": Baseline(_adamw, "AdamW, all parameters, torch fused, states in the weights' dtype"),
    "adamw8bit": Baseline(
        _adamw8bit, "AdamW, all parameters, 8-bit states (bitsandbytes)", (("bitsandbytes", "bitsandbytes"),)
    ),
    "lora": Baseline(_lora, "LoRA on all linear layers (peft), AdamW", (("peft", "peft"),)),
    "badam": Baseline(_badam, "BAdam: one layer at a time, fp32 copies (badam)", (("badam", "badam"),)),
}


def build(name: str, model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """Make ``name`` train ``model``.

    Args:
        name: a key of BASELINES.
        model: all parameters trainable, on the final device.
        loss: token ids (batch, length) -> mean loss of ``model``.
        settings: shared by all methods.

    Raises:
        Unavailable: a package is missing, or the combination is not supported; the message is a row's status.
        ValueError: the name is unknown.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown method {name!r}: choose among {', '.join(BASELINES)}")
    status = BASELINES[name].missing()
    if status is not None:
        raise Unavailable(status)
    return BASELINES[name].build(model, loss, settings)
