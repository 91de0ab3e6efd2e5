"""Replicas: several processes that each hold the whole model, one on each GPU, and stay equal bit for bit.

    construction     everybody's model, options and versions are compared, then rank 0's weights are sent to all
    backward pass    gradients are averaged as they arrive, those of what rests where it moves (exchange.py)
    step             who has a gradient for what is agreed on
    switch           hashes of the draws are compared; every CHECKSUM_ROUNDS rounds those of all weights

Gradients travel over torch's default process group. Everything else is a few numbers from host to host over a gloo
group of its own, so that nobody waits for a device, and the end of a process is noticed at once.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from misa_engine.engine.arena import Arena
from misa_engine.engine.residents import Residents, residents_of
from misa_engine.engine.shards import is_sharded, local
from misa_engine.method.config import MisaConfig

#: Rounds between two comparisons of all weights: one read of the model, 20 ms for 16 GB, every 10 · T steps.
CHECKSUM_ROUNDS = 10
#: How long to wait for the others where the process group does not say; torch's own default with NCCL.
PATIENCE = timedelta(minutes=10)

REMEDY = "End all processes and resume from the last complete checkpoint."

#: The default group and the gloo group beside it, made once: torch keeps every group until the end.
_joined: dict[str, Any] = {}
#: What gloo says when another process is gone.
_LOST = re.compile(r"gloo/|Connection (closed|reset)|Broken pipe|Timed out waiting", re.IGNORECASE)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(RuntimeError):
    """The processes are no longer equal, or one of them is gone. Training cannot go on; the message says from where."""


class Average:
    """An average under way; ``wait`` ends it."""

    def __init__(self, replicas: Replicas, tensor: Tensor):
        self._replicas, self._tensor = replicas, tensor
        # gloo has no mean; NCCL's divides before it adds
        self._divide = dist.get_backend(replicas.world) != "nccl" or not tensor.is_cuda
        operation = dist.ReduceOp.SUM if self._divide else dist.ReduceOp.AVG
        with replicas.speaking("gradients are averaged"):
            self._work = dist.all_reduce(tensor, operation, group=replicas.world, async_op=True)

    def wait(self) -> None:
        """Let the device, or this process where there is none, wait for the result."""
        with self._replicas.speaking("gradients are averaged"):
            self._work.wait()
        if self._divide:
            self._tensor.div_(self._replicas.size)


class Replicas:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        exchanged_bytes: gradients that this process has given to be averaged. A ring moves 2·(size-1)/size as much.
        sent_weight_bytes: weights of which this process has sent its part, with ``shard_state``. A ring moves
            (size-1)/size as much.
        state_in_parts: every process holds a part of the optimizer's state, so that ``state_dict()`` is called in all.
        loaded: a state was loaded since the last step, so that the next one compares everything.
    """

    state_in_parts = False

    def __init__(self, world: dist.ProcessGroup, control: dist.ProcessGroup):
        self.world, self._control = world, control
        self.rank, self.size = dist.get_rank(world), dist.get_world_size(world)
        self.exchanged_bytes = self.sent_weight_bytes = 0
        self.loaded = False
        self._agreed = False

    @classmethod
    def join(cls) -> Replicas | None:
        """All processes of torch's default group; None where there is no group or one process only.

        Raises:
            ReplicaError: not all of them came.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() < 2:
            return None
        world = dist.group.WORLD
        assert world is not None
        if _joined.get("world") is not world:
            with _speaking("all build MISA(model, ...)", dist.get_rank()):
                control = dist.new_group(backend="gloo", timeout=_patience(world))
            _joined.update(world=world, control=control)
        control = _joined["control"]
        assert world is not None and control is not None  # this process is in both
        return cls(world, control)

    def speaking(self, what: str) -> Any:
        """Turn what the backend says when another process is gone into one line; ``what`` was going on."""
        return _speaking(what, self.rank)

    def average(self, tensor: Tensor) -> Average:
        """Begin to replace ``tensor`` (contiguous, same shape everywhere) by its mean over all processes."""
        self.exchanged_bytes += tensor.nbytes
        return Average(self, tensor)

    def tell(self, numbers: Sequence[int]) -> list[list[int]]:
        """Give everybody these numbers, as many as everybody gives; returns a row of each process."""
        mine = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        with self.speaking("the processes meet at a step or switch"):
            dist.all_gather(rows, mine, group=self._control)
        return [row.tolist() for row in rows]

    def tell_json(self, value: Any) -> list[Any]:
        """The same for plain values of any size."""
        data = json.dumps(value).encode()
        longest = max(length for (length,) in self.tell([len(data)]))
        padded = list(data.ljust(longest))
        return [json.loads(bytes(row)) for row in self.tell(padded)]

    @torch.no_grad()
    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace everybody's tensors by those of rank 0."""
        with self.speaking("rank 0 sends its weights"):
            for tensor in tensors:
                whole = tensor.data if tensor.is_contiguous() else tensor.data.contiguous()
                dist.broadcast(whole, src=0, group=self.world)
                if whole is not tensor.data:
                    tensor.data.copy_(whole)

    # ---- comparisons ----

    def agree(self, model: nn.Module, config: MisaConfig) -> None:
        """At construction, when this process has no objections: compare with the others, then take rank 0's weights.

        Raises:
            ValueError: another process refused its model, or something differs; up to five differences are named.
        """
        self._agreed = True
        told = self.tell_json(["", _describe(model, config)])
        for rank, (refusal, _) in enumerate(told):
            if refusal:
                raise ValueError(f"rank {rank} refused its model, so nobody can train: {refusal}")
        differences = _differences([facts for _, facts in told])
        if differences:
            more = f" (and {len(differences) - 5} more)" if len(differences) > 5 else ""
            raise ValueError(
                f"the processes differ, so they would not train the same model: {'; '.join(differences[:5])}{more}. "
                "Start all of them with the same model, options and versions."
            )
        residents = residents_of(model)
        resting = () if residents is None else residents.on_host
        self._broadcast([*(p for name, p in model.named_parameters() if name not in resting), *model.buffers()])
        if residents is not None:  # which lie where the backend may not reach
            residents.become(lambda tensor: self._broadcast([tensor]))

    def refuse(self, error: Exception) -> None:
        """At construction: let the others know that this process cannot build its optimizer."""
        if not self._agreed:
            self._agreed = True
            self.tell_json([f"{type(error).__name__}: {error}", {}])

    def at_switch(self, round: int, drawn: Sequence[str], model: nn.Module) -> None:
        """Compare the draw with the others', and from time to time all weights.

        Raises:
            ReplicaError: naming the ranks that differ.
        """
        self.compare_draws(round, drawn)
        if round % CHECKSUM_ROUNDS == 0:
            self.compare_weights(dict(model.named_parameters()), f"before round {round}")

    def state_loaded(self, clocks: Sequence[Any]) -> None:
        """A state was loaded on this process, which is now at ``clocks``: the next step compares everything."""
        self.loaded = True

    def after_load(self, model: nn.Module, arena: Arena, clocks: Sequence[Any]) -> None:
        """At the first step after a state was loaded: compare clocks, active matrices, weights and moments.

        Raises:
            ReplicaError: naming the ranks that differ.
        """
        if not self.loaded:
            return
        self.loaded = False
        self.compare_clocks(clocks)
        self.compare_weights({**dict(model.named_parameters()), **arena.replicated()}, "after a state was loaded")

    def compare_clocks(self, clocks: Sequence[Any]) -> None:
        """Refuse clocks and active matrices, of a state just loaded, that differ.

        Raises:
            ReplicaError: naming the ranks.
        """
        if others := _others(self.tell([digest(clocks)])):
            raise ReplicaError(
                f"ranks {_list(others)} have loaded another optimizer state than rank 0; rank {self.rank} is at "
                f"{', '.join(map(str, clocks))}. Load the same checkpoint in all processes."
            )

    def compare_draws(self, round: int, drawn: Sequence[str]) -> None:
        """Refuse draws that differ.

        Raises:
            ReplicaError: naming the ranks.
        """
        rows = self.tell([digest([round, *drawn])])
        if others := _others(rows):
            raise ReplicaError(
                f"the draws of round {round} differ: ranks {_list(others)} drew other matrices than rank 0; here, on "
                f"rank {self.rank}: {', '.join(drawn)}. The processes no longer train one model. {REMEDY}"
            )

    @torch.no_grad()
    def compare_weights(self, parameters: Mapping[str, Tensor], when: str) -> None:
        """Refuse weights that differ in any bit. Reads all of them once and waits for the device.

        Raises:
            ReplicaError: naming the ranks and the first parameter that differs.
        """
        sums = checksums(parameters.values())
        if not _others(self.tell([digest(sums)])):
            return
        rows = self.tell(sums)
        name, column = next(
            (name, column) for name, *column in zip(parameters, *rows, strict=True) if len(set(column)) > 1
        )
        others = [rank for rank, value in enumerate(column) if value != column[0]]
        raise ReplicaError(
            f"the weights of the processes differ {when}: {name} of ranks {_list(others)} is not that of rank 0. "
            f"Something changed it on one process only. {REMEDY}"
        )


