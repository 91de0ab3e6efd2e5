"""Which active matrices took part: models that skip layers (LayerDrop, experts without tokens) and gradients that fail.

A step in which no active matrix took part is an empty step: ``GraphAnchor`` lets its ``backward()`` run, and nothing is
updated. ``Attendance`` counts the steps in which an active parameter had no gradient, and tells the skipped ones from
those that ran and never received one all the same, which would train nothing for as long as nobody looks.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from misa_engine.engine.gemm_gradients import compiled_modules, plain_autograd
from misa_engine.engine.places import Places

#: Steps without a gradient after which a parameter in a compiled module, where nobody sees what runs, counts as failed.
UNSEEN_STEPS = 10


class Attendance:
    """Counts, for the present round, the steps in which each active parameter had no gradient, and sees which ran.

    Args:
        model: the model.
        places: who owns each parameter.
        on_empty_pass: called from within a backward pass in which nothing active takes part.

    Attributes:
        repeated: some step of the round had gradients of more than one forward pass of the model.
    """

    def __init__(self, model: nn.Module, places: Places, on_empty_pass: Callable[[], None] = lambda: None):
        self._model, self._places, self._on_empty_pass = model, places, on_empty_pass
        self._names: Sequence[str] = ()
        self._steps = 0
        self._missed: list[int] = []
        self._heard: set[str] = set()  # received a gradient, whether or not a step used it
        self._latest: set[str] = set()  # ran in the latest forward pass of the model
        self._ran: set[str] = set()  # ran in a pass that was differentiated, in the present step
        self._ran_steps: Counter[str] = Counter()
        self._fresh = False  # no gradient has come yet of the latest forward pass of the model
        self._differentiated = 0  # passes of the present step that were
        self.repeated = False
        self._round = 0
        self._ran_alone: set[str] = set()  # was called by the user, who may have wanted something else of it
        self._inside = False
        self._unseen: set[str] = set()
        self._warned: set[str] = set()
        self._handles: list[Any] = []

    def bind(self, names: Sequence[str]) -> None:
        """Begin a round with these parameters, by slot."""
        self.remove()
        self._round += 1
        self._names, self._steps, self._missed = tuple(names), 0, [0] * len(names)
        self.repeated = False
        for seen in (self._heard, self._latest, self._ran, self._ran_steps, self._ran_alone):
            seen.clear()
        self._handles += [
            self._model.register_forward_pre_hook(ModelHook(self._enter)),
            self._model.register_forward_hook(ModelHook(self._leave), always_call=True),
        ]
        compiled = compiled_modules(self._model)
        self._unseen = {name for name in names if self._places.owner(name) in compiled}
        for name in names:
            if name not in self._unseen:
                self._handles.append(self._places.owner(name).register_forward_pre_hook(ModelHook(self._watch(name))))

    def arrived(self, name: str) -> None:
        """A gradient of ``name`` has arrived, from the latest forward pass as far as one can tell."""
        self._heard.add(name)
        self._differentiated += self._fresh
        self._fresh = False
        self.repeated |= self._differentiated > 1
        self._ran |= self._latest
        self._latest.clear()

    def pass_without_gradients(self) -> Callable[[], None]:
        """Give what is to be called when the latest forward pass is differentiated though nothing active is in it."""
        round_, ran = self._round, frozenset(self._latest)

        def differentiated() -> None:
            if self._round == round_:
                self._ran |= ran
                self._on_empty_pass()

        return differentiated

    def count(self, present: Sequence[bool]) -> None:
        """Account for a step: which slots had a gradient."""
        self._steps += 1
        self._latest.clear()
        self._differentiated = 0
        self._ran_steps.update(self._ran)
        self._ran.clear()
        for index, here in enumerate(present):
            self._missed[index] += not here

    @property
    def without_gradient(self) -> dict[str, int]:
        """Parameter -> steps of the round in which it received no gradient; those that always did are left out."""
        return {name: missed for name, missed in zip(self._names, self._missed, strict=True) if missed}

    def check(self) -> None:
        """At the end of a round: refuse to go on when an active parameter ran and never received a gradient.

        Only forward passes of the model count that were differentiated for the sake of parameters: others were made
        for something else. It is a warning after a round of one step, as in the cold start, and for modules that ran
        in some of the steps (a model that skips layers) or when the caller called them by themselves.

        Raises:
            ValueError: with the parameters' names.
        """
        empty = self.without_gradient
        missed = [name for name in self._names if name not in self._heard and empty.get(name) == self._steps]
        failed = [name for name in missed if self._ran_steps[name] == self._steps or self._failed_unseen(name)]
        silent = failed or [name for name in missed if self._ran_steps[name] or name in self._ran_alone]
        if not silent:
            return
        text = (
            f"{len(silent)} active parameters received no gradient in any of the round's {self._steps} steps although "
            f"their modules ran, {silent[0]} first: the loss does not depend on them, or autograd cannot reach them "
            "(torch.no_grad, detach, a compiled module that does not follow requires_grad). Name what the loss does "
            "not use in frozen=(...)."
        )
        if failed and self._steps > 1:
            raise ValueError(text)
        if new := set(silent) - self._warned:
            self._warned |= new
            warnings.warn(text, stacklevel=4)

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _failed_unseen(self, name: str) -> bool:
        return name in self._unseen and self._steps >= UNSEEN_STEPS

    def _enter(self, *_: Any) -> None:
        self._inside = self._fresh = True
        self._latest.clear()

    def _leave(self, *_: Any) -> None:
        self._inside = False

    def _watch(self, name: str) -> Callable[..., None]:
        def before_forward(*_: Any) -> None:
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                (self._latest if self._inside else self._ran_alone).add(name)

        return before_forward


class GraphAnchor:
    """Makes the output of a training forward pass in which no active matrix took part require gradients.

    ``loss.backward()`` then ends at once and leaves no gradient, instead of failing. Values stay as they are.
    """

    def __init__(self, model: nn.Module, attendance: Attendance | None = None):
        self._attendance = attendance
        self._handle = model.register_forward_hook(ModelHook(self._after_forward))

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling() or not model.training or not torch.is_grad_enabled():
            return None
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if any(tensor.requires_grad for tensor in tensors) or not all(map(plain_autograd, tensors)):
            return None
        note = None if self._attendance is None else self._attendance.pass_without_gradients()
        return tree_map_only(Tensor, partial(_anchor, note=note), output)


class ModelHook:
    """A hook that stays behind when its module is copied or pickled: the copy is a plain model."""

    def __init__(self, call: Callable[..., Any]):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        return self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: Any) -> None:
    return None


def _anchor(tensor: Tensor, note: Callable[[], None] | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    anchored: Tensor = _Anchor.apply(tensor, torch.zeros((), requires_grad=True), note)
    return anchored


class _Anchor(torch.autograd.Function):
    """The identity, with a node of its own: in place, so that logits take no second memory, except for views."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, note: Callable[[], None] | None) -> Tensor:
        ctx.note = note
        if x._is_view():
            return x.clone()
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None, None]:
        if ctx.note is not None:
            ctx.note()
        return None, None, None
