"""The ``misa`` command: ``misa train``, ``misa plan``, ``misa bench`` and ``misa report``.

Exit codes: 0 done, 2 bad input, 130 interrupted, 1 anything else; no traceback without ``--debug``. Torch and TRL are
imported inside the commands, so that ``misa --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from misa_engine.errors import DONE, UserError, did_you_mean, exit_code

USAGE = """\
usage: misa <command> [options]

  misa train    train a causal language model with MISA     (misa train --help)
  misa plan     bytes by category and what fits a card   (misa plan --help)
  misa bench    memory, speed and loss beside the baselines (misa bench --help)
  misa profile  trace, time and bytes by phase, overhead    (misa profile --help)
  misa report   draw the pictures of a run again            (misa report OUT)

  --version     print the version
  --debug       with any command: full traceback when something fails

Try it without any model or data: misa train --demo"""


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
        print(_one_line(error, debug), file=sys.stderr)
        return exit_code(error)


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return DONE if words else exit_code(UserError())
    if words[0] in ("-V", "--version"):
        print(f"misa_engine {metadata.version('misa_engine')}")
        return DONE
    command = COMMANDS.get(words[0])
    if command is None:
        raise UserError(f"unknown command {words[0]!r}.{did_you_mean(words[0], COMMANDS)} See misa --help.")
    return command(words[1:])


def _take_debug(words: list[str]) -> bool:
    """Take our bare ``--debug`` out; SFTConfig's own takes a value (``--debug underflow_overflow``)."""
    for place, word in enumerate(words):
        if word == "--debug" and (place + 1 == len(words) or words[place + 1].startswith("-")):
            del words[place]
            return True
    return False


def _one_line(error: BaseException, debug: bool) -> str:
    if isinstance(error, KeyboardInterrupt):
        return f"misa: interrupted{f': {error}' if str(error) else ''}"
    text = " ".join(str(error).split()) or type(error).__name__
    if exit_code(error) == 2:
        return f"misa: error: {text}"
    if type(error).__name__ == "OutOfMemoryError":
        text = (
            "the GPU is out of memory. Lower --per_device_train_batch_size (raise --gradient_accumulation_steps "
            f"instead), --max_length or --delta; keep gradient checkpointing on. ({text})"
        )
    elif type(error).__name__ != "CheckpointError":
        text = f"{type(error).__name__}: {text}"
    return f"misa: failed: {text}" + ("" if debug else "\n(--debug shows where)")


# ---- misa train ----


def train(words: list[str]) -> int:
    """``misa train``: parse, check, train, save, report."""
    from misa_engine.cli import arguments
    from misa_engine.cli import help as train_help

    switches, options = _front_options(words)
    if switches.help:
        print(train_help.help_text())
        return DONE
    if switches.help_all:
        print(f"{train_help.help_text()}\n\n{train_help.all_sft_options()}")
        return DONE
    if switches.demo:
        return _demo(options)
    _need("trl", "train")
    parsed = arguments.parse_train(options, switches.config)
    from misa_engine.cli.train import run

    return run(parsed, switches.config)


def _front_options(words: list[str]) -> tuple[Any, list[str]]:
    """The few options that are not part of a run's configuration."""
    from misa_engine.cli.parsing import Parser

    parser = Parser("misa train", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--help_all", "--help-all", action="store_true")
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--config")
    return parser.parse_known_args(words)


def _demo(options: list[str]) -> int:
    place = {}
    if options:
        if options[0].split("=")[0] not in ("--output_dir", "--output-dir") or len(options) > 2:
            raise UserError(f"--demo takes --output_dir OUT and nothing else; got {' '.join(options)}")
        place["output_dir"] = options[0].partition("=")[2] or (options[1] if len(options) == 2 else "")
        if not place["output_dir"]:
            raise UserError("--output_dir needs a directory")
    from misa_engine.cli.arguments import set_environment

    set_environment({})
    from misa_engine.cli.demo import run_demo

    return run_demo(**place)


def _need(package: str, extra: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"{package} is not installed: pip install 'misa_engine[{extra}]'")


# ---- misa plan ----


def plan(words: list[str]) -> int:
    """``misa plan``: bytes by category and what fits, before anything is loaded."""
    from misa_engine.cli.plan import run_plan

    return run_plan(words)


# ---- misa bench ----


def bench(words: list[str]) -> int:
    """``misa bench``: MISA beside what one would use instead."""
    from misa_engine.bench.command import run

    return run(words)


# ---- misa profile ----


def profile(words: list[str]) -> int:
    """``misa profile``: where a step of MISA or of a baseline spends its time and memory."""
    _need("transformers", "train")
    from misa_engine.bench.profile_command import run

    return run(words)


# ---- misa report ----


def report(words: list[str]) -> int:
    """``misa report OUT``: the end table and the pictures, from the run log alone."""
    if words in (["-h"], ["--help"]):
        print("usage: misa report OUT\n\nPrints the table of a run and draws its pictures from OUT/misa_log.jsonl.")
        return DONE
    if len(words) != 1 or words[0].startswith("-"):
        raise UserError(f"misa report takes one thing, the output directory of a run; got {' '.join(words) or 'none'}")
    _need("matplotlib", "train")
    from misa_engine.cli.train import draw, show_table
    from misa_engine.report.log import RunLog

    out = Path(words[0]).expanduser()
    if not out.exists():
        raise UserError(f"{out} does not exist; name the --output_dir of a run.")
    entries = RunLog.read(out)
    if any(entry["type"] == "switch" for entry in entries):
        show_table(entries)
    draw(out)
    return DONE


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "plan": plan,
    "bench": bench,
    "profile": profile,
    "report": report,
}

if __name__ == "__main__":
    sys.exit(main())
