"""How a model is built: its parameters, its list of layers, and the blocks in each layer.

A family's row says where to look; without one the repeated layers are found by their numbered names.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from misa_engine.method.families import (
    FAMILIES,
    INFERRED,
    Block,
    Family,
    family_named,
    family_of,
    lies_below,
    outside_kind,
)

#: Components that torch.compile and the checkpoint and FSDP1 wrappers insert into names.
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True)
class Parameter:
    """One parameter as the partition sees it."""

    name: str
    aliases: tuple[str, ...]  # every name it goes by (tied weights), without WRAPPERS; the first is its own
    path: str  # its own alias without a final .weight or .bias: the module, or the parameter of a fused expert
    numel: int
    matrix: bool  # 2-D, or 3-D as fused experts are, and neither a bias nor a norm
    lookup: bool  # the table of an nn.Embedding
    kind: str
    labels: frozenset[str]  # its kinds, for patterns: q, attention, norm, bias, embedding, head …
    layer: int | None = None
    below: str = ""  # path below its layer
    block: Block | None = None
    new: bool = False  # the rest of the model was loaded from a checkpoint that did not hold this parameter


def read(model: nn.Module) -> list[Parameter]:
    """All parameters in the model's order, tied ones once."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names[id(tensor)].append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    # from_pretrained marks what it loads; where nothing is marked, nothing is known (a model built from its config)
    loaded = {name for name, tensor in model.named_parameters() if getattr(tensor, "_is_hf_initialized", False)}
    table = []
    for name, tensor in model.named_parameters():
        owners = [modules[alias.rpartition(".")[0]] for alias in names[id(tensor)]]
        aliases = tuple(
            ".".join(part for part in alias.split(".") if part not in WRAPPERS) for alias in names[id(tensor)]
        )
        paths = [alias.removesuffix(".weight").removesuffix(".bias") for alias in aliases]
        # By class where the name says nothing (GPT-2's ln_1), by name where the class is a stranger's.
        norm = "norm" in type(owners[0]).__name__.lower() or "norm" in paths[0].rpartition(".")[2].lower()
        bias = aliases[0].endswith("bias")  # also gate_up_proj_bias, 2-D in gpt-oss
        lookup = isinstance(owners[0], nn.Embedding)
        outside = [outside_kind(path) or ("embedding" if lookup else None) for path in paths]
        labels = {label for label in (*outside, "norm" if norm else None, "bias" if bias else None) if label}
        kind = outside[0] or re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", paths[0])
        matrix = tensor.ndim in (2, 3) and not bias and not norm
        new = bool(loaded) and name not in loaded
        table.append(
            Parameter(name, aliases, paths[0], tensor.numel(), matrix, lookup, kind, frozenset(labels), new=new)
        )
    return table


def _numbered(path: str) -> Iterator[tuple[str, int, str]]:
    """Every way to read ``path`` as (list of layers, number, path below the layer)."""
    parts = path.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            yield ".".join(parts[:position]), int(part), ".".join(parts[position + 1 :])


