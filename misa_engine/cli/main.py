"""The ``misa`` command: finds the module of ``misa train``, ``misa plan`` and the others, and calls it.

Exit codes: 0 done, 2 bad input, 130 interrupted, 1 anything else; no traceback without ``--debug``. Torch and TRL are
imported inside the commands, so that ``misa --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.util import find_spec

from misa_engine.errors import DONE, Stopped, UserError, did_you_mean, exit_code

USAGE = """\
usage: misa <command> [options]

  misa train    train a causal language model with MISA     (misa train --help)
  misa data     what becomes of your records, before any training (misa data --help)
  misa eval     tasks, forgetting, comparison with a base (misa eval --help)
  misa plan     bytes by category and what fits a card   (misa plan --help)
  misa bench    memory, speed and loss beside the baselines (misa bench --help)
  misa profile  trace, time and bytes by phase, overhead    (misa profile --help)
  misa reproduce  the paper's experiments, a page each   (misa reproduce --help)
  misa fetch    a small real model to try things on      (misa fetch --help)
  misa report   draw the pictures of a run again            (misa report OUT)
  misa sweep    search for settings with Optuna             (misa sweep --help)
  misa export   what a model changed against its base       (misa export --help)
  misa apply    base and delta to the model again           (misa apply --help)

  --version     print the version
  --debug       with any command: full traceback when something fails

Try it without any model or data: misa train --demo"""

#: Command -> module, function (words after the command -> exit code), and the package that it cannot do without.
#: By name: the benchmarks stand above the command line and are imported by it only when they are asked for.
COMMANDS: dict[str, tuple[str, str, str | None]] = {
    "train": ("misa_engine.cli.train", "command", None),
    "data": ("misa_engine.cli.data_command", "command", "trl"),
    "eval": ("misa_engine.cli.evaluate", "command", None),
    "plan": ("misa_engine.cli.plan", "command", None),
    "bench": ("misa_engine.bench.command", "run", None),
    "profile": ("misa_engine.bench.command", "profile", "transformers"),
    "reproduce": ("misa_engine.bench.reproduce.command", "run", "yaml"),
    "fetch": ("misa_engine.cli.fetch", "command", None),
    "report": ("misa_engine.cli.report", "command", None),
    "sweep": ("misa_engine.sweep.command", "command", None),
    "export": ("misa_engine.cli.export_command", "export", None),
    "apply": ("misa_engine.cli.export_command", "apply", None),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # before torch is imported: spinning threads turn 0.5 s a step into 5 s where other processes want the same cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = _take_debug(words)
    try:
        return _dispatch(words)
    except BrokenPipeError:  # "misa train --help | head": the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback

            traceback.print_exc()
        rank = os.environ.get("RANK", "0")  # of torchrun and accelerate launch
        if rank == "0" or not isinstance(error, Stopped):
            print(_one_line(error, debug, "" if rank == "0" else f" (rank {rank})"), file=sys.stderr)
        return exit_code(error)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return DONE if words else exit_code(UserError())
    if words[0] in ("-V", "--version"):
        print(f"misa_engine {metadata.version('misa_engine')}")
        return DONE
    if words[0] not in COMMANDS:
        raise UserError(f"unknown command {words[0]!r}.{did_you_mean(words[0], COMMANDS)} See misa --help.")
    module, function, needs = COMMANDS[words[0]]
    if needs is not None and find_spec(needs) is None:
        raise UserError(f"{needs} is not installed: pip install 'misa_engine[train]'")
    return getattr(import_module(module), function)(words[1:])


def _take_debug(words: list[str]) -> bool:
    """Take our bare ``--debug`` out; SFTConfig's own takes a value (``--debug underflow_overflow``)."""
    for place, word in enumerate(words):
        if word == "--debug" and (place + 1 == len(words) or words[place + 1].startswith("-")):
            del words[place]
            return True
    return False


def _one_line(error: BaseException, debug: bool, where: str = "") -> str:
    if isinstance(error, Stopped):
        return f"misa: {error}"
    if isinstance(error, KeyboardInterrupt):
        return f"misa: interrupted{f': {error}' if str(error) else ''}"
    text = " ".join(str(error).split()) or type(error).__name__
    if "weights_only" in text:  # torch advises to switch the protection off
        text = "a file that should hold tensors is damaged or holds something else: restore it from its source"
    if exit_code(error) == 2:
        return f"misa: error{where}: {text}"
    if type(error).__name__ == "OutOfMemoryError":
        text = (
            "the GPU is out of memory. Lower --per_device_train_batch_size (raise --gradient_accumulation_steps "
            f"instead), --max_length or --delta; keep gradient checkpointing on. ({text})"
        )
    elif type(error).__name__ not in ("CheckpointError", "ReplicaError"):
        text = f"{type(error).__name__}: {text}"
    return f"misa: failed{where}: {text}" + ("" if debug else "\n(--debug shows where)")


if __name__ == "__main__":
    sys.exit(main())
