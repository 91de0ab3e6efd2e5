"""Where the engine's time goes: named phases that a profiler or a stopwatch can see, and that cost nothing otherwise.

The engine runs each phase ``with phase("update"):``. torch.profiler then shows a range "misa: update"; a benchmark with
a clock of its own runs its steps inside ``with observed(clock.around):``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

#: What every range of ours begins with in a profiler's trace.
PREFIX = "misa: "
#: All phases: arrival of gradients, weight-gradient GEMMs, the step of what rests, norm and skip decision, update, and
#: the parts of a switch.
PHASES = ("hooks", "backward dW", "resting", "clip/norm", "update", "switch", "switch (sampler)", "switch (host copy)")

Around = Callable[[str], AbstractContextManager[Any]]

_observer: Around | None = None


def phase(name: str) -> AbstractContextManager[Any]:
    """Give the context in which the phase ``name`` of PHASES runs."""
    if _observer is not None:
        return _observer(name)
    if torch.autograd._profiler_enabled():  # 0.1 µs; an unseen record_function would cost 5 µs a gradient
        return record_function(PREFIX + name)
    return nullcontext()


@contextmanager
def observed(around: Around) -> Iterator[None]:
    """Run the phases of every optimizer of this process inside ``around(name)``, until the end of the block."""
    global _observer
    outer, _observer = _observer, around
    try:
        yield
    finally:
        _observer = outer
