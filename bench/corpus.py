"""Text that every machine has, as rows of token ids: nothing is downloaded.

    stdlib       the sources of the running Python's standard library
    arithmetic   generated problems of addition, subtraction and multiplication
    FILE         any text file

A token is a byte plus 3 (0 to 2 are special), so that every vocabulary of at least 259 holds it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
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
        return _some(standard_library(seed))
    if source == "arithmetic":
        generator = random.Random(seed)
        return ["".join(_problem(generator) for _ in range(64)) for _ in range(2000)]
    try:
        text = Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {source}: neither stdlib, arithmetic nor a readable text file ({error})") from error
    size = 4096
    pieces = [text[start : start + size] for start in range(0, min(len(text), MOST_BYTES), size)]
    if len(pieces) < 20:
        raise ValueError(f"--data {source} holds {len(text)} characters; at least {20 * size} are needed")
    return pieces


def _some(texts: Iterator[str]) -> list[str]:
    chosen, held = [], 0
    for text in islice(texts, 1000):
        chosen.append(text[:65536])
        held += len(chosen[-1])
        if held > MOST_BYTES:
            break
    return chosen


def _problem(generator: random.Random) -> str:
    a, b, sign = generator.randrange(1000), generator.randrange(1000), generator.choice("+-*")
    return f"{a}{sign}{b}={ {'+': a + b, '-': a - b, '*': a * b}[sign] }\n".replace(" ", "")


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
    position = 0
    while True:
        index = torch.arange(position, position + size) % len(data)
        yield data[index].to(device)
        position += size
