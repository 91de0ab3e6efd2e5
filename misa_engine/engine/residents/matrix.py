"""Resting: one matrix that rests in 8 bits on the card, with its exact master on the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from misa_engine.engine.residents.forward import RestingForward
from misa_engine.engine.residents.masters import alone
from misa_engine.kernels.resident8 import Format, Packed, dequantise, quantise


@dataclass(frozen=True)
class Card:
    """Where all matrices of a model rest, and what they share."""

    format: Format
    device: torch.device
    backend: str
    """"triton" or "reference"."""
    workspace: Tensor
    """(elements of the largest matrix,) in the dtype of the weights."""


class Resting:
    """A matrix and its three forms: master (host, exact), 8 bits (card) and, while it trains, its place in the arena.

    ``parameter.data`` is always the exact weight: the master while it rests, the arena's memory while it trains. So
    ``state_dict()``, ``save_pretrained`` and whoever else reads the parameter see what a model without residents has.

    Args:
        name: the parameter's full name.
        modules: the linear layers that multiply with it.
        parameter: the parameter.
        card: where it rests.

    Attributes:
        edition: changes whenever the 8 bits, or whether they count, do; graphs remember it.
        resting: multiplied with in 8 bits, rather than in the arena or for good on the card.
        awake: an ordinary parameter on the card for good.
    """

    def __init__(self, name: str, modules: list[nn.Module], parameter: nn.Parameter, card: Card):
        self.name, self.modules, self.parameter, self._card = name, modules, parameter, card
        self.shape, self.dtype, self.numel = parameter.shape, parameter.dtype, parameter.numel()
        self.packed: Packed | None = None
        self.master: Tensor | None = None
        self.resting = self.awake = False
        self.edition = 0
        self._version = -1

    @torch.no_grad()
    def hold(self, master: Tensor) -> None:
        """Rest: ``master`` is the exact weight, on the host; its 8 bits are made here."""
        self.check_not_training()
        if self.packed is None:
            self.packed = Packed.allocate(self._card.format, tuple(self.shape), self._card.device)
        self.master = master
        self._quantise_master()
        self._show_master()

    def _quantise_master(self) -> None:
        """By way of the workspace, so that the card never holds more than one matrix in full."""
        assert self.master is not None and self.packed is not None
        staged = self._card.workspace[: self.numel].view(self.shape)
        staged.copy_(self.master, non_blocking=True)
        quantise(staged, self.packed, backend=self._card.backend)
        self.edition += 1

    def _show_master(self) -> None:
        assert self.master is not None
        self.parameter.data = self.master
        self._version = self.parameter._version
        self.resting = True
        for module in self.modules:
            module.forward = RestingForward(module, self)

    @torch.no_grad()
    def renew(self) -> None:
        """Quantise a master anew that somebody wrote to."""
        if self.parameter._version != self._version:
            self._quantise_master()
            self._version = self.parameter._version

    @property
    def parts(self) -> tuple[Tensor, Tensor]:
        """Codes and steps, on the card, while it rests."""
        assert self.packed is not None
        return self.packed.codes, self.packed.steps

    @torch.no_grad()
    def expand(self, dtype: torch.dtype) -> Tensor:
        """The weight that the 8 bits stand for, (out, in) in the workspace, until the next one is expanded.

        A master that somebody wrote to (``load_state_dict``) is quantised anew first.
        """
        assert self.packed is not None
        self.renew()
        if dtype in (torch.float32, torch.bfloat16) and dtype.itemsize <= self.dtype.itemsize:
            out = self._card.workspace.view(dtype)[: self.numel].view(self.shape)
            dequantise(self.packed, out, backend=self._card.backend)
            return out
        return self.expand(self.dtype).to(dtype)  # autocast to another dtype: a copy, as autocast makes

    @torch.no_grad()
    def enter(self, place: Tensor) -> None:
        """Train at ``place``, a stretch (numel,) of the arena's memory; only what rested is not there already."""
        if self.resting:
            assert self.master is not None
            place.copy_(self.master.view(-1), non_blocking=True)
            self.resting = False
            self.edition += 1
            self._plain_forward()
        self.parameter.data = alone(place).view(self.shape)

    @torch.no_grad()
    def leave(self) -> None:
        """Rest again: write the weight back to the master and quantise it from its own bits on the card."""
        assert self.master is not None and self.packed is not None and not self.resting
        weight = self.parameter.data
        self.master.copy_(weight, non_blocking=True)
        quantise(weight, self.packed, backend=self._card.backend)
        self.edition += 1
        self._show_master()

    @torch.no_grad()
    def wake(self) -> None:
        """Be an ordinary parameter on the card from now on; the 8 bits are freed."""
        self.check_not_training()
        if self.resting:
            assert self.master is not None
            self._plain_forward()
            self.parameter.data = self.master.to(self._card.device)
            self.resting = False
            self.edition += 1
        self.packed, self.master, self.awake = None, None, True

    def check_not_training(self) -> None:
        """Refuse to touch a matrix whose weights lie in the arena (ValueError)."""
        if self.master is not None and not self.resting:
            raise ValueError(
                f"{self.name} trains at present, in memory of the optimizer's. Call its remove() first, which puts "
                "every matrix back to rest."
            )

    def replace_parameter(self, weight: Tensor) -> None:
        """Give the modules a parameter of ``weight`` instead of one on the meta device."""
        new = nn.Parameter(weight, requires_grad=self.parameter.requires_grad)
        new.__dict__.update(self.parameter.__dict__)
        for module in self.modules:
            module.weight = new
        self.parameter = new

    def _plain_forward(self) -> None:
        for module in self.modules:
            if isinstance(module.__dict__.get("forward"), RestingForward):
                del module.forward

    def check_owner(self, module: nn.Module) -> None:
        """Refuse to multiply with a weight that is not the module's any more."""
        if module.weight is not self.parameter:
            raise RuntimeError(
                f"{self.name} was replaced by another tensor while it rested in 8 bits. Load weights in place "
                "(load_state_dict without assign) or build the model anew."
            )

    def check_edition(self, seen: int) -> None:
        """Refuse a graph from before the matrix changed."""
        if self.edition != seen or self.parameter._version != self._version:
            raise RuntimeError(
                f"{self.name} has changed since the forward pass that is being differentiated: it was drawn, has left, "
                "or was loaded anew. Call backward() before the step() that ends the round."
            )
