"""What a run shows while it trains: one line that is rewritten on a terminal, plain lines in a file."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from command import make_workplace, words
from misa_engine.cli.live_line import LiveLine
from misa_engine.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")

ARGS: Any = SimpleNamespace(device=torch.device("cpu"))


def state(step: int) -> Any:
    return SimpleNamespace(global_step=step, max_steps=6, is_world_process_zero=True)


def drive(line: LiveLine) -> None:
    """Two steps with a log line, an evaluation and the Trainer's own summary."""
    line.on_train_begin(ARGS, state(0), None)  # type: ignore[arg-type]
    for step, loss in ((1, 2.5), (2, 2.25)):
        line.on_step_end(ARGS, state(step), None)  # type: ignore[arg-type]
        logs = {"loss": loss, "learning_rate": 1e-5, "grad_norm": 1.0, "num_tokens": 100.0 * step, "entropy": 3.0}
        line.on_log(ARGS, state(step), None, {**logs, "misa/active_share": 0.03, "misa/coverage": 0.5})  # type: ignore[arg-type]
    line.on_prediction_step(ARGS, state(2), None, eval_dataloader=[1, 2])  # type: ignore[arg-type]
    line.on_log(ARGS, state(2), None, {"eval_loss": 2.125, "eval_runtime": 1.0})  # type: ignore[arg-type]
    line.on_log(ARGS, state(2), None, {"train_runtime": 1.0, "train_loss": 9.0})  # type: ignore[arg-type]


def test_a_file_gets_a_plain_line_for_each_log_step() -> None:
    out = io.StringIO()
    line = LiveLine(Console(file=out, soft_wrap=True))
    with line.shown():
        drive(line)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in out.getvalue()
    shape = (
        r"step 1/6  loss 2\.5000  lr 1e-05  grad norm 1  [\d,]+ tokens/s  peak \d+\.\d\d GiB  ETA \d+:\d\d  "
        r"active 3\.0%  visited 50%"
    )
    assert re.fullmatch(shape, lines[0]), lines[0]
    assert lines[2] == "evaluation at step 2: loss 2.1250"


def test_a_terminal_has_one_line_and_messages_above_it() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    line = LiveLine(console)
    logger = logging.getLogger("misa_engine")
    handler = logging.StreamHandler(io.StringIO())
    before = handler.stream
    logger.addHandler(handler)
    try:
        with line.shown():
            drive(line)
            logger.warning("round 1 at step 2: left a; came b")
        logger.warning("after the run")
    finally:
        logger.removeHandler(handler)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "round 1 at step 2" in shown and "evaluation at step 2: loss 2.1250" in shown
    assert shown.rindex("step 2/6  loss 2.2500") > shown.index("round 1 at step 2"), "the line stands below"
    assert before.getvalue() == "after the run\n", "afterwards the handlers write where they did"


def test_a_resumed_run_does_not_count_the_steps_and_tokens_of_before() -> None:
    out = io.StringIO()
    line = LiveLine(Console(file=out, soft_wrap=True))
    line.on_train_begin(ARGS, state(4), None)  # type: ignore[arg-type]
    line.on_step_end(ARGS, state(5), None)  # type: ignore[arg-type]
    line.on_log(ARGS, state(5), None, {"loss": 1.0, "num_tokens": 1e9})  # type: ignore[arg-type]
    assert "tokens/s" not in out.getvalue() and "ETA 0:00" in out.getvalue()


def test_a_run_prints_lines_and_no_dictionaries_or_bars(tmp_path: Path, tmp_path_factory, capsys) -> None:
    place = make_workplace(tmp_path, tmp_path_factory.mktemp("cache"))
    capsys.readouterr()
    assert main(words(place, tmp_path / "out", eval_fraction=0.2, max_steps=2)) == 0
    shown = capsys.readouterr()
    assert "step 2/2  loss " in shown.out and "evaluation at step 0: loss" in shown.out
    assert "{'loss'" not in shown.out and "%|" not in shown.err
    assert shown.out.count("trains on the CPU") == 1
