"""Functions run as several processes of one gloo group, for tests of replicas.

They are forked from this process, which has imported everything already: a tenth of a second each.
"""

from __future__ import annotations

import io
import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  here, once, and not in every process

#: After which a test that hangs fails.
SECONDS = 240

#: A process that has talked to a GPU cannot be forked.
CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")


def run_ranks(function: Callable[..., Any], folder: Path, *args: Any, size: int = 2, timeout: int = 60) -> list[Any]:
    """Call ``function(rank, *args)`` in ``size`` processes; give what each returned, or its exception as text.

    A process that was killed gives None.
    """
    folder.mkdir(exist_ok=True)
    pipes, processes = [], []
    for rank in range(size):
        mine, its = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_run, args=(function, folder, rank, size, timeout, its, args), daemon=True)
        process.start()
        its.close()
        pipes.append(mine)
        processes.append(process)
    results = []
    for pipe in pipes:
        assert pipe.poll(SECONDS), "a process hangs"
        try:
            results.append(torch.load(io.BytesIO(pipe.recv_bytes())))
        except EOFError:
            results.append(None)
    for process in processes:
        process.join(10)
        process.kill()
    return results


def _run(
    function: Callable[..., Any], folder: Path, rank: int, size: int, timeout: int, pipe: Any, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    try:
        result = function(rank, *args)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
        if not str(error):
            result += traceback.format_exc()
    whole = io.BytesIO()  # multiprocessing itself would hand over tensors by descriptors of a process that ends
    torch.save(result, whole)
    pipe.send_bytes(whole.getvalue())
    pipe.close()
