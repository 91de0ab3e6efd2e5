"""What the learning suite trains on and measures: text, instructions and problems that every machine can make.

    text         continued training on documentation: prose of Python's manual and of installed packages' texts
    instruct     "What does shutil.copytree do?" with the first paragraph of its docstring, whole modules held out
    math         word and chain problems of reasoning-gym with their worked solutions; answers are checked

A task also holds text of the base's own kind (the standard library's sources), on which forgetting is measured.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from misa_engine.bench.method import Unavailable
from misa_engine.bench.words import Words
from misa_engine.bench.workload import HELD_OUT, documents
from misa_engine.evaluation.reasoning import TEST_SEED, TRAINING_SEED, final_number, missing, problems
from misa_engine.files import write_whole

#: Label of a token that counts in no loss.
IGNORED = -100
#: Characters of a piece of documentation: pieces are held out whole.
PIECE = 3000
#: Characters of documentation at most.
MOST_TEXT = 1_500_000
#: Problems to train on.
PROBLEMS = 3000


@dataclass(frozen=True)
class Task:
    """Rows are (2, length): token ids, and their labels, IGNORED where nothing is to be learnt."""

    train: Tensor
    """(n, 2, length), shuffled by the run's seed."""
    held_out: Tensor
    """(m, 2, length); the same for every seed."""
    own_kind: Tensor
    """(k, 2, length), text like the base's own."""
    questions: list[tuple[list[int], str | None]]
    """Prompts of held-out problems and what they should answer."""
    digest: str
    """Of the held-out rows: two results compare only where it is the same."""


def load_task(name: str, words: Words, work: str, *, length: int, seed: int, rows: int, questions: int) -> Task:
    """A task in a base's tokens.

    Args:
        name: a key of ``TASKS``.
        words: of the base.
        work: the folder that holds the documentation's text.
        length: tokens of a row.
        seed: of the order of the training rows.
        rows: of held-out text and of the base's own kind, at most.
        questions: held-out problems, at most.

    Raises:
        Unavailable: the task needs a package that is not here.
        ValueError: its text is shorter than one row.
    """
    asked: list[tuple[list[int], str | None]] = []
    if name == "text":
        train, held_out = (packed(texts, words, length) for texts in split(documentation_file(Path(work))))
    elif name == "instruct":
        train, held_out = (answers(pairs, words, length) for pairs in split(instructions(), by=_module))
    else:
        if (why := missing()) is not None:
            raise Unavailable(why)
        train = answers(problems(TRAINING_SEED, PROBLEMS), words, length)
        test = list(islice(problems(TEST_SEED, 2 * max(rows, questions)), max(rows, questions)))
        held_out = answers(test, words, length)
        asked = [(words.prompt(question), final_number(answer)) for question, answer in test[:questions]]
    own = packed(documents("stdlib")[: round(300 * HELD_OUT)], words, length, most=rows)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held_out = held_out[:rows]
    held_out = held_out[(held_out[:, 1] != IGNORED).sum(1).argsort(stable=True)]  # rows of a length together
    return Task(train[order], held_out, own, asked, rows_digest(held_out))


# ---- rows ----


