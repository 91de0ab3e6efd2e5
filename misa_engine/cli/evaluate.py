"""``misa eval MODEL ... --tasks ...``: models on tasks, compared with each other and with the base."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from misa_engine.cli.arguments import ModelArguments
from misa_engine.cli.hub import check_reachable
from misa_engine.cli.parsing import Parser, names, positive
from misa_engine.errors import DONE, UserError, bad_input
from misa_engine.evaluation import Evaluation, Settings, Subject, evaluate
from misa_engine.evaluation.settings import PROMPTS
from misa_engine.evaluation.subjects import labels
from misa_engine.evaluation.tasks import own_names, tasks_named
from misa_engine.files import check_place

USAGE = "misa eval MODEL [MODEL ...] --tasks NAME[,NAME] --output DIR [--base BASE] [options]"


def command(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    options = _parser().parse_args(words)
    if options.training_problems:
        return write_training_problems(options)
    if not options.models or options.output is None:
        raise UserError("misa eval needs a model and --output DIR. See misa eval --help.")
    output = Path(options.output).expanduser()
    check_place(output, "--output")
    named = {options.base: "--base"} if options.base else {}
    everyone = subjects_of([*named, *options.models], dtype=options.dtype, options=named)
    base, subjects = (everyone[0], everyone[1:]) if options.base else (None, everyone)
    settings = Settings(
        data=Path(options.data).expanduser() if options.data else None, limit=options.limit,
        batch_size=options.batch_size, prompt=options.prompt, num_beams=options.num_beams,
        new_tokens=options.new_tokens, num_fewshot=options.num_fewshot,
    )  # fmt: skip
    evaluation = evaluate(subjects, options.tasks, output, base=base, settings=settings,
        command=shlex.join(["misa", "eval", *words]), say=_say)  # fmt: skip
    into_cards(evaluation, subjects)
    if options.json:
        print(json.dumps(evaluation.to_dict(), indent=2))
    else:
        show(evaluation)
    return DONE


def subjects_of(
    paths: Sequence[str], *, dtype: str | None = None, options: Mapping[str, str] | None = None
) -> list[Subject]:
    """Models as the evaluators take them, looked at but not loaded; tokenizers are loaded to see that they are there.

    Args:
        paths: directories, or ids on the Hub.
        dtype: bfloat16, float32, or None: bfloat16 on a GPU, the checkpoint's own on a CPU.
        options: path -> option that it was given with, for errors; the others were given as they are (MODEL).

    Raises:
        UserError: one of them is no model, or its configuration or tokenizer cannot be read.
    """
    made = []
    for path, label in zip(paths, labels(paths), strict=True):
        made.append(_subject(path, label, dtype, (options or {}).get(path, "MODEL")))
    return made


def _subject(path: str, label: str, dtype: str | None, option: str) -> Subject:
    import torch

    from misa_engine.cli.loading import load_config, load_model, load_tokenizer, resolve_dtype

    arguments = ModelArguments(model_name_or_path=path, dtype=dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(arguments, trust_remote_code=False, option=option)
    check_reachable(path, "tokenizer_config.json", option)
    subject = Subject(
        label, path, lambda: load_model(arguments, device), lambda: load_tokenizer(arguments),
        dtype=str(resolve_dtype(dtype, config, device)).removeprefix("torch."),
    )  # fmt: skip
    assert subject.tokenizer is not None  # loaded here: a model without one is bad input
    return subject


def into_cards(evaluation: Evaluation, subjects: Sequence[Subject]) -> None:
    """Put the results into the cards that misa wrote of the models; a README.md of the user's, or a base's, stays."""
    from misa_engine.cli.model_card import add_results

    for subject in subjects:
        rows = [
            {"task": result.task, "metric": metric, "value": found.value, "stderr": found.stderr}
            for result in evaluation.results if result.model == subject.label
            for metric, found in result.metrics.items()
        ]  # fmt: skip
        try:
            added = add_results(Path(subject.path).expanduser(), rows)
        except (OSError, ValueError) as error:  # the results themselves are safe in the output directory
            _say(f"{subject.label}: its model card was left as it is ({error})")
            continue
        if added:
            _say(f"{subject.label}: results are in its model card")


def show(evaluation: Evaluation) -> None:
    """The tables, and where everything is; wide enough where no terminal sets the width."""
    from rich.console import Console

    from misa_engine.evaluation.page import PAGE
    from misa_engine.evaluation.run import RESULTS
    from misa_engine.evaluation.tables import tables

    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables(evaluation):
        console.print(table)
    print(f"page: {evaluation.output / PAGE}\nresults: {evaluation.output / RESULTS}")


def write_training_problems(options: argparse.Namespace) -> int:
    """Records to train on: problems like those of the reasoning tasks, none of which is evaluated."""
    from misa_engine.evaluation import reasoning

    others = [name for name in options.tasks if not name.startswith(reasoning.PREFIX)]
    if others:
        raise UserError(f"--training_problems are made for reasoning tasks only; got {', '.join(others)}.")
    path = Path(options.training_problems).expanduser()
    if path.exists():
        raise UserError(f"--training_problems {path} exists: name another file, or delete it.")
    check_place(path.parent, "--training_problems")
    tasks_named(options.tasks)
    with bad_input():
        records = reasoning.training_records(options.tasks, options.limit or 3000)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    print(f"{len(records)} problems with solutions: {path}")
    return DONE


def _say(line: str) -> None:
    """Progress goes to stderr, so that --json can be piped."""
    print(line, file=sys.stderr)


def _batch(text: str) -> Any:
    return None if text == "auto" else positive(text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("misa eval", USAGE, __doc__)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="directory or Hub id; several are compared item by item")
    add("--tasks", type=names, required=True, metavar="NAME,...",
        help=f"{', '.join(own_names())}, reasoning:FAMILY of reasoning-gym, or any task of lm-eval")  # fmt: skip
    add("--output", "--output_dir", metavar="DIR", help="results, records and comparisons; a killed call goes on here")
    add("--base", metavar="MODEL", help="the model before training: evaluated too, and what others are compared with")
    add("--data", metavar="DIR", help="local data, in the layout of the hub's data sets")
    add("--limit", type=positive, help="items of a task at most (default: all; of reasoning problems 300)")
    add("--batch_size", type=_batch, default=None, metavar="N|auto", help="sequences of a batch (default: auto, the "
        "planner's; halved when memory ends)")  # fmt: skip
    add("--prompt", choices=PROMPTS, default="task", help="task: each task's own; chat: the model's chat template "
        "everywhere; plain: nowhere (default: task)")  # fmt: skip
    add("--num_beams", type=positive, help="beams of the adapters: tasks (default: 4, as published)")
    add("--new_tokens", type=positive, metavar="N", help="of an answer to the adapters: tasks, at most (default: 32 a "
        "choice, 256 a number, as published; the code of the MISA paper takes 64 and 512)")  # fmt: skip
    add("--num_fewshot", type=int, help="examples in the prompt of lm-eval's tasks (default: the task's own)")
    add("--dtype", help="bfloat16 or float32 (default: bfloat16 on a GPU, the checkpoint's own on a CPU)")
    add("--json", action="store_true", help="print results.json instead of tables")
    add("--training_problems", metavar="FILE.jsonl", help="evaluate nothing; write problems like those of the "
        "reasoning tasks, with solutions, to train on (--limit each, default 3000)")  # fmt: skip
    return parser
