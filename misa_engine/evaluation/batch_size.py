"""How many sequences of a forward pass fit: the planner's formulas without anything that trains, then halving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from misa_engine.planner.activations import SLACK_BYTES, DecoderShape, MicroBatch, peak

T = TypeVar("T")
R = TypeVar("R")
#: Larger batches bring nothing: on a GPU the matrices are busy, a CPU is busy with a few.
MOST_ON_GPU, MOST_ON_CPU = 64, 8
#: Where there are no formulas; memory that ends halves it.
WITHOUT_FORMULAS = 8
#: Of a CPU's free memory: what else runs there wants some, too.
CPU_SHARE = 0.5


def forward_bytes(shape: DecoderShape, batch: int, length: int, *, beams: int = 1, generates: bool = False) -> int:
    """Bytes of a pass that trains nothing, weights excluded.

    Args:
        shape: the model's.
        batch: sequences.
        length: tokens of each, new ones included.
        beams: copies of each sequence in a beam search.
        generates: keys and values are kept, and only the last token's logits made; otherwise those of all tokens.
    """
    rows = batch * beams
    micro_batch = MicroBatch(
        batch=rows, length=length, checkpointing=False, gemm_gradients=False, padded=True,
        loss="chunked" if generates else "plain",
    )  # fmt: skip
    total = peak(shape, micro_batch, {}).total
    if generates:  # keys and values in bfloat16, twice while a beam search reorders them; logits and scores in float32
        cache = 4 * shape.key * shape.layers * rows * length
        total += cache * (2 if beams > 1 else 1) + 10 * rows * shape.vocabulary
    return total


def batch_that_fits(model: Any, *, length: int, beams: int = 1, generates: bool = False) -> int:
    """The largest batch whose pass fits what is free beside the loaded model; at least 1.

    Args:
        model: loaded, on its device.
        length: tokens of the longest sequence, new ones included.
        beams: of a beam search.
        generates: see ``forward_bytes``.
    """
    device = next(model.parameters()).device
    shape = DecoderShape.of(model.config.get_text_config())
    most = MOST_ON_GPU if device.type == "cuda" else MOST_ON_CPU
    if shape is None:
        return min(most, WITHOUT_FORMULAS)
    # the formulas count two bytes a number
    scale = next(model.parameters()).element_size() / 2
    room = free_bytes(device) / scale
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = forward_bytes(shape, middle, length, beams=beams, generates=generates) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low


def free_bytes(device: torch.device) -> float:
    """Memory of a device that a pass may take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached - SLACK_BYTES
    import psutil

    return CPU_SHARE * psutil.virtual_memory().available


def in_batches(items: Sequence[T], batch: int, run: Callable[[Sequence[T]], R]) -> Iterator[tuple[int, Sequence[T], R]]:
    """Run over items in batches, which are halved whenever memory does not suffice.

    Args:
        items: in the order of the batches; the largest first, so that it is known at once.
        batch: items of a batch, to begin with.
        run: takes the items of a batch.

    Yields:
        Size of batches now, the items of one, what ``run`` made of them.

    Raises:
        BaseException: what ``run`` raised, where it is not memory or the batch is one item.
    """
    start = 0
    while start < len(items):
        part = items[start : start + batch]
        try:
            made = run(part)
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            batch = smaller(batch, error)
            continue
        start += len(part)
        yield batch, part, made


def smaller(batch: int, error: BaseException) -> int:
    """Half the batch after memory did not suffice.

    Raises:
        BaseException: the error itself, where it says something else or the batch is one sequence.
    """
    if not out_of_memory(error) or batch <= 1:
        raise error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return batch // 2


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ended: CUDA's has a class of its own, a CPU's a text."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
