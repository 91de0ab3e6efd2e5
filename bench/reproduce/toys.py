"""Small data in the data sets' own files and fields, and a model of 0.2M parameters: ``--scale tiny`` in a folder.

Made from Python's standard library and from a seeded generator, so that every machine makes the same. What comes of
training on it says that an experiment runs, and nothing of how well a method learns.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from misa_engine.bench.cases import Case, Report, Row
from misa_engine.bench.tasks import instructions
from misa_engine.cli.demo_data import no_progress_bars, standard_library

#: Records of a toy training file, and of a toy test file.
TRAIN, TEST = 160, 6
#: A matrix of an MLP is 4.8% of it, so that δ 1% times TINY's factor still holds one.
MODEL = {
    "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 4096, "initializer_range": 0.12,
}  # fmt: skip
_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn")
_THINGS = ("apples", "books", "coins", "stamps", "shells")
DONE = "done"


@dataclass(frozen=True, kw_only=True)
class ToyCase(Case):
    """Make all of it in ``folder``, unless it is there."""

    kind: ClassVar[str] = "toys"
    folder: str

    def run(self, row: Row, report: Report) -> None:
        """Data first, the model last."""
        make_toys(Path(self.folder))


def make_toys(folder: Path) -> None:
    """Write ``folder``/data and ``folder``/models/tiny; what is complete stays."""
    if (folder / DONE).exists():
        return
    for write in (_llm_adapters, _alpaca, _c4, _mt_bench, _lm_eval):
        write(folder / "data")
    _model(folder / "models" / "tiny")
    (folder / DONE).write_text("", encoding="utf-8")


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _llm_adapters(data: Path) -> None:
    root = data / "LLM-Adapters"
    math = [_problem(number) for number in range(TRAIN)]
    sense = [_statement(number) for number in range(TRAIN)]
    _put(root / "ft-training_set/math_10k.json", json.dumps(math, indent=1))
    _put(root / "ft-training_set/commonsense_170k.json", json.dumps(sense, indent=1))
    for task in ("gsm8k", "SVAMP", "mawps"):
        _put(root / f"dataset/{task}/test.json", json.dumps([_problem(10_000 + n) for n in range(TEST)]))
    _put(root / "dataset/AQuA/test.json", json.dumps([_problem(20_000 + n, options=True) for n in range(TEST)]))
    for task, kind in (
        ("boolq", "true/false"), ("piqa", "solution"), ("social_i_qa", "answer"), ("hellaswag", "ending"),
        ("winogrande", "option"), ("ARC-Easy", "answer"), ("ARC-Challenge", "answer"), ("openbookqa", "answer"),
    ):  # fmt: skip
        _put(root / f"dataset/{task}/test.json", json.dumps([_statement(30_000 + n, kind) for n in range(TEST)]))


def _problem(number: int, options: bool = False) -> dict[str, Any]:
    """A word problem with its solution, as MATH10K's records and the test sets' have it."""
    rng = random.Random(number)
    first, second = rng.randint(2, 9), rng.randint(2, 9)
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    total = first + second
    asked = f"{name} has {first} {thing} and gets {second} more. How many {thing} does {name} have now?"
    answer: Any = float(total)
    if options:
        shown = [total + shift for shift in (-1, 1, 0, 2, 3)]
        asked += " Answer Choices: " + " ".join(f"({letter}) {n}" for letter, n in zip("ABCDE", shown, strict=True))
        answer = "C"
    said = f"{first} + {second} = {total}. The answer is {'C' if options else total}."
    return {"instruction": asked, "input": "", "output": said, "answer": answer}


def _statement(number: int, kind: str = "true/false") -> dict[str, Any]:
    """A question with a closed set of answers, as commonsense_170k's records and the test sets' have it."""
    rng = random.Random(number)
    first, second = rng.sample(range(2, 30), 2)
    if kind == "true/false":
        answer = str(first < second).lower()
        asked = (
            "Please answer the following question with true or false, question: "
            f"is {first} less than {second}?\n\nAnswer format: true/false"
        )
    else:
        right = 1 if first < second else 2
        answer = f"{kind}{right}"
        named = "/".join(f"{kind}{place}" for place in (1, 2))
        asked = (
            f"Please choose the correct {kind} to the question: Which number is less?\n\n"
            f"{kind.capitalize()}1: {first} {kind.capitalize()}2: {second}\n\nAnswer format: {named}"
        )
    return {"instruction": asked, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def _alpaca(data: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"instruction": asked, "input": "", "output": said, "text": f"{asked}\n{said}"}
        for asked, said in islice((pair for pair in instructions() if sum(map(len, pair)) < 160), TRAIN)
    ]
    path = data / "alpaca-gpt4/data/train-00000-of-00001-toy.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _c4(data: Path) -> None:
    texts = [text[:4000] for text in islice(standard_library(0), 80)]
    folder = data / "c4/en"
    folder.mkdir(parents=True, exist_ok=True)
    _gz(folder / "c4-train.00000-of-01024.json.gz", texts[8:])
    _gz(folder / "c4-validation.00000-of-00008.json.gz", texts[:8])


def _gz(path: Path, texts: Iterable[str]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        for number, text in enumerate(texts):
            where = {"timestamp": "2019-04-25T12:57:54Z", "url": f"file:///{number}"}
            lines.write(json.dumps({"text": text, **where}) + "\n")


def _mt_bench(data: Path) -> None:
    asked = [
        {"question_id": 81 + number, "category": category, "turns": [first, second]}
        for number, (category, first, second) in enumerate(
            (
                ("writing", "Describe a lake in one sentence.", "Now in five words."),
                ("math", "What is 3 + 4?", "Double it."),
            )
        )
    ]
    _put_lines(data / "mt_bench/question.jsonl", asked)


def _lm_eval(data: Path) -> None:
    """A subject of MMLU, MMLU-Pro and IFEval in the hub data sets' layout."""
    for split in ("dev", "test"):
        lines = [_question(50_000 + n) for n in range(TEST)]
        kept = [{name: one[name] for name in ("question", "subject", "choices", "answer")} for one in lines]
        _put_lines(data / f"cais/mmlu/anatomy/{split}.jsonl", kept)
    for split in ("validation", "test"):
        kept = []
        for number in range(TEST):
            one = _question(60_000 + number)
            said = f"A: Let's think step by step. The answer is ({'ABCD'[one['answer']]})."
            kept.append({
                "question_id": number, "question": one["question"], "options": one["choices"],
                "answer": "ABCD"[one["answer"]], "answer_index": one["answer"],
                "cot_content": said if split == "validation" else "", "category": "math", "src": "toy",
            })  # fmt: skip
        _put_lines(data / f"TIGER-Lab/MMLU-Pro/{split}.jsonl", kept)
    asked = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    kept = [{"key": n, "prompt": f"Count to {n + 2}. Use no commas.", **asked} for n in range(TEST)]
    _put_lines(data / "google/IFEval/train.jsonl", kept)


def _question(number: int) -> dict[str, Any]:
    """A sum with four answers to choose from."""
    rng = random.Random(number)
    first, second = rng.randint(2, 9), rng.randint(2, 9)
    answer = rng.randrange(4)
    choices = [str(first + second + place - answer) for place in range(4)]
    return {"question": f"What is {first} + {second}?", "subject": "anatomy", "choices": choices, "answer": answer}


def _put_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    _put(path, "".join(json.dumps(record) + "\n" for record in records))


def _model(directory: Path) -> None:
    """Random weights and a tokenizer of bytes, which needs no files of anyone."""
    import torch
    from transformers import AddedToken, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = ByT5Tokenizer(eos_token=AddedToken("</s>", lstrip=False, rstrip=False), extra_ids=0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = LlamaConfig(**MODEL, **ends, vocab_size=len(tokenizer), tie_word_embeddings=False)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with no_progress_bars():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
