"""partition(): gives every parameter of a model exactly one place: in a unit, always trained, or frozen.

Patterns (``always_train``, ``frozen``) select parameters by name. See ``matches`` for names and ``_select`` for kinds.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Context, Decimal
from fnmatch import fnmatchcase

from torch import nn

from misa_engine.method.config import CHOICES, MisaConfig, check_choice
from misa_engine.method.structure import Parameter, place_in_layers, read, recognise


@dataclass(frozen=True)
class Unit:
    """The smallest thing that the sampler turns on or off."""

    name: str
    """The parameter's full name at module granularity, otherwise the common prefix (virtual for OPT's and BERT's MLP:
    ``model.decoder.layers.3.mlp`` holds fc1 and fc2)."""
    numel: int
    """Number of its parameters, n_u."""
    layer: int | None
    """Number of its layer; None outside the layers."""
    kind: str
    """q, k, v, o, qkv, gate, up, down, fc_in, experts_down, router, embedding …; attention, mlp; layer."""
    params: tuple[str, ...]
    """Full names of its parameters, in the model's order."""


@dataclass(frozen=True)
class Partition:
    """Where every parameter of a model has its place. Names are those of ``model.named_parameters()``."""

    units: tuple[Unit, ...]
    always: tuple[str, ...]
    """Parameters trained in every step, outside the budget."""
    frozen: tuple[str, ...]
    """Parameters that are never trained."""
    family: str
    """Row of FAMILIES, or "inferred"."""
    inferred: bool
    total: int
    """N: all parameters, tied ones counted once."""
    granularity: str = "module"
    container: str | None = None
    """Name of the list of layers; None when the model has none and only outside matrices are units."""
    notes: tuple[str, ...] = ()
    """What was inferred or left out, in sentences."""
    new: tuple[str, ...] = ()
    """Parameters that the checkpoint did not hold (a classifier): always trained unless ``frozen`` names them."""
    numels: Mapping[str, int] = field(default_factory=dict, repr=False, hash=False)
    """Size of every parameter, by name."""

    def describe(self) -> str:
        """What was recognised and where the parameters went, as lines of plain text."""

        def share(numel: int) -> str:
            return f"{numel:,} ({numel / self.total:.1%})"

        in_units = sum(unit.numel for unit in self.units)
        layers = {unit.layer for unit in self.units} - {None}
        place = f" in {len(layers)} layers ({self.container or 'the root'})" if layers else ""
        lines = [
            f"family: {self.family}; granularity: {self.granularity}; {len(self.units)} units{place}",
            *(f"note: {note}" for note in self.notes),
            f"parameters: {self.total:,}, of which {share(in_units)} in units",
        ]
        for title, names in (("always trained", self.always), ("frozen", self.frozen)):
            lines.append(f"{title}: {share(sum(self.numels[name] for name in names))}{_summary(names)}")
        lines.append(f"{'kind':<24} {'units':>6} {'parameters in each':>28} {'share of all':>13}")
        kinds: dict[str, list[int]] = defaultdict(list)
        for unit in self.units:
            kinds[unit.kind].append(unit.numel)
        for kind, sizes in kinds.items():
            each = f"{min(sizes):,}" + (f" to {max(sizes):,}" if min(sizes) < max(sizes) else "")
            lines.append(f"{kind:<24} {len(sizes):>6} {each:>28} {sum(sizes) / self.total:>13.1%}")
        return "\n".join(lines)


