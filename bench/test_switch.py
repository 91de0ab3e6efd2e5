"""Switch cost: units that leave are rounded and frozen, others come with cleared moments. Commands: test_kernels.py.

Ours is the whole switch of the real optimizer (accounts of the round with their one copy to the host, draw, rounding,
host copies, table, ``requires_grad``), on matrices of Llama-3-8B where there is a GPU. "clones" is what the published
code does instead: float32 clones of the weights that come, a new torch AdamW over them with new moments, and an emptied
cache. Units take turns (rule "cyclic"), so that every way moves the same ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from misa_engine import MISA, MisaConfig
from misa_engine.bench import traffic
from misa_engine.bench.unfused import UnfusedMISA
from misa_engine.engine.events import SwitchEvent

#: (hidden, intermediate, layers, heads) and the parameters that train at a time. "large" has 8 of the 32 layers of
#: Llama-3-8B, so that host copies of all moments fit an ordinary machine.
MODELS = {
    "tiny": ((64, 192, 2, 4), 40_000),
    "small": ((512, 1536, 8, 8), 4_000_000),
    "large": ((4096, 14336, 8, 32), 240_000_000),
}
OPTIONS: dict[str, Any] = dict(rule="cyclic", cold_start="none", inner_steps=10**6, max_grad_norm=1.0)

WAYS: dict[str, dict[str, Any]] = {
    "misa": {},
    "misa, int8 moments": {"state_dtype": "int8"},
    "misa, leave_rounding=keep": {"leave_rounding": "keep", "rest": "none"},
    "misa, revisit=offload": {"revisit": "offload"},
    "misa, both": {"revisit": "offload", "leave_rounding": "keep", "rest": "none"},
}


def build_model(shape: str, device: torch.device) -> tuple[nn.Module, float]:
    """A bfloat16 Llama with random weights, and the share of it that trains at a time."""
    (hidden, intermediate, layers, heads), active = MODELS[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 4, vocab_size=1024,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device=device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model, active / sum(parameter.numel() for parameter in model.parameters())


def one_step(optimizer: MISA | UnfusedMISA, model: nn.Module) -> None:
    """Give every active parameter a gradient, and use it."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()


def device_bytes(optimizer: MISA, event: SwitchEvent) -> float:
    """What a switch must move: cleared moments of those that come, rounding of those that leave, host copies."""
    numel = {unit.name: unit.numel for unit in optimizer.units}
    config, residual = optimizer.config, optimizer.arena.residual is not None
    rounded = residual and config.leave_rounding == "stochastic"
    came = sum(numel[name] for name in event.came) * traffic.enter(residual, config.state_dtype)
    left = sum(numel[name] for name in event.left) * (traffic.ROUND_STOCHASTIC if rounded else 0.0)
    return came + left + event.moved_bytes


@pytest.mark.parametrize("way", WAYS)
def test_switch(measure: Any, device: torch.device, shape: str, way: str) -> None:
    """The switch of the real optimizer. Host buffers exist, as after a first pass over all units."""
    model, delta = build_model(shape, device)
    optimizer = MISA(model, delta=delta, **OPTIONS, **WAYS[way])
    seen: set[str] = set()
    while len(seen) < len(optimizer.units):
        seen.update(optimizer.active)
        one_step(optimizer, model)
        optimizer.end_round()
    optimizer.events.clear()

    def mean(sizes: list[float]) -> float:
        return sum(sizes) / len(sizes)

    def moved() -> float:
        return mean([device_bytes(optimizer, event) for event in optimizer.events])

    def facts() -> dict[str, Any]:
        sizes = optimizer.memory()
        return {
            "host_mb_moved": mean([event.moved_bytes for event in optimizer.events]) / 1e6,
            "host_mb_held": sum(size for name, size in sizes.items() if name.startswith("host_")) / 1e6,
        }

    group = f"switch, {optimizer.budget / 1e6:g}M of bfloat16 parameters"
    measure(optimizer.end_round, moved, group, way, setup=lambda: one_step(optimizer, model), facts=facts)
    optimizer.remove()


def test_switch_by_clones(measure: Any, device: torch.device, shape: str) -> None:
    """The same units, the way of the published code."""
    model, delta = build_model(shape, device)
    optimizer = UnfusedMISA(model, MisaConfig(delta=delta, **OPTIONS))
    counted: list[int] = []

    def work() -> None:
        optimizer.end_round()
        counted.append(sum(clone.numel() for clone in optimizer.clones.values()))

    def moved() -> float:
        return sum(counted) / len(counted) * traffic.ENTER_AS_CLONE

    group = f"switch, {optimizer.budget / 1e6:g}M of bfloat16 parameters"
    measure(work, moved, group, "clones", setup=lambda: one_step(optimizer, model))
