"""Which implementation runs: the plain PyTorch reference, or the Triton kernels.

Triton is imported only when it is asked for, so that the package works where Triton does not exist (macOS, Windows):
nothing but the ``kernel.py`` of an operation (and ``columns.py``, which they share) names it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "triton")


def interpreting() -> bool:
    """Whether Triton's CPU interpreter was asked for (tests only: about 10 ms a program)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def triton_installed() -> bool:
    """Whether the package can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def check_backend(backend: str, device: torch.device | str) -> None:
    """Raise unless ``backend`` can run on ``device``.

    Raises:
        ValueError: ``backend`` is unknown.
        RuntimeError: ``backend`` is "triton" and Triton, or a GPU, is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "reference":
        return
    if not triton_installed():
        raise RuntimeError('backend="triton" needs the package triton (Linux): install it or use backend="reference"')
    device = torch.device(device)
    if device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f'backend="triton" needs the weights on a GPU; they are on {device}. Move the model to the GPU before '
            'building the optimizer, or use backend="reference" (the default on a CPU, with the same results).'
        )


def choose_backend(backend: str, device: torch.device | str) -> str:
    """Resolve "auto" (Triton on a GPU where it is installed, the reference elsewhere) and check any explicit choice."""
    if backend == "auto":
        on_gpu = torch.device(device).type == "cuda"
        return "triton" if on_gpu and triton_installed() else "reference"
    check_backend(backend, device)
    return backend


def uses_triton(backend: str, tensor: Tensor) -> bool:
    """Check ``backend`` for the device of ``tensor`` and say whether the Triton kernel is to be launched."""
    check_backend(backend, tensor.device)
    return backend == "triton"


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of ``tensor`` current: Triton launches on the current device, not on that of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