def partition(
    model: nn.Module,
    granularity: str = "module",
    *,
    always_train: Sequence[str] = (),
    frozen: Sequence[str] = (),
    include_outside: bool = False,
    family: str | None = None,
) -> Partition:
    """Divide the parameters of ``model`` into units, always trained ones and frozen ones.

    One piece, a third of it this text: each step narrows the same table.

    Args:
        model: Any module; also on the meta device, since only names and shapes are read.
        granularity: ``module``: a unit is one matrix of a layer, whose norms and biases are frozen unless
            ``always_train`` names them. ``block``: everything below a layer's attention or MLP. ``layer``: everything
            in a layer.
        always_train: Patterns of parameters that are trained in every step. They are no part of any unit.
        frozen: Patterns of parameters that are never trained.
        include_outside: Make a unit of each matrix outside the layers, too (embeddings, head).
        family: Row of FAMILIES to read the model with; None goes by ``model.config.model_type`` and infers if need be.

    Raises:
        ValueError: unknown granularity or family, a family that does not fit, a pattern without a match, a parameter
            both always trained and frozen, a model without repeated layers, or nothing left to be a unit.
    """
    check_choice("granularity", granularity, CHOICES["granularity"])
    always_train = (always_train,) if isinstance(always_train, str) else tuple(always_train)
    frozen = (frozen,) if isinstance(frozen, str) else tuple(frozen)
    table = read(model)
    name, row, container, notes = recognise(model, table, family, include_outside)
    table = place_in_layers(table, row, container)
    if name != "inferred":
        unnamed = sorted({p.below for p in table if p.matrix and p.layer is not None and row.kind(p.below) is None})
        if unnamed:
            notes.append(f"not in the row {name!r}, taken as matrices of their own kind: {', '.join(unnamed)}")

    always = _select(table, always_train, "always_train")
    never = _select(table, frozen, "frozen")
    if both := [p.name for p in table if p.name in always and p.name in never]:
        raise ValueError(
            f"always_train and frozen both claim {len(both)} parameters, among them {', '.join(both[:3])}. "
            "Narrow one of the patterns."
        )
    new = tuple(p.name for p in table if p.new and p.name not in never)
    if new:
        notes.append(f"{describe_new(new)} trained in every step")
        always |= set(new)
    sampled = [p for p in table if p.name not in always and p.name not in never]
    units = _gather(sampled, granularity, container, include_outside)
    if not units:
        raise ValueError(
            f"nothing is left to be sampled: frozen={frozen} and always_train={always_train} take every matrix of "
            f"{container or 'the model'}. Narrow them."
            + (f" ({describe_new(new)} always trained: is it the right checkpoint?)" if new else "")
        )
    inside = {key for unit in units for key in unit.params}
    result = Partition(
        units=units,
        always=tuple(p.name for p in table if p.name in always),
        frozen=tuple(p.name for p in table if p.name not in always and p.name not in inside),
        family=name,
        inferred=name == "inferred",
        total=sum(p.numel for p in table),
        granularity=granularity,
        container=container,
        notes=tuple(notes),
        new=new,
        numels={p.name: p.numel for p in table},
    )
    _check_places(model, result)
    return result


def partition_for(model: nn.Module, config: MisaConfig) -> Partition:
    """``partition`` with the options of ``config``; raises as it does."""
    return partition(
        model,
        config.granularity,
        always_train=config.always_train,
        frozen=config.frozen,
        include_outside=config.include_outside,
        family=config.family,
    )


def describe_new(names: Sequence[str]) -> str:
    """The beginning of a sentence about parameters that the model's checkpoint did not hold."""
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return f"not in the checkpoint that the model was loaded from, so new and untrained: {shown};"


