"""What a run was started with, kept in each of its checkpoints, so that a resumed run can say what differs.

FREE     take effect from the step at which the run goes on, and are named
FIXED    are refused by name: they would move data or draws under the run's feet
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misa_engine.method.config import MisaConfig

OPTIONS_NAME = "misa_options.json"

#: Training arguments that may change when a run goes on.
FREE = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)
#: Training arguments that decide which samples a step sees.
FIXED = (
    "seed",
    "data_seed",
    "max_length",
    "packing",
    "packing_strategy",
    "completion_only_loss",
    "assistant_only_loss",
    "dataset_text_field",
)
#: Taken from the checkpoint where the command does not give them; their product is what must stay.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
#: Columns that a prepared data set is recognised by.
_COLUMNS = ("input_ids", "labels", "completion_mask", "prompt_ids", "chosen_ids", "rejected_ids")
#: Rows that are looked at, evenly spaced.
_ROWS = 64


@dataclass(frozen=True)
class Differences:
    """What a resumed run would do otherwise than the run whose checkpoint it goes on from, in words."""

    refused: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


def collect(
    args: Any, config: MisaConfig, optimizer: str, train_dataset: Any, residents: str = "none"
) -> dict[str, Any]:
    """Everything that is compared on resume, as plain values.

    Args:
        args: the trainer's arguments.
        config: MISA's options.
        optimizer: "misa" or "adamw".
        train_dataset: as the trainer prepared it.
        residents: format in which what is not drawn rests. Free: masters are exact, whatever the others count as.
    """
    plain = args.to_dict()
    return {
        "free": {**{name: plain[name] for name in FREE if name in plain}, "residents": residents},
        "fixed": {
            **{name: plain[name] for name in FIXED if name in plain},
            "optimizer": optimizer,
            "sequences of a step": args.train_batch_size
            * args.gradient_accumulation_steps
            * getattr(args, "world_size", 1),
            "training data": describe_data(train_dataset),
        },
        "batch": {name: plain[name] for name in BATCH},
        "misa": config.to_dict(),
    }


def describe_data(dataset: Any) -> str | None:
    """Number of samples and a fingerprint of some of them; None for a stream, of which nothing is known."""
    if dataset is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    count = len(dataset)
    digest = hashlib.sha256()
    for index in range(0, count, max(1, count // _ROWS)):
        row = dataset[index]
        if not isinstance(row, Mapping):
            return f"{count:,} samples"
        known = {name: row[name] for name in _COLUMNS if row.get(name) is not None}
        digest.update(json.dumps(known, default=str).encode())
    return f"{count:,} samples (fingerprint {digest.hexdigest()[:8]})"


def write_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Put what ``collect`` gave into a checkpoint."""
    (folder / OPTIONS_NAME).write_text(json.dumps(options, indent=1, default=str), encoding="utf-8")


def read_options(checkpoint: Path) -> dict[str, Any] | None:
    """What the run was started with; None where the checkpoint does not say (older versions, a plain Trainer).

    Raises:
        ValueError: the file is damaged.
    """
    file = checkpoint / OPTIONS_NAME
    if not file.is_file():
        return None
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
        for part in ("free", "fixed", "batch", "misa"):
            options[part].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({type(error).__name__}): resume from another checkpoint") from error
    return dict(options)


def compare(stored: Mapping[str, Any], present: Mapping[str, Any]) -> Differences:
    """Name what differs between a checkpoint's options and those of the run that goes on from it."""

    def lines(part: str) -> tuple[str, ...]:
        now = json.loads(json.dumps(present[part], default=str))
        both = [name for name in now if name in stored[part] and None not in (stored[part][name], now[name])]
        return tuple(
            f"{name}: {stored[part][name]} then, {now[name]} now" for name in both if stored[part][name] != now[name]
        )

    return Differences(refused=lines("fixed"), changed=lines("free"))
