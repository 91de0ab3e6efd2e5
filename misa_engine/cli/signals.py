"""Signals that ask a command to end: who receives them inside a block. Needs no package: any command may import it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def receiving(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give SIGINT, SIGTERM and SIGHUP to ``handler`` inside the block; the handlers of before are back afterwards."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
