"""Forks ``misa train`` from a process that has imported everything: a run starts in milliseconds, and can be killed.

python -m soak.server      requests and answers are lines of JSON on stdin and stdout

{"argv": [...], "output": FILE, "trap": {...} | null}  ->  PID
{"wait": PID}                                          ->  exit code, negative for a signal
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def preload() -> None:
    """Import what a run needs, without starting a thread: a fork would not have it."""
    import torch

    torch.set_num_threads(1)
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers
    import trl  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaForCausalLM  # noqa: F401

    import misa_engine.cli.train
    import misa_engine.report.pictures
    import misa_engine.report.summary
    import misa_engine.trainer.sft  # noqa: F401

    transformers.utils.logging.disable_progress_bar()


def child(request: dict[str, Any]) -> int:
    """One run, in the forked process."""
    os.setsid()
    descriptor = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import logging

    for name in (None, "transformers", "trl", "datasets", "accelerate"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
    from misa_engine.cli.main import main

    if request.get("trap"):
        from soak.traps import set_trap

        set_trap(**request["trap"])
    return main(request["argv"])


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever an import prints is no answer
    preload()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answers.write(f"{os.waitstatus_to_exitcode(status)}\n")
            continue
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(request)
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 70
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        answers.write(f"{pid}\n")


if __name__ == "__main__":
    serve()
