"""What a trained model is asked: the tasks of ``misa eval``, and MT-Bench's questions, for a judge elsewhere."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from misa_engine.bench.reproduce.sources import MT_BENCH, PlainWords, files_of, prompt_of
from misa_engine.errors import UserError


def score_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[str], data: Path, *, questions: int, new_tokens: int
) -> tuple[dict[str, float], list[str]]:
    """Accuracies in percent by task, their mean as ``average``, and what a reader must know.

    Args:
        model: trained, in evaluation mode.
        tokenizer: of the model.
        tasks: as ``misa eval`` names them.
        data: the data folder.
        questions: of each task, at most; 0 is all.
        new_tokens: generated a question, at most; 0 is the task's own number.
    """
    if find_spec("misa_engine.evaluation") is None:
        return {}, [f"not scored ({', '.join(tasks)}): this installation has no misa eval"]
    raise NotImplementedError


@torch.no_grad()
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
                prompt = f"{prompt}{said[-1]}\n\n### Instruction:\n{turn}\n\n### Response:\n"
            else:
                prompt = prompt_of({"instruction": turn})
            said.append(_generate(model, words, prompt, new_tokens))
        answer = {"question_id": number, "answer_id": hashlib.sha256(f"{name}{number}".encode()).hexdigest()[:22]}
        answer |= {"model_id": name, "choices": [{"index": 0, "turns": said}], "tstamp": round(time.time(), 1)}
        lines.append(json.dumps(answer))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    part.replace(path)
    return len(lines)


def _generate(model: Any, words: PlainWords, prompt: str, new_tokens: int) -> str:
    ids: Tensor = torch.tensor([words.prompt(prompt)], device=next(model.parameters()).device)
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, use_cache=True,
        pad_token_id=words.end, eos_token_id=words.end,
    )  # fmt: skip
    return words.decode(made[0, ids.shape[1] :].tolist()).strip()
