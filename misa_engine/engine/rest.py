"""RestRule: matrices outside the draw take a step without state, inside the backward pass that made their gradients.

    round start      resting = what is neither drawn, always trained nor frozen (scope "above": above the lowest drawn)
    step begins      is it a step in which they move? then requires_grad on
    gradient         arrives merged in .grad -> measured, used (kernels/rest), freed; requires_grad off until then
    step ends        the next one begins

A gradient lives from the GEMM that makes it to the hook that uses it, so at most one of them exists, of the size of the
largest matrix. It is autograd's own tensor: only autograd knows when all uses of a tied or reused weight are in.
With accumulation one micro-batch a step moves them: the last where ``last_micro_batch`` is set, otherwise the first.
With several processes its mean over them moves a matrix (exchange.py): one more gradient lives while it is averaged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from misa_engine.engine.exchange import RESTING_IN_FLIGHT, Exchange
from misa_engine.engine.gemm_gradients import compiled_modules, stores_transposed
from misa_engine.engine.gradients import Groups, check_dense
from misa_engine.engine.marks import phase
from misa_engine.engine.places import Places
from misa_engine.kernels.rest import RestScratch, passes, rest_step
from misa_engine.kernels.split_float import seed_of
from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import Partition, Unit, partition_for
from misa_engine.method.sampling import ImportanceTracker


def can_rest(model: nn.Module, partition: Partition, config: MisaConfig) -> tuple[str, ...]:
    """Names of the matrices that the rest rule may move, in the model's order; none without a rule.

    All matrices of units and, with ``rest_outside``, embeddings and head, but for what ``frozen`` and ``always_train``
    name. Norms and biases never rest: they have no rows.
    """
    if config.rest == "none":
        return ()
    units = partition.units
    if config.rest_outside:
        units = partition_for(model, config.altered(include_outside=True)).units
    inside = {name for unit in units for name in unit.params}
    return tuple(name for name, tensor in model.named_parameters() if name in inside and tensor.ndim >= 2)


def resting_while(
    trained: Collection[str], names: Sequence[str], position: Mapping[str, int], config: MisaConfig
) -> tuple[str, ...]:
    """Those of ``names`` that rest while others train.

    Args:
        trained: what holds a slot, always trained parameters included.
        names: of every matrix that can rest (``can_rest``).
        position: name -> place in the model's order; a later one lies higher.
        config: the rule's scope.
    """
    taken = set(trained)
    lowest = min(position[name] for name in taken) if config.rest_scope == "above" else -1
    return tuple(name for name in names if name not in taken and position[name] > lowest)


@dataclass(frozen=True)
class RestBuffers:
    """All that a rest rule allocates, once."""

    scratch: RestScratch
    sumsq: Tensor  # (matrices,) float32, Σ g² of each one's gradient in this step; nan: none
    sums: Tensor  # (matrices,) float32, the same over the steps of a round
    measured: Tensor  # (matrices,) float32, how many steps entered
    part: Tensor  # (1,) float32, Σ g² of one of several stacked matrices

    @classmethod
    def allocate(cls, matrices: Sequence[Tensor], device: torch.device | str) -> RestBuffers:
        """For these matrices; on the meta device, to know the bytes."""
        shapes = [(matrix.numel() // matrix.shape[-1], matrix.shape[-1]) for matrix in matrices]
        rows, cols = (max(sizes) for sizes in zip(*shapes, strict=True))
        sumsq, sums, measured = torch.zeros(3, len(shapes), dtype=torch.float32, device=device)
        part = torch.zeros(1, dtype=torch.float32, device=device)
        return cls(RestScratch.allocate(rows, cols, device), sumsq.fill_(torch.nan), sums, measured, part)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.scratch.nbytes + 3 * self.sumsq.nbytes + self.part.nbytes


def exchange_bytes(matrices: Sequence[Tensor]) -> int:
    """Bytes of gradients that live while several processes average them, of the largest of these matrices."""
    return RESTING_IN_FLIGHT * max(matrix.nbytes for matrix in matrices)


class RestRule:
    """Decides which matrices rest, and moves each as its gradient arrives.

    Args:
        model: the model; a parameter that it names later lies higher.
        names: of every matrix that can rest (``can_rest``).
        group_of: name -> torch's parameter group, whose learning rate counts.
        config: the rule and its options.
        groups: gives torch's parameter groups.
        places: who owns each parameter, and whether it is where it was.
        exchange: averages gradients with other processes; None where there are none.
        backend: "triton" or "reference".
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        group_of: Mapping[str, int],
        config: MisaConfig,
        groups: Groups,
        places: Places,
        exchange: Exchange | None,
        *,
        backend: str,
    ):
        named = dict(model.named_parameters())
        self._parameters, self._config, self._backend = {name: named[name] for name in names}, config, backend
        self._position = {name: index for index, name in enumerate(named)}
        self._group_of, self._groups, self._places = group_of, groups, places
        self._index = {name: index for index, name in enumerate(self._parameters)}
        self._transposed = {name: bool(stores_transposed(places.owner(name))) for name in self._parameters}
        self._streams = {name: seed_of("rest", config.seed, name) for name in self._parameters}
        matrices = list(self._parameters.values())
        self._buffers = RestBuffers.allocate(matrices, matrices[0].device)
        self.names: tuple[str, ...] = ()
        self._waiting: set[str] = set()  # what may still move in this step
        self._model, self._exchange = model, exchange
        self._arrived: dict[str, Tensor | None] = {}  # with an exchange: this step's gradients until it takes them
        self._step, self._last_micro_batch, self._accumulates = 0, True, False
        self._in_order = True  # gradients come in the order of the model, not all at once as from compiled modules

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, and of the gradients that live while they are averaged."""
        averaged = 0 if self._exchange is None else exchange_bytes(list(self._parameters.values()))
        return self._buffers.nbytes + averaged

    @property
    def last_micro_batch(self) -> bool:
        """Whether the next backward pass is the last of its step, the one that moves what rests."""
        return self._last_micro_batch

    @last_micro_batch.setter
    def last_micro_batch(self, value: bool) -> None:
        if value != self._last_micro_batch:
            self._last_micro_batch = value
            self._accumulates |= not value
            self._show()

    def bind(self, trained: Sequence[str]) -> None:
        """Follow a new draw; ``trained`` is what holds a slot now. To be followed by ``begin_step``."""
        resting = resting_while(trained, tuple(self._parameters), self._position, self._config)
        for name in set(self.names).difference(trained, resting):  # no longer above the lowest one
            self._parameters[name].requires_grad_(False)
        self.names, self._waiting, self._accumulates = resting, set(), False
        # once a round, not in every step: a walk through all modules; a model is compiled before it trains, if at all
        self._in_order = self._exchange is None or not compiled_modules(self._model)

    def begin_step(self, step: int) -> None:
        """Begin step number ``step`` of the training, counted from 0."""
        self._add_up()
        self._step = step
        moves = (step + 1) % self._config.rest_every == 0
        self._waiting = set(self.names) if moves else set()
        self._arrived.clear()
        if self._exchange is not None:
            places = {name: self._position[name] for name in self._waiting}
            self._exchange.open(self, places, bounded=self._in_order)
        self._show()

    def _add_up(self) -> None:
        """Let what the last step measured enter the round's sums."""
        if self._config.rest_scores:
            buffers = self._buffers
            finite = buffers.sumsq.isfinite()
            buffers.sums.add_(torch.where(finite, buffers.sumsq, 0.0))
            buffers.measured.add_(finite)
            buffers.sumsq.fill_(torch.nan)

    def round_tensors(self) -> dict[str, Tensor]:
        """What the round has accumulated so far, for a checkpoint; nothing where nothing is wanted of it."""
        wanted = self._config.rest_scores
        return {"rest_sums": self._buffers.sums, "rest_measured": self._buffers.measured} if wanted else {}

    def observe(self, tracker: ImportanceTracker, units: Sequence[Unit], repeated: bool) -> None:
        """At the end of a round, with ``rest_scores``: let what was measured enter the scores of units that rested.

        One micro-batch's gradient cannot be compared with the sum of several, so nothing enters after a round with
        accumulation (``repeated``, where nobody named the last micro-batch).
        """
        if not self._config.rest_scores:
            return
        self._add_up()
        found = self._buffers.sums, self._buffers.measured
        sums, measured = torch.stack(found).tolist()  # one wait for the device
        for buffer in found:
            buffer.zero_()
        for index, unit in enumerate(units):
            matrices = [self._index[name] for name in unit.params if name in self._index]
            if index not in tracker.active and matrices and not (repeated or self._accumulates):
                tracker.observe(index, sum(sums[i] for i in matrices), int(min(measured[i] for i in matrices)))

    @torch.no_grad()
    def take(self, name: str, parameter: nn.Parameter) -> bool:
        """Move ``name`` by the gradient that has arrived, once a step, and free it; False for what cannot rest."""
        if name not in self._index:
            return False
        gradient, parameter.grad = parameter.grad, None
        if gradient is None or name not in self._waiting or not self._last_micro_batch:
            return True  # of a graph from before: the step, or the micro-batch, that it was meant for is over
        self._waiting.discard(name)
        parameter.requires_grad_(False)
        self._places.check(name)
        check_dense(name, gradient)
        if self._exchange is None:
            self.averaged(name, gradient)
            return True
        self._arrived[name] = gradient
        del gradient  # the exchange's now, which frees it when it has been used
        self._exchange.expect_end()
        self._exchange.ready(name)
        return True

    def to_average(self, name: str) -> Tensor:
        """The gradient that has arrived, flat and contiguous, or zeros; it is the exchange's from then on."""
        parameter, gradient = self._parameters[name], self._arrived.get(name)
        if gradient is None:
            return torch.zeros(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
        self._arrived[name] = None
        return gradient.detach().contiguous().view(-1)

    @torch.no_grad()
    def averaged(self, name: str, gradient: Tensor) -> None:
        """Move ``name`` by ``gradient``, in its shape or flat."""
        parameter = self._parameters[name]
        with phase("resting"):
            self._move(name, parameter, gradient.view(parameter.shape))
        increment_version([parameter])  # a graph that holds it must be refused, and kernels do not say

    def exchanged(self) -> None:
        """All processes have moved all that rests: whatever still comes in this step is freed."""
        if self._config.rest_scores and self._exchange is not None:
            somewhere = self._exchange.anywhere([name in self._arrived for name in self.names])
            for name, here in zip(self.names, somewhere, strict=True):
                if not here:  # zeros of everybody are no measurement
                    self._buffers.sumsq[self._index[name]] = torch.nan
        self._arrived.clear()
        self._waiting = set()
        self._show()

    def _move(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        lr = float(self._groups()[self._group_of[name]]["lr"])
        rate = lr * self._config.rest_rate * self._config.rest_every
        transposed, index = self._transposed[name], self._index[name]
        weight, gradient = parameter.detach(), gradient.detach().contiguous()
        stacked = weight.ndim == 3 and passes(self._config.rest, transposed) not in ((), ("rows",))
        seed = (self._streams[name] + 0x9E3779B97F4A7C15 * (self._step + 1)) % (1 << 63)
        step = partial(
            rest_step,
            scratch=self._buffers.scratch,
            rule=self._config.rest,
            rate=rate,
            transposed=transposed,
            backend=self._backend,
        )
        total, part = self._buffers.sumsq[index : index + 1], self._buffers.part
        if not stacked:
            width = weight.shape[-1]
            step(weight.view(-1, width), gradient.view(-1, width), total, seed=seed)
            return
        total.zero_()
        for place, (w, g) in enumerate(zip(weight, gradient, strict=True)):
            step(w, g, part, seed=(seed + place) % (1 << 63))
            total += part

    def _show(self) -> None:
        """Let autograd make gradients of exactly what may move in the next backward pass."""
        for name in self.names:
            self._parameters[name].requires_grad_(self._last_micro_batch and name in self._waiting)