def built_together(init: Callable[..., None]) -> Callable[..., None]:
    """Around an optimizer's constructor: find the other processes, and let an error of one be an error of all."""

    @functools.wraps(init)
    def together(self: Any, *args: Any, **kwargs: Any) -> None:
        self.replicas = Replicas.join()
        try:
            init(self, *args, **kwargs)
        except Exception as error:
            if self.replicas is not None:  # not as it was joined: sharded weights have another one
                self.replicas.refuse(error)
            raise

    return together


def _describe(model: nn.Module, config: MisaConfig) -> dict[str, dict[str, str]]:
    """What has to be the same everywhere: section -> name -> value."""
    tensors, residents = dict(model.named_parameters()), residents_of(model)
    return {
        "version of": {"torch": torch.__version__, "misa_engine": metadata.version("misa_engine")},
        "option": {name: repr(value) for name, value in config.to_dict().items()},
        "model": {"class": type(model).__name__, "device": next(iter(tensors.values())).device.type},
        "parameter": {
            name: f"{list(p.shape)} {p.dtype}{_placed(p)}{_at_rest(name, residents)}" for name, p in tensors.items()
        },
        "buffer": {name: f"{list(b.shape)} {b.dtype}" for name, b in model.named_buffers()},
    }


def _placed(parameter: Tensor) -> str:
    if not is_sharded(parameter):
        return ""
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return f" {' x '.join(map(repr, placements))} on {' x '.join(map(str, mesh.shape))} processes"