def recognise(
    model: nn.Module, table: Sequence[Parameter], family: str | None, include_outside: bool
) -> tuple[str, Family, str | None, list[str]]:
    """(name of the family, its row, the list of layers, notes for describe())."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = family_named(family) if family is not None else family_of(model_type)
    repeated = _repeated_lists(table)
    notes: list[str] = []
    if name is not None:
        row = FAMILIES[name]
        fitting: dict[str, Counter[str]] = defaultdict(Counter)
        for p in table:
            for container, _, below in _numbered(p.path):
                kind = row.kind(below)
                if p.matrix and kind and container.rpartition(".")[2] == row.layers:
                    fitting[container][kind] += p.numel
        if fitting:
            # By kinds first: the layers of a vision tower share some names with the language model's.
            container = max(fitting, key=lambda key: (len(fitting[key]), fitting[key].total()))
            return name, row, container, _left_out(repeated, container, table)
        expected = f"{row.layers}.<n>.{row.matrices[0][0]}"
        if family is not None:
            example = next((p.name for p in table if p.matrix), "no matrix at all")
            raise ValueError(
                f"family={family!r} does not fit: no parameter is named like '{expected}.weight' (the model has "
                f"{example}). Name another family, or none to have the layers inferred."
            )
        notes.append(f"config.model_type is {model_type!r}, but no parameter is named like '{expected}.weight'")
    if repeated:
        container = max(repeated, key=lambda key: repeated[key])
        notes.append(
            f"inferred: {'no family is known for ' + repr(model_type) if model_type else 'the model names no family'}; "
            f"took {container or 'the numbered children of the root'!r}, the repeated layers with the most parameters, "
            "and in them every 2-D or 3-D weight"
        )
        return "inferred", INFERRED, container, notes + _left_out(repeated, container, table)
    if not include_outside:
        raise ValueError(
            f"found no repeated layers in {type(model).__name__}: no list of at least two numbered children "
            "('layers.0', 'layers.1') with 2-D weights. Set include_outside=True to make every matrix of the model a "
            f"unit, or name the family ({', '.join(FAMILIES)})."
        )
    notes.append("inferred: no repeated layers; every 2-D or 3-D weight of the model is a unit")
    return "inferred", INFERRED, None, notes


def _repeated_lists(table: Iterable[Parameter]) -> dict[str, int]:
    """Lists with at least two numbered children that hold matrices -> size of these matrices."""
    sizes: Counter[str] = Counter()
    numbers: dict[str, set[int]] = defaultdict(set)
    for p in table:
        if p.matrix and not p.lookup:  # a list of embedding tables (one a codebook) is no list of layers
            for container, number, _ in _numbered(p.path):
                sizes[container] += p.numel
                numbers[container].add(number)
    return {container: size for container, size in sizes.items() if len(numbers[container]) > 1}


def _left_out(repeated: Mapping[str, int], container: str, table: Sequence[Parameter]) -> list[str]:
    """A note on the other lists of layers (an encoder, a vision tower) that hold over 1 % of the parameters."""
    total = sum(p.numel for p in table)
    others = [
        key
        for key, size in repeated.items()
        if size > total / 100 and not lies_below(key, container) and not lies_below(container, key)
    ]
    outermost = [key for key in others if not any(key != other and lies_below(key, other) for other in others)]
    return [
        f"{key!r} repeats layers, too ({repeated[key]:,} parameters), but only {container!r} is sampled; "
        "include_outside=True makes units of its matrices"
        for key in outermost
    ]


def place_in_layers(table: Sequence[Parameter], row: Family, container: str | None) -> list[Parameter]:
    """Add layer, path below it, kind and block to the parameters inside the layers."""
    placed: list[Parameter] = []
    for p in table:
        found = next(((number, below) for key, number, below in _numbered(p.path) if key == container), None)
        if found is None:
            placed.append(p)
            continue
        number, below = found
        own = {label for label in p.labels if label in ("norm", "bias")}
        # Experts that are separate modules share a kind, or the importance map would have a column for each.
        kind = row.kind(below) or re.sub(r"(experts?)\.\d+", r"\1.*", below) or "weight"
        labels = frozenset(own if "norm" in own else own | {kind})
        placed.append(replace(p, layer=number, below=below, kind=kind, labels=labels, block=row.block(below)))
    # Blocks that the row does not name: the children of the layer that hold matrices.
    children: dict[str, set[str]] = defaultdict(set)
    for p in placed:
        if p.matrix and p.layer is not None and p.block is None:
            children[_child(p.below)].add(p.below)
    blocks = {child: Block(_block_kind(child, paths), child, (child,)) for child, paths in children.items()}
    for index, p in enumerate(placed):
        block = p.block or (blocks.get(_child(p.below)) if p.layer is not None else None)
        if block is not None:
            placed[index] = replace(p, block=block, labels=p.labels | {block.kind})
    return placed


def _child(below: str) -> str:
    """First component below the layer, with its number if it is a list (T5's ``layer.0``)."""
    found = re.match(r"[^.]*(\.\d+)?(?=\.|$)", below)
    return found.group() if found else below


def _block_kind(child: str, paths: Iterable[str]) -> str:
    """Attention or mlp, guessed from the names of the matrices below ``child``; its own name otherwise."""
    text = " ".join(paths).lower()
    if re.search(r"attn|attention", text):
        return "attention"
    return "mlp" if re.search(r"mlp|ffn|feed_?forward|moe|expert|dense|\bfc|\bff", text) else child or "layer"
