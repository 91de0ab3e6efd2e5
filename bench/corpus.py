"""Text that every machine has, as rows of token ids: nothing is downloaded.

    stdlib       the sources of the running Python's standard library
    arithmetic   generated problems of addition, subtraction and multiplication
    FILE         any text file

A token is a byte plus 3 (0 to 2 are special), so that every vocabulary of at least 259 holds it.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from misa_engine.cli.demo_data import standard_library

#: Share of the documents that is held out; whole documents, so that nothing in it was seen.
HELD_OUT = 0.1
SPECIAL = 3
#: Bytes of text used at most: 40,000 rows of 128.
MOST_BYTES = 5 << 20


def documents(source: str, seed: int = 0) -> list[str]:
    """The texts of a source.

    Args:
        source: "stdlib", "arithmetic", or the path of a text file.
        seed: of the order of documents, or of the problems.

    Raises:
        ValueError: the file cannot be read or is too short to hold something out.
    """
    if source == "stdlib":
        return [text[:65536] for text in itertools.islice(standard_library(seed), 300)]
    if source == "arithmetic":
        generator = random.Random(seed)
        return ["".join(_problem(generator) for _ in range(64)) for _ in range(2000)]
    try:
        text = Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {source}: neither stdlib, arithmetic nor a readable text file ({error})") from error
    pieces = re.findall(r"(?s).{1,4096}", text[:MOST_BYTES])
    if len(pieces) < 20:
        raise ValueError(f"--data {source} holds {len(text)} characters; at least {20 * 4096} are needed")
    return pieces


def _problem(generator: random.Random) -> str:
    problem = f"{generator.randrange(1000)}{generator.choice('+-*')}{generator.randrange(1000)}"
    return f"{problem}={eval(problem)}\n"  # noqa: S307  (our own digits and signs)


@lru_cache(maxsize=4)
def rows(source: str, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of token ids to train on, shuffled, and rows held out; both (n, length) int64."""
    texts = documents(source, seed)
    held_out = max(1, round(HELD_OUT * len(texts)))
    generator = torch.Generator().manual_seed(seed)
    train, test = _packed(texts[held_out:], length), _packed(texts[:held_out], length)
    return train[torch.randperm(len(train), generator=generator)], test


def _packed(texts: list[str], length: int) -> Tensor:
    data = "\0".join(texts).encode()[:MOST_BYTES]
    data = data[: len(data) // length * length]
    if not data:
        raise ValueError(f"the text is shorter than one sequence of {length} bytes")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long().add_(SPECIAL).view(-1, length)


def batches(data: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    """Endless micro-batches (size, length) in the data's order, the same for every method."""
    for position in itertools.count(0, size):
        yield data[torch.arange(position, position + size) % len(data)].to(device)