def _at_rest(name: str, residents: Residents | None) -> str:
    return f" at rest as {residents.format.name}" if residents is not None and name in residents else ""


def _differences(told: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[str]:
    first, found = told[0], []
    for rank, other in enumerate(told[1:], start=1):
        for section in first:
            names = {**first[section], **other[section]}
            found += [
                f"{section} {name} is {other[section].get(name, 'absent')} on rank {rank} and "
                f"{first[section].get(name, 'absent')} on rank 0"
                for name in names
                if first[section].get(name) != other[section].get(name)
            ]
    return found


@contextmanager
def lost_ranks(rank: int) -> Iterator[None]:
    """Around training: what any collective says when another process is gone becomes a ReplicaError of one line."""
    try:
        yield
    except ReplicaError:
        raise
    except RuntimeError as error:
        if not isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) and not _LOST.search(str(error)):
            raise
        raise _lost(rank, "training", error) from error


def _lost(rank: int, what: str, error: Exception) -> ReplicaError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ReplicaError(
        f"rank {rank} waited in vain while {what}: another process has ended or no longer answers. {REMEDY} ({reason})"
    )


@contextmanager
def _speaking(what: str, rank: int) -> Iterator[None]:
    try:
        yield
    except ReplicaError:
        raise
    except RuntimeError as error:
        raise _lost(rank, what, error) from error


def _patience(world: dist.ProcessGroup) -> timedelta:
    """What ``init_process_group(timeout=...)`` said."""
    for device in ("cuda", "cpu"):
        try:
            return world._get_backend(torch.device(device)).options._timeout
        except (RuntimeError, AttributeError):
            continue
    return PATIENCE


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """Of each tensor, or of the rows of it that are here, the sum of its bits as integers: exact, whatever the order.

    Waits for the device, once. Of a matrix that rests in 8 bits this is the exact one on the host.
    """
    parts = (local(tensor).detach() for tensor in tensors)
    sums = [_integers(part).sum(dtype=torch.int64) for part in parts]
    devices = {each.device for each in sums}
    found = {device: iter(torch.stack([s for s in sums if s.device == device]).tolist()) for device in devices}
    return [next(found[each.device]) for each in sums]


def _integers(part: Tensor) -> Tensor:
    """The bits as integers; a host adds long ones at 17 GB/s, short ones, which it widens first, at 0.4."""
    aligned = part.is_contiguous() and part.nbytes % 8 == 0 and part.storage_offset() * part.element_size() % 8 == 0
    return (
        part.view(-1).view(torch.int64)
        if part.device.type == "cpu" and aligned
        else part.view(_INTEGERS[part.element_size()])
    )


def digest(values: Iterable[Any]) -> int:
    """A number, 0 <= number < 2^56, that stands for all of ``values``; the same in every process."""
    data = "\n".join(map(str, values)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")


def _others(rows: Sequence[Sequence[int]]) -> list[int]:
    return [rank for rank, row in enumerate(rows) if row != rows[0]]


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
