"""HostStore: what stays of a unit that left the arena, in host memory.

    revisit="keep"          both moments as they are
    revisit="offload"       both moments in 8 bits: 2.125 bytes an element
    leave_rounding="keep"   the 16 residual bits: with the model's own bf16 weight an exact float32 master for ever

The buffers of a parameter are taken from a pool when it leaves for the first time and used again after that. Copies are
queued on the device's stream into pinned memory, so that neither side waits: whatever is queued later, the newcomers'
cleared slots among it, runs after them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from misa_engine.engine.arena import Arena, padded
from misa_engine.engine.host_pool import HostPool, own_storage, rounded
from misa_engine.kernels import blockwise8
from misa_engine.kernels.tiles import BLOCK

#: Elements compressed at a time on their way to the host: 8.5 MiB of scratch on the device.
CHUNK = 4 << 20

#: What the 8-bit form of two float32 moments consists of, and the elements of each that one scale stands for.
PACKED: dict[str, tuple[torch.dtype, int]] = {
    "first_moment": (torch.int8, 1),
    "second_moment": (torch.uint8, 1),
    "first_moment_scale": (torch.float32, blockwise8.GROUP),
    "second_moment_scale": (torch.float32, blockwise8.GROUP),
}


class HostStore:
    """Moments and residual bits of inactive parameters.

    Args:
        arena: where they come from and return to.
        moments: keep the moments.
        pack: keep float32 moments in 8 bits (an arena with 8-bit moments gives its codes as they are).
        residual: keep the residual bits.
        backend: "triton" or "reference".
        numels: elements of each parameter that can ever leave; without them pinned memory is taken more coarsely.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        moments: bool,
        pack: bool,
        residual: bool,
        backend: str,
        numels: Sequence[int] = (),
    ):
        self._arena, self._backend = arena, backend
        self._moments, self._residual = moments, residual and arena.residual is not None
        self._pack = moments and pack and arena.exp_avg.dtype == torch.float32
        self._held: dict[str, dict[str, Tensor]] = {}  # of inactive parameters only
        self._steps: dict[str, int] = {}
        self._idle: dict[str, dict[str, Tensor]] = {}  # buffers of parameters that are in the arena now
        self._total = sum(rounded(n * d.itemsize) for numel in numels for n, d in self._sizes(padded(numel)).values())
        self._pool = self._new_pool()
        size = min(CHUNK, arena.capacity) if self._pack else 0
        self._scratch = {
            name: torch.empty(size // ratio, dtype=dtype, device=arena.exp_avg.device)
            for name, (dtype, ratio) in PACKED.items()
        }

    def bytes(self) -> dict[str, int]:
        """Host bytes by category, those of the pool that hold nothing yet among them, and scratch on the device."""
        sizes = {"host_moments": 0, "host_residual_bits": 0}
        for buffers in (*self._held.values(), *self._idle.values()):
            for name, buffer in buffers.items():
                sizes["host_residual_bits" if name == "residual_bits" else "host_moments"] += buffer.nbytes
        sizes["host_spare"] = self._pool.nbytes - sum(sizes.values())
        sizes["offload_scratch"] = sum(buffer.nbytes for buffer in self._scratch.values())
        return {name: size for name, size in sizes.items() if size or name in ("host_moments", "host_residual_bits")}

    def leave(self, name: str, index: int, step: int) -> int:
        """Copy what is kept of the parameter in slot ``index``, which has made ``step`` Adam steps. Returns bytes."""
        if not self._moments and not self._residual:
            return 0
        slot = self._arena.slots[index]
        length = padded(slot.numel)
        buffers = self._idle.pop(name, None) or self._allocate(length)
        self._held[name], self._steps[name] = buffers, step
        if self._pack:
            self._pack_moments(slot.start, length, buffers)
        for category, device in self._plain().items():
            buffers[category].copy_(self._arena.stretch(device, slot.start, length), non_blocking=True)
        return sum(buffer.nbytes for buffer in buffers.values())

    def enter(self, name: str, index: int) -> int:
        """Give the parameter in slot ``index`` back what was kept of it, if anything. Returns bytes."""
        buffers = self._held.pop(name, None)
        if buffers is None:
            return 0
        self._idle[name] = buffers
        slot = self._arena.slots[index]
        length = padded(slot.numel)
        if self._pack:
            self._expand_moments(slot.start, length, buffers)
        for category, device in self._plain().items():
            self._arena.stretch(device, slot.start, length).copy_(buffers[category], non_blocking=True)
        if self._moments:
            self._arena.table.slot_step[index : index + 1].fill_(self._steps[name])  # no copy from the host
        del self._steps[name]
        return sum(buffer.nbytes for buffer in buffers.values())

    def state_dict(self) -> dict[str, list[Any]]:
        """Name -> [Adam steps, {category: host tensor}]. Waits for copies under way; tensors are references."""
        if self._arena.exp_avg.is_cuda:
            torch.cuda.synchronize(self._arena.exp_avg.device)
        return {
            name: [self._steps[name], {category: own_storage(buffer) for category, buffer in buffers.items()}]
            for name, buffers in self._held.items()
        }

    @property
    def names(self) -> Collection[str]:
        """Parameters of which something is kept."""
        return self._held.keys()

    def drop_residual(self, name: str) -> None:
        """Clear the residual bits that are kept of a parameter, whose weights are no longer those they extend."""
        if self._residual:
            if self._arena.exp_avg.is_cuda:
                torch.cuda.synchronize(self._arena.exp_avg.device)  # the copy that brings them may be under way
            self._held[name]["residual_bits"].zero_()

    def damage(self, saved: Mapping[str, Sequence[Any]], numel: Callable[[str], int]) -> str | None:
        """What is wrong with a state that ``load_state_dict`` is to hold; None when nothing is.

        Args:
            saved: the state.
            numel: elements of a parameter, KeyError for an unknown one.
        """
        try:
            for name, (step, buffers) in saved.items():
                found = {category: (tensor.numel(), tensor.dtype) for category, tensor in buffers.items()}
                if int(step) < 0 or found != self._sizes(padded(numel(name))):
                    return f"what the host keeps of {name} does not fit it"
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            return f"what the host keeps cannot be read ({error!r})"
        return None

    def load_state_dict(self, saved: Mapping[str, Sequence[Any]]) -> None:
        """Hold copies of what ``state_dict`` gave, and nothing else."""
        self._held, self._steps, self._idle = {}, {}, {}
        self._pool = self._new_pool()  # what was held may be what is loaded
        for name, (step, buffers) in saved.items():
            own = {category: self._pool.take(tensor.numel(), tensor.dtype) for category, tensor in buffers.items()}
            for category, tensor in buffers.items():
                own[category].copy_(tensor)
            self._held[name], self._steps[name] = own, int(step)

    def _plain(self) -> dict[str, Tensor]:
        """Device buffers that are copied as they are."""
        plain = self._arena.moments() if self._moments and not self._pack else {}
        if self._residual:
            assert self._arena.residual is not None
            plain["residual_bits"] = self._arena.residual
        return plain

    def _allocate(self, length: int) -> dict[str, Tensor]:
        return {name: self._pool.take(numel, dtype) for name, (numel, dtype) in self._sizes(length).items()}

    def _sizes(self, length: int) -> dict[str, tuple[int, torch.dtype]]:
        """Elements and dtype of each buffer that a parameter of ``length`` elements, padded, needs."""
        ratio = self._arena.capacity
        sizes = {name: (length * buffer.numel() // ratio, buffer.dtype) for name, buffer in self._plain().items()}
        if self._pack:
            sizes |= {name: (length // share, dtype) for name, (dtype, share) in PACKED.items()}
        return sizes

    def _new_pool(self) -> HostPool:
        return HostPool(self._arena.exp_avg.device, self._total)

    def _parts(self, start: int, length: int, host: dict[str, Tensor]) -> Any:
        """Chunk by chunk: both moments on the device, the scratch space for their codes, and its place on the host."""
        size = self._scratch["first_moment"].numel()
        for done in range(0, length, size):
            n = min(size, length - done)
            here = slice(start + done, start + done + n)
            scratch = {name: self._scratch[name][: n // ratio] for name, (_, ratio) in PACKED.items()}
            place = {name: host[name][done // ratio : (done + n) // ratio] for name, (_, ratio) in PACKED.items()}
            yield (self._arena.exp_avg[here], self._arena.exp_avg_sq[here]), scratch, place

    def _pack_moments(self, start: int, length: int, host: dict[str, Tensor]) -> None:
        for moments, scratch, place in self._parts(start, length, host):
            blockwise8.compress(*moments, *scratch.values(), backend=self._backend)
            for name, codes in scratch.items():
                place[name].copy_(codes, non_blocking=True)

    def _expand_moments(self, start: int, length: int, host: dict[str, Tensor]) -> None:
        for moments, scratch, place in self._parts(start, length, host):
            for name, codes in scratch.items():
                codes.copy_(place[name], non_blocking=True)
            blockwise8.expand(*scratch.values(), *moments, backend=self._backend)


assert CHUNK % BLOCK == 0
