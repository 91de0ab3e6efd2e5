"""What is searched: ranges of options of ``misa train``, the paper's by name or the user's own.

As ``--space`` takes them:

learning_rate                the paper's range
learning_rate=1e-6..1e-4     between the two, in logarithms if they are a factor of 10 or more apart
delta=0.01..0.1:linear       ... or as said: :linear, :log
eta=0.1,0.5,1                one of these
batch=8,16,32                sequences of an optimizer step: gradient_accumulation_steps follows

``batch`` is no option of misa train: it is micro-batch times accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from misa_engine.errors import UserError, did_you_mean

Value = int | float | bool | str

#: Not an option of misa train: micro-batch times accumulation.
BATCH = "batch"
BATCH_PARTS = ("per_device_train_batch_size", "gradient_accumulation_steps")
#: A trial's own, or what would make trials incomparable.
FIXED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "dataset", "eval_dataset", "config")
OURS = "ours: the paper's tables do not vary it; "


@dataclass(frozen=True)
class Dimension:
    """One option and where it is searched."""

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    whole: bool = False
    """Whole numbers only."""
    choices: tuple[Value, ...] = ()
    """Instead of a range."""
    source: str = ""
    """Where the range comes from."""

    def suggest(self, trial: Any) -> Value:
        """A value, from an optuna trial."""
        if self.choices:
            return trial.suggest_categorical(self.name, self.choices)
        if self.whole:
            return trial.suggest_int(self.name, int(self.low or 0), int(self.high or 0), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def contains(self, value: Any) -> bool:
        """Whether a value lies in it."""
        if self.choices:
            return value in self.choices
        low, high = self.ends
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and float(low) <= value <= float(high)

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that are tried out before a study begins: all choices, or both ends."""
        if self.choices:
            return self.choices
        low, high = float(self.low or 0), float(self.high or 0)
        return (int(low), int(high)) if self.whole else (low, high)

    def describe(self) -> str:
        """In one line, as it could be given."""
        if self.choices:
            return f"{self.name}={','.join(map(_text, self.choices))}"
        low, high = self.ends
        return f"{self.name}={_text(low)}..{_text(high)}:{'log' if self.log else 'linear'}"

    def to_dict(self) -> dict[str, Any]:
        """For the study's settings: what it searches, without where that comes from."""
        found = {key: value for key, value in asdict(self).items() if key != "source"}
        return {**found, "choices": list(self.choices)}


#: The paper's search ranges (arXiv 2511.00056), and ours around its settings where it gives none.
PAPER: dict[str, Dimension] = {
    space.name: space
    for space in (
        Dimension("learning_rate", 1e-6, 2e-4, log=True, source="the paper's search range, 2e-4 ... 1e-6"),
        Dimension("eta", choices=(0.1, 0.5, 1.0), source="the paper's search range"),
        Dimension("delta", choices=(0.01, 0.03, 0.06, 0.12), source=f"{OURS}0.03 in all of its fine-tuning"),
        Dimension("inner_steps", choices=(10, 25, 50, 100, 200), source=f"{OURS}T = 50 in its runs"),
        Dimension(BATCH, choices=(8, 16, 32), source=f"{OURS}the published code trains with 2 x 8"),
    )
}


def parse_space(texts: Sequence[str], known: Iterable[str], micro_batch: int) -> tuple[Dimension, ...]:
    """The dimensions that the user named, or the paper's.

    Args:
        texts: of ``--space``: ``NAME``, ``NAME=RANGE``, or a YAML file that maps names to ranges.
        known: options of misa train.
        micro_batch: sequences of a forward pass, which ``batch`` must be a multiple of.

    Raises:
        UserError: an option is unknown, a range is none, or something is named twice.
    """
    known = set(known)
    found: dict[str, Dimension] = {}
    for name, text in _pairs(texts) or [(name, None) for name in PAPER]:
        name = name.replace("-", "_")
        _check_name(name, known)
        if name in found:
            raise UserError(f"--space names {name} twice: give one range.")
        if text is None and name not in PAPER:
            ranges = f"{name}=LOW..HIGH or {name}=A,B,C"
            raise UserError(f"--space {name}: the paper searches {', '.join(PAPER)}. Give a range: {ranges}.")
        space = PAPER[name] if text is None else _dimension(name, text)
        found[name] = _batches(space, micro_batch, own=text is not None) if name == BATCH else space
    return tuple(found.values())


