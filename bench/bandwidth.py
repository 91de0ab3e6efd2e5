"""How long something takes on a device, and the bandwidth of a plain copy measured the same way."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from misa_engine.bench.measure import synchronize

#: Bytes from here on do not change a copy's bandwidth, and two buffers of half of it fit beside any arena.
LARGEST_COPY = 1 << 31


def device_seconds(work: Callable[[], object], device: torch.device, repeats: int = 15) -> float:
    """Median time of ``work``, which may run any number of times.

    On a GPU between two events, with the second-level cache flushed before each run as the backward pass before an
    update would, so that neither launches nor synchronisation count; on a CPU by the clock.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return do_bench(work, quantiles=[0.5, 0.2, 0.8])[0] / 1e3
    seconds = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[3:])


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
            self.measured[size] = size / device_seconds(lambda: target.copy_(source), self.device)
        return self.measured[size]