def _gather(table: list[Parameter], granularity: str, container: str | None, include_outside: bool) -> tuple[Unit, ...]:
    """Put parameters into their units, in the order in which the model names them."""
    members: dict[str, list[Parameter]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for parameter in table:
        place = _unit_of(parameter, granularity, container, include_outside)
        if place is not None:
            unit_name, kinds[unit_name] = place
            members[unit_name].append(parameter)
    return tuple(
        Unit(key, sum(p.numel for p in group), group[0].layer, kinds[key], tuple(p.name for p in group))
        for key, group in members.items()
    )


def check_budget(partition: Partition, delta: float) -> int:
    """floor(δ·N), the number of parameters that may be active at a time.

    The product is the float one, so that a caller's own ``active <= delta * N`` agrees to the last parameter.

    Raises:
        ValueError: some unit alone exceeds the budget and could never be trained.
    """
    budget = math.floor(delta * partition.total)
    largest = max(partition.units, key=lambda unit: unit.numel)
    if largest.numel <= budget:
        return budget
    advice = [f"delta={_smallest_delta(largest.numel, partition.total)} is the smallest that works"]
    if partition.granularity != "module":
        matrix = max(partition.numels[name] for unit in partition.units for name in unit.params)
        advice.append(f"granularity='module' needs {_smallest_delta(matrix, partition.total)}")
    if largest.layer is None:
        advice.append("or list it in always_train or frozen")
    raise ValueError(
        f"delta={delta} allows {max(budget, 0):,} of the model's {partition.total:,} parameters at a time, fewer than "
        f"its largest unit has: {largest.name!r} with {largest.numel:,} ({largest.numel / partition.total:.3%}). "
        f"{'; '.join(advice)}."
    )


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` selects ``name``.

    * With ``*``, ``?`` or ``[`` it is shell style and must match the whole name: ``model.layers.[0-3].*``.
    * With a dot it must be a run of whole components: ``layers.3`` is in ``model.layers.3.mlp``, not in
      ``model.layers.31.mlp``.
    * A single word must occur in a component, in either case: ``norm`` is in ``input_layernorm``, ``embed`` in
      ``embed_tokens``. A number must be the component.
    """
    if any(char in pattern for char in "*?["):
        return fnmatchcase(name, pattern)
    if "." in pattern:
        return f".{pattern}." in f".{name}."
    words = name.lower().split(".")
    if not pattern or pattern.isdigit():
        return pattern in words
    return any(pattern.lower() in word for word in words)


def _select(table: Sequence[Parameter], patterns: Sequence[str], option: str) -> set[str]:
    """Names of the parameters that any pattern selects, under any of their names.

    A word that is a kind in this model selects that kind and nothing else, so that ``attention`` is the attention
    (not Llama's ``post_attention_layernorm``), ``norm`` finds GPT-2's ``ln_1``, and ``head`` finds a tied head.
    """
    kinds = {label for p in table for label in p.labels}
    selected: set[str] = set()
    for pattern in patterns:
        if pattern in kinds:
            found = {p.name for p in table if pattern in p.labels}
        else:
            found = {p.name for p in table if any(matches(pattern, alias) for alias in (p.name, *p.aliases))}
        if not found:
            words = kinds | {part for p in table for alias in p.aliases for part in alias.split(".")}
            close = difflib.get_close_matches(pattern, words | {p.name for p in table}, n=3)
            raise ValueError(
                f"{option}: the pattern {pattern!r} matches no parameter of the model."
                + (f" Close: {', '.join(close)}." if close else "")
                + f" Kinds to choose from: {', '.join(sorted(kinds))}; otherwise a name, a part of it or a shell "
                "pattern such as 'model.layers.0.*'."
            )
        selected |= found
    return selected


def _unit_of(p: Parameter, granularity: str, container: str | None, include_outside: bool) -> tuple[str, str] | None:
    """(name, kind) of the unit that ``p`` belongs to; None when it belongs to none."""
    if p.layer is None:
        return (p.name, p.kind) if include_outside and p.matrix else None
    if granularity == "module":
        return (p.name, p.kind) if p.matrix else None
    prefix = f"{container}.{p.layer}" if container else str(p.layer)
    if granularity == "layer":
        return prefix, "layer"
    return (f"{prefix}.{p.block.name}".rstrip("."), p.block.kind) if p.block else None


def _check_places(model: nn.Module, result: Partition) -> None:
    """Assert that the model's parameters are the disjoint union of units, always trained and frozen ones."""
    places = Counter([*(name for unit in result.units for name in unit.params), *result.always, *result.frozen])
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    misplaced = [name for name in sizes.keys() | places.keys() if places[name] != 1 or name not in sizes]
    assert not misplaced, f"parameters without exactly one place: {sorted(misplaced)[:5]}"
    assert result.total == sum(sizes.values()), "N must count every parameter once"
    assert all(unit.numel == sum(sizes[name] for name in unit.params) for unit in result.units), "a unit's size is off"


def _smallest_delta(numel: int, total: int) -> float:
    """The share ``numel / total`` rounded up to four digits, further where floats fall short of the product."""
    context = Context(prec=4, rounding=ROUND_CEILING)
    share = context.divide(Decimal(numel), Decimal(total))
    while math.floor(float(share) * total) < numel:
        share = context.next_plus(share)
    return min(float(share), 1.0)


def _summary(names: Sequence[str]) -> str:
    """``names`` with the layers' numbers starred, each form once with its count."""
    forms = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in names)
    return "".join(f"\n  {form}" + (f" ({count})" if count > 1 else "") for form, count in forms.items())
