"""What every method of the comparison is made of: shared settings, a step that can be timed, the account of bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from misa_engine.engine.marks import phase

Loss = Callable[[Tensor], Tensor]


class Unavailable(Exception):
    """The method cannot run here; the message is the status of its row."""


@dataclass(frozen=True, kw_only=True)
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
    """Of the method's own choices; a case's weights have the same."""
    lora_rank: int = 16
    """Rank of LoRA and DoRA."""
    galore_rank: int = 128
    """Rank of GaLore; a matrix with a smaller side has that side's rank."""
    misa: Mapping[str, Any] = field(default_factory=dict)
    """Further options of MisaConfig, for the methods that are MISA."""
    residents: str | None = None
    """Format in which what MISA does not draw rests in 8 bits; then without a rest rule."""


@dataclass
class Method:
    """A model and what trains it."""

    model: nn.Module
    """What trains: the model itself or an adapter's wrapper around it."""
    loss: Loss
    """Token ids (batch, length) -> mean loss."""
    optimizer: torch.optim.Optimizer
    settings: Settings
    account: Callable[[], dict[str, int]] | None = None
    """Gives ``optimizer_bytes`` where the optimizer's state does not tell them."""
    clips_inside: bool = False
    """The optimizer clips in its own update."""
    switches: Callable[[], int] = lambda: 0
    """Switches so far."""
    name: str = ""
    """Of the registry."""
    floor: Callable[[Collection[str], Tensor], None] | None = None
    """Forward and backward without any optimizer, where the ledger wants it (``ledger.Floor``)."""

    @property
    def trainable_parameters(self) -> int:
        """Parameters that train now."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def optimizer_bytes(self) -> dict[str, int]:
        """Bytes beyond the model's weights by category, gradients included as held between backward and step."""
        return self.account() if self.account else state_bytes(self.model, self.optimizer.state)

    def step(self, micro_batches: Sequence[Tensor]) -> Tensor:
        """One optimizer step over the micro-batches, in the phases forward, backward, clip and step (engine.marks).

        Args:
            micro_batches: token ids, each (batch, length).

        Returns:
            The mean loss, detached, still on the device.
        """
        total = torch.zeros((), device=micro_batches[0].device)
        for ids in micro_batches:
            with phase("forward"):
                loss = self.loss(ids) / len(micro_batches)
            with phase("backward"):
                loss.backward()
            total += loss.detach()
        if self.settings.max_grad_norm is not None and not self.clips_inside:
            with phase("clip"):
                trained = [p for p in self.model.parameters() if p.grad is not None]
                torch.nn.utils.clip_grad_norm_(trained, self.settings.max_grad_norm)
        with phase("step"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return total


#: State key of an optimizer -> category.
_CATEGORIES = {
    "exp_avg": "first_moment", "state1": "first_moment", "exp_avg_sq": "second_moment", "state2": "second_moment",
    "master": "master_weights", "projector": "projections", "kahan_comp": "residual_bits",
    "error_bits": "residual_bits",
}  # fmt: skip


def stored_tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors that a value of an optimizer's state holds.

    A quantised tensor of torchao reports the bytes of what it stands for; GaLore's projector and FlashOptim's moments
    are objects that hold theirs as attributes.
    """
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        value = [getattr(value, name) for name in names]
    elif isinstance(value, Tensor):
        yield value
    elif hasattr(value, "__dict__"):
        value = list(vars(value).values())
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from stored_tensors(entry)


def state_bytes(model: nn.Module, state: Mapping[Any, Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of a torch optimizer's state by category, and of the gradients that its model holds at a step."""
    totals: dict[str, int] = defaultdict(int)
    totals["gradients"] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    seen: set[int] = set()  # bitsandbytes shares one quantisation map among all states
    for key, value in ((key, value) for entries in state.values() for key, value in entries.items()):
        for tensor in stored_tensors(value):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                totals[_CATEGORIES.get(key, "scales_and_tables")] += tensor.nbytes
    return dict(totals)
