"""What goes wrong with a run's file system: slow calls, a kill or an error at the n-th change below a directory."""

from __future__ import annotations

import builtins
import os
import shutil
import signal
import time
from collections.abc import Callable
from typing import Any

#: Changes of the disk as Python sees them; torch and safetensors write below it and are counted by name.
CALLS = ("replace", "rename", "fsync", "mkdir", "rmdir", "unlink", "link")


def set_trap(
    root: str,
    *,
    kill_at: int = 0,
    fail_at: int = 0,
    number: int = 28,
    slow_s: float = 0.0,
    counter: str | None = None,
) -> None:
    """Watch every change below ``root`` from now on.

    Args:
        root: the run's directory.
        kill_at: SIGKILL before the n-th change, counted from 1; 0 for never.
        fail_at: the n-th change raises OSError instead of happening.
        number: the error's errno.
        slow_s: sleep before and after each change, so that a kill from outside falls into the middle of it.
        counter: file to note the number of changes in, after each.
    """
    seen = [0]
    root = os.path.realpath(root)

    def before(what: str, path: str) -> None:
        seen[0] += 1
        if counter:
            real_open_write(counter, str(seen[0]))
        if slow_s:
            time.sleep(slow_s)
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if seen[0] == fail_at:
            raise OSError(number, os.strerror(number), path)

    def inside(path: Any) -> str | None:
        if isinstance(path, int):
            path = f"/proc/self/fd/{path}"
        try:
            real = os.path.realpath(os.fspath(path))
        except (TypeError, ValueError):
            return None
        return real if real.startswith(root) else None

    def real_open_write(path: str, text: str) -> None:
        with real["open"](path, "w") as file:
            file.write(text)

    def watched(name: str, call: Callable[..., Any], which: int = 0) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            path = inside(args[which]) if len(args) > which else None
            if path is not None:
                before(name, path)
            result = call(*args, **kwargs)
            if path is not None and slow_s:
                time.sleep(slow_s)
            return result

        return wrapper

    real: dict[str, Any] = {"open": builtins.open}
    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    shutil._use_fd_functions = False  # type: ignore[attr-defined]  # rmtree by names, so that they are seen
    real_open = builtins.open

    def open_watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+") and (path := inside(file)) is not None:
            before("open", path)
        return real_open(file, mode, *args, **kwargs)

    builtins.open = open_watched  # type: ignore[assignment]
    import safetensors.torch
    import torch

    torch.save = watched("torch.save", torch.save, 1)
    safetensors.torch.save_file = watched("save_file", safetensors.torch.save_file, 1)
    import transformers.modeling_utils as modeling

    if hasattr(modeling, "safe_save_file"):
        modeling.safe_save_file = watched("save_file", modeling.safe_save_file, 1)
