"""What the optimizer tests share: a tiny model, its batches, and the usual loop."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models import TINY, VOCABULARY


def tiny(family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    return TINY[family](**options).to(dtype).train()


def batches(seed: int = 0, size: int = 2, length: int = 12) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(3, VOCABULARY, (size, length), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[Tensor], steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of(model, next(data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