def settings_of(values: Mapping[str, Value], micro_batch: int) -> dict[str, Value]:
    """Options of misa train for the values of a trial: ``batch`` becomes gradient_accumulation_steps."""
    settings = dict(values)
    if BATCH in settings:
        settings["gradient_accumulation_steps"] = int(settings.pop(BATCH)) // micro_batch
    return settings


def _check_name(name: str, known: set[str]) -> None:
    if name in FIXED:
        raise UserError(f"--space {name}: that is the same in all trials, or they could not be compared.")
    if name not in known and name != BATCH:
        hint = did_you_mean(name, {*known, BATCH})
        raise UserError(f"--space {name}: misa train has no such option.{hint}")


def _pairs(texts: Sequence[str]) -> list[tuple[str, str | None]]:
    pairs: list[tuple[str, str | None]] = []
    for text in texts:
        name, sign, range_ = text.partition("=")
        if not sign and Path(text).suffix in (".yaml", ".yml"):
            pairs += _file(Path(text).expanduser())
        else:
            pairs.append((name.strip().lstrip("-"), range_.strip() if sign else None))
    return pairs


def _file(path: Path) -> list[tuple[str, str | None]]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--space {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"--space {path} must hold 'option: range' lines (learning_rate: 1e-6..1e-4).")
    listed = {name: ",".join(map(str, text)) if isinstance(text, list) else text for name, text in content.items()}
    return [(str(name), None if text is None else str(text)) for name, text in listed.items()]


def _dimension(name: str, text: str) -> Dimension:
    source = "given"
    if ".." not in text:
        values = tuple(value_of(word.strip()) for word in text.split(",") if word.strip())
        if len(set(values)) < 2 or len(set(values)) < len(values):
            raise UserError(f"--space {name}={text}: a search needs two or more different values, or LOW..HIGH.")
        return Dimension(name, choices=values, source=source)
    ends, _, scale = text.partition(":")
    low, high = (value_of(word.strip()) for word in (ends.split("..", 1)))
    for value in (low, high):
        if isinstance(value, (bool, str)) or not math.isfinite(value):
            raise UserError(f"--space {name}={text}: LOW..HIGH needs two numbers; got {value!r}.")
    if scale not in ("", "log", "linear"):
        raise UserError(f"--space {name}={text}: after the colon stands log or linear; got {scale!r}.")
    assert not isinstance(low, str) and not isinstance(high, str)
    if not low < high:
        raise UserError(f"--space {name}={text}: the lower end comes first, and is below the upper.")
    if scale == "log" and low <= 0:
        raise UserError(f"--space {name}={text}: a logarithmic range begins above 0.")
    log = scale == "log" or (scale == "" and low > 0 and high >= 10 * low)
    whole = isinstance(low, int) and isinstance(high, int)
    return Dimension(name, float(low), float(high), log=log, whole=whole, source=source)


def _batches(space: Dimension, micro_batch: int, *, own: bool) -> Dimension:
    """``batch`` in multiples of the micro-batch."""
    if not space.choices:
        raise UserError(f"--space {BATCH} takes single values ({BATCH}=8,16,32), multiples of the micro-batch.")
    whole = [size for size in space.choices if isinstance(size, int) and not isinstance(size, bool) and size > 0]
    fitting = tuple(size for size in whole if size % micro_batch == 0)
    if own and fitting != space.choices:
        raise UserError(
            f"--space {space.describe()}: a batch is a multiple of per_device_train_batch_size, here {micro_batch}."
        )
    if len(fitting) < 2:
        fitting = (micro_batch, 2 * micro_batch, 4 * micro_batch)
    return Dimension(BATCH, choices=fitting, source=space.source)


def value_of(word: str) -> Value:
    """A number or a truth value where the word is one, else the word."""
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(word.lower(), word)


def _text(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
