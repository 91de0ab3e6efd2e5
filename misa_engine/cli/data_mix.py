"""Several data sets as one: held-out records taken from each, weights applied, shapes compared, and all of it said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from misa_engine.cli.data import LoadedData, hold_out
from misa_engine.cli.record_formats import RecordFormat
from misa_engine.errors import UserError


@dataclass(frozen=True)
class Mixture:
    """Training data put together from one or more data sets, and what was held out of it."""

    train: Any
    held_out: Any
    format: RecordFormat
    """Of the first data set; the others have the same columns."""
    text_only: bool
    """Whether all are plain text files."""
    lines: tuple[str, ...]
    """What was taken of each data set; empty for a single one, taken once."""


def mix(
    parts: Sequence[LoadedData], names: Sequence[str], weights: Sequence[float], *, fraction: float | None, seed: int
) -> Mixture:
    """Put data sets together.

    Args:
        parts: the data sets.
        names: of them, as the user gave them.
        weights: how many times each record of a data set is taken, one number each, or none. A share of a data set (0.5
            of it, or the half of 1.5) is drawn by ``seed``.
        fraction: share of each data set that is held out, before weights: no record is trained on and held out.
        seed: of the draws.

    Raises:
        UserError: another number of weights than of data sets, a weight that leaves nothing, streams, or other columns.
    """
    if weights and len(weights) != len(parts):
        raise UserError(
            f"--dataset_weights gives {len(weights)} numbers for {len(parts)} data sets ({', '.join(names)}): give one "
            "for each, in their order."
        )
    if bad := [weight for weight in weights if not 0 < weight < 1e6]:
        raise UserError(f"--dataset_weights: a weight is how many times a data set is taken, above 0; got {bad[0]:g}")
    if len(parts) > 1 or weights:
        check_same_shape(parts, names)
    trained, held, lines = [], [], []
    for part, name, weight in zip(parts, names, weights or [1.0] * len(parts), strict=True):
        dataset = part.dataset
        if fraction is not None:
            dataset, out = hold_out(dataset, fraction, seed)
            held.append(out)
        trained.append(_taken(dataset, weight, seed, name))
        if len(parts) > 1 or weights:
            lines.append(_line(name, len(dataset), weight, len(trained[-1])))
    return Mixture(
        together(trained),
        together(held) if held else None,
        parts[0].format,
        all(part.text_only for part in parts),
        tuple(lines),
    )


def together(datasets: Sequence[Any]) -> Any:
    """One data set after the other; raises UserError where their columns hold different things."""
    if len(datasets) == 1:
        return datasets[0]
    from datasets import concatenate_datasets

    try:
        return concatenate_datasets(list(datasets))
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the data sets cannot be put together: {reason}. Bring them to one shape.") from error


def check_same_shape(parts: Sequence[LoadedData], names: Sequence[str]) -> None:
    """Raise UserError for streams and for data sets whose columns are not the same."""
    if any(not hasattr(part.dataset, "__len__") for part in parts):
        raise UserError("--dataset_streaming reads one data set, as it is: name one --dataset, without weights.")
    columns = [sorted(part.dataset.column_names) for part in parts]
    for name, part, found in zip(names, parts, columns, strict=True):
        if found != columns[0]:
            raise UserError(
                f"{names[0]} holds {parts[0].format.name} ({', '.join(columns[0])}) and {name} holds "
                f"{part.format.name} ({', '.join(found)}): bring them to one shape, or train on one after the other."
            )


def _taken(dataset: Any, weight: float, seed: int, name: str) -> Any:
    if weight == 1:
        return dataset
    import numpy as np

    count = len(dataset)
    whole = int(weight)
    some = round((weight - whole) * count)
    if not whole and not some:
        raise UserError(f"--dataset_weights: {weight:g} of the {count:,} records of {name} is none. Raise the weight.")
    drawn = np.sort(np.random.default_rng(seed).permutation(count)[:some])
    return dataset.select(np.concatenate([*[np.arange(count)] * whole, drawn]))


def _line(name: str, count: int, weight: float, taken: int) -> str:
    if weight == 1:
        return f"data set {name}: {count:,} records"
    unused = f", {count - taken:,} are left out (drawn by --seed)" if weight < 1 else ""
    return f"data set {name}: {count:,} records x {weight:g} = {taken:,}{unused}"
