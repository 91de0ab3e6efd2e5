"""How long something takes on a device, and the bandwidth of a plain copy measured the same way."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

#: Bytes from here on do not change a copy's bandwidth, and two buffers of half of it fit beside any arena.
LARGEST_COPY = 1 << 31


def event_seconds(work: Callable[[], object]) -> float:
    """Median time of ``work`` on a GPU; it runs many times.

    Between two events, so that synchronisation does not count, with the second-level cache flushed before each run as
    the backward pass before an update would.
    """
    from triton.testing import do_bench

    return do_bench(work, quantiles=[0.5, 0.2, 0.8])[0] / 1e3


def fastest_seconds(work: Callable[[], object], repeats: int = 30) -> float:
    """Shortest time of ``work`` on a CPU: what else a machine does only ever makes it slower."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


class CopyBandwidth:
    """Bytes per second, read and written, of ``Tensor.copy_``; each size is measured once.

    A row is compared with a copy that moves as many bytes as it does, to the next power of two: below the size of a
    cache both would run from the cache.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.measured: dict[int, float] = {}

    def __call__(self, nbytes: float) -> float:
        """Bytes per second of a copy that reads and writes about ``nbytes`` together."""
        size = min(LARGEST_COPY, max(1 << 12, 1 << round(nbytes).bit_length()))
        if size not in self.measured:
            source = torch.zeros(size // 2, dtype=torch.uint8, device=self.device)
            target = torch.ones_like(source)
            seconds = event_seconds if self.device.type == "cuda" else fastest_seconds
            self.measured[size] = size / seconds(lambda: target.copy_(source))
        return self.measured[size]