def packed(texts: Iterable[str], words: Words, length: int, most: int | None = None) -> Tensor:
    """Texts one after the other, cut into (n, 2, length); ``most`` rows of them, taken evenly from all texts."""
    texts = list(texts)
    if most is not None:  # no text is tokenised further than it is used
        texts = [text[: 8 * length * (1 + most // max(1, len(texts)))] for text in texts]
    ids = [token for text in texts for token in [*words.encode(text), words.end]]
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, less than one sequence of {length}")
    found = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    if most is not None and len(found) > most:
        found = found[torch.linspace(0, len(found) - 1, most).long()]
    return torch.stack((found, found), dim=1)


def answers(pairs: Iterable[tuple[str, str]], words: Words, length: int) -> Tensor:
    """Questions with answers that fit, one a row (n, 2, length), only the answer's tokens labelled."""
    ids, labels = [], []
    for question, answer in pairs:
        prompt, reply = words.prompt(question), [*words.encode(answer), words.end]
        room = length - len(prompt) - len(reply)
        if room >= 0:
            ids.append(prompt + reply + [words.end] * room)
            labels.append([IGNORED] * len(prompt) + reply + [IGNORED] * room)
    if not ids:
        raise ValueError(f"no question with its answer fits {length} tokens")
    return torch.stack((torch.tensor(ids), torch.tensor(labels)), dim=1)


def rows_digest(rows: Tensor) -> str:
    """Twelve hexadecimal digits: two results compare only where they are the same."""
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:12]


def split(items: Iterable[Any], by: Callable[[Any], str] = str) -> tuple[list[Any], list[Any]]:
    """What is trained on and what is held out, by a hash of each item, so that neither depends on order or seed."""
    parts: tuple[list[Any], list[Any]] = ([], [])
    for item in items:
        share = int.from_bytes(hashlib.sha256(by(item).encode()).digest()[:4], "big") / 2**32
        parts[share < HELD_OUT].append(item)
    return parts


# ---- documentation ----


def documentation_file(work: Path) -> list[str]:
    """The documentation's pieces, kept in ``work`` from their first use on."""
    path = work / "documentation.json"
    if not path.exists():
        write_whole(path, json.dumps(documentation(), indent=0))
    return list(json.loads(path.read_text(encoding="utf-8")))


def documentation() -> list[str]:
    """Prose of Python's manual (pydoc's topics) and of installed packages' descriptions and licences, in pieces."""
    import pydoc_data.topics

    packages = Path(sysconfig.get_paths()["purelib"])
    named = sorted(packages.glob("*.dist-info/METADATA"))
    named += sorted(path for path in packages.glob("*.dist-info/**/*") if re.match("LICEN[CS]E|NOTICE", path.name))
    texts = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    texts += [path.read_text(encoding="utf-8", errors="replace") for path in named if path.is_file()]
    pieces: list[str] = []
    seen: set[str] = set()
    for text in texts:
        piece = ""
        for paragraph in prose(text):
            if paragraph not in seen:  # licences say the same
                seen.add(paragraph)
                piece += paragraph + "\n\n"
            if len(piece) >= PIECE:
                pieces.append(piece)
                piece = ""
        if len(piece) >= PIECE // 10:
            pieces.append(piece)
    random.Random(0).shuffle(pieces)
    total = 0
    return [piece for piece in pieces if (total := total + len(piece)) <= MOST_TEXT]


def prose(text: str) -> Iterator[str]:
    """Paragraphs that are sentences and not code, tables or lists of links; line breaks become spaces."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        plain = sum(letter.isalpha() or letter in " .,'" for letter in line)
        if len(line) >= 80 and line.isascii() and plain >= 0.94 * len(line) and ". " in line + " ":
            yield line


# ---- questions ----


def _module(pair: tuple[str, str]) -> str:
    return pair[0].split("`")[1].rpartition(".")[0]


def instructions() -> Iterator[tuple[str, str]]:
    """Questions about the standard library's functions and classes, answered by their docstrings. Imports none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")) + sorted(root.glob("[a-z]*/*.py")):
        package = path.relative_to(root).parts[0]
        if package in ("test", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "ensurepip"):
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            body = ast.parse(path.read_text(encoding="utf-8")).body
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                said = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if 40 <= len(said) <= 300 and said.isascii():
                    kind = "class" if isinstance(node, ast.ClassDef) else "function"
                    yield f"What is the {kind} `{module}.{node.name}` of Python for?", said


TASKS = {
    "text": "continued training on documentation",
    "instruct": "questions about the standard library answered by its docstrings",
    "math": "word and chain problems of reasoning-gym, answers checked",
}
