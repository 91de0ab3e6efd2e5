"""What a trained model is asked: the tasks of ``misa eval``, and MT-Bench's questions, for a judge elsewhere."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from misa_engine.bench.bases import digest_of
from misa_engine.bench.matrix import file_name
from misa_engine.bench.reproduce.sources import MT_BENCH, PlainWords, files_of, prompt_of
from misa_engine.errors import UserError
from misa_engine.evaluation.adapters import MISA_TOKENS, PLAIN, PREFIX, ROWS
from misa_engine.evaluation.generation import generate
from misa_engine.files import write_whole


def score_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, str],
    data: Path,
    output: Path,
    *,
    name: str,
    questions: int,
    beams: int,
    answer_tokens: int = 0,
) -> tuple[dict[str, float], list[str]]:
    """Percentages by metric as ``misa eval`` finds them, the mean of generated ones as ``average``, and what failed.

    A task that cannot be evaluated leaves a note: what was trained for hours must not be lost with it.

    Args:
        model: trained, in evaluation mode.
        tokenizer: of the model.
        tasks: metric -> task as ``misa eval`` names it.
        data: the data folder.
        output: folder that gets each answer.
        name: of the run.
        questions: of each task, at most; 0 is all.
        beams: of generated answers; 0 is the protocol's own number.
        answer_tokens: of a generated answer, at most; 0 is what the published code of MISA takes.
    """
    from misa_engine.evaluation import Settings, Subject, evaluate

    label = file_name(name, "")
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    subject = Subject(
        label=label, path=label, load_model=lambda: model, load_tokenizer=lambda: tokenizer, dtype=dtype,
        digest=digest_of(model),
    )  # fmt: skip
    scores: dict[str, float] = {}
    notes: list[str] = []
    for metric, task in tasks.items():
        try:
            check_harness([task])
            row = ROWS.get(task.removeprefix(PREFIX)) if task.startswith(PREFIX) else None  # lm-eval's have their own
            tokens = answer_tokens or (MISA_TOKENS[row.kind] if row else None)
            settings = Settings(data=data, limit=questions or None, num_beams=beams or None, new_tokens=tokens)
            found = evaluate([subject], [task], output, settings=settings, say=lambda line: None).of(label, task)
        except Exception as error:  # of whichever task's code; the page says it, and the trained model's loss is kept
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            notes.append(f"{metric} was not scored: {kind}{' '.join(str(error).split())[:300]}")
            continue
        scores[metric] = 100 * next(iter(found.metrics.values())).value
    if scores and not notes and all(task.startswith(PREFIX) for task in tasks.values()):
        scores["average"] = statistics.fmean(scores.values())
    return scores, notes


def check_harness(tasks: Iterable[str]) -> None:
    """Refuse lm-eval's tasks where it is not installed.

    Raises:
        UserError: with the command that installs it.
    """
    from misa_engine.evaluation.harness import INSTALL, installed

    theirs = [task for task in tasks if not task.startswith(PREFIX)]
    if theirs and not installed():
        raise UserError(f"{', '.join(theirs)}: {INSTALL}")


def check_tasks(tasks: Iterable[str], data: Path) -> None:
    """Refuse tasks that cannot be evaluated, before anything is trained.

    Raises:
        UserError: a package or data is missing; the message is the command that gets it.
    """
    from misa_engine.evaluation import Settings
    from misa_engine.evaluation.tasks import tasks_named

    names = list(tasks)
    check_harness(names)
    for task in tasks_named(names):
        task.check([], Settings(data=data))


def answer_judged(model: Any, words: PlainWords, data: Path, path: Path, name: str, *, new_tokens: int) -> int:
    """Answer MT-Bench's questions, both turns, greedily, into ``path`` as FastChat's judge reads them.

    Args:
        model: trained, in evaluation mode.
        words: of the model.
        data: the data folder.
        path: a .jsonl file; written in one go.
        name: ``model_id`` of the answers.
        new_tokens: of a turn, at most.

    Returns:
        How many questions were answered.

    Raises:
        UserError: the questions are not there or are something else.
    """
    (asked,) = files_of(MT_BENCH, data, "MT-Bench")
    device = next(model.parameters()).device
    lines = []
    for line in asked.read_text(encoding="utf-8").splitlines():
        try:
            question = json.loads(line)
            number, turns = question["question_id"], list(question["turns"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{asked} holds a line that is no question of MT-Bench ({error}): get it again.") from error
        said: list[str] = []
        prompt = ""
        for turn in turns:
            if said:
                prompt = f"{prompt}{said[-1]}\n\n{PLAIN.format(turn)}"
            else:
                prompt = prompt_of({"instruction": turn})
            (made,) = generate(
                model, [words.prompt(prompt)], end=words.end, pad=words.end, new_tokens=new_tokens, device=device
            )
            said.append(words.decode(made).strip())
        answer = {"question_id": number, "answer_id": hashlib.sha256(f"{name}{number}".encode()).hexdigest()[:22]}
        answer |= {"model_id": name, "choices": [{"index": 0, "turns": said}], "tstamp": round(time.time(), 1)}
        lines.append(json.dumps(answer))
    write_whole(path, "".join(line + "\n" for line in lines))
    return len(lines)
