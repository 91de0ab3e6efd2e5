"""What a MISA checkpoint holds, how it is checked, and how it is put back.

Layout of ``state_dict()["misa"]``, plain Python values and tensors only:

    version, config, units [[name, numel]], total      identify the run; compared before anything is loaded
    tracker                                            scores, visits, generator, active set, round
    inner_step, total_steps, skipped_steps, empty_steps    clocks
    slots [[parameter name, first element]]            who lies where in the arena
    buffers {gradients excluded}                       moments and residual bits, up to the last slot
    round {slot_step, slot_measured, tile_sumsq, norm_sums …}   what the round has accumulated so far
    host {name: [step, {category: tensor}]}            what is kept of inactive parameters (host.py)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from misa_engine.engine.active_set import ActiveSet
from misa_engine.engine.arena import Arena, padded
from misa_engine.engine.host import HostStore
from misa_engine.engine.own_state.arena import OwnArena
from misa_engine.engine.rest import RestRule
from misa_engine.engine.sharded.mesh import ShardMesh
from misa_engine.engine.sharded.state import Division, own_progress, whole_progress
from misa_engine.engine.update import ArenaUpdate
from misa_engine.kernels.tiles import BLOCK
from misa_engine.method.config import FREE_ON_LOAD, RETIRED, YOUNGER, MisaConfig
from misa_engine.method.partition import Partition
from misa_engine.method.sampling import ImportanceTracker

VERSION = 2
#: Entries of a state beyond what identifies its run.
CLOCKS = ("inner_step", "total_steps", "skipped_steps")
PROGRESS = frozenset({"tracker", "slots", "buffers", "round", "host", *CLOCKS})


@dataclass(frozen=True)
class Parts:
    """What an optimizer consists of, as far as a checkpoint knows it."""

    config: MisaConfig
    partition: Partition
    dtype: torch.dtype
    """Of the trained weights."""
    tracker: ImportanceTracker
    arena: Arena
    kernels: ArenaUpdate
    host: HostStore
    active_set: ActiveSet
    rest: RestRule | None
    mesh: ShardMesh | None
    """Over which the weights are sharded."""

    @property
    def division(self) -> Division | None:
        """Who holds parts of the state: it is then put together from all processes, of whole matrices."""
        return self.arena.share if isinstance(self.arena, OwnArena) else self.mesh


class Clocks(NamedTuple):
    """Counters of the optimizer itself."""

    inner_step: int
    total_steps: int
    skipped_steps: int
    empty_steps: int


def pack(parts: Parts, clocks: Clocks) -> dict[str, Any]:
    """Collect everything beyond torch's parameter groups; tensors are references."""
    progress = _progress(parts, clocks)
    if (division := parts.division) is not None:
        progress |= whole_progress(progress, division, parts.partition, parts.tracker.budget)
    return {**_identity(parts), **progress}


def _identity(parts: Parts) -> dict[str, Any]:
    """What a checkpoint must share with the optimizer that loads it."""
    return {
        "version": VERSION,
        "config": {name: value for name, value in parts.config.to_dict().items() if name not in FREE_ON_LOAD},
        "units": [[unit.name, unit.numel] for unit in parts.partition.units],
        "always": list(parts.partition.always),
        "total": parts.partition.total,
        "dtype": str(parts.dtype),
    }


def _progress(parts: Parts, clocks: Clocks) -> dict[str, Any]:
    arena = parts.arena
    return {
        "tracker": parts.tracker.state_dict(),
        **clocks._asdict(),
        "slots": [[name, slot.start] for name, slot in zip(arena.names, arena.slots, strict=True)],
        "buffers": {name: arena.stretch(buffer, 0, arena.used) for name, buffer in _buffers(arena).items()},
        "round": _round_tensors(parts),
        "host": parts.host.state_dict(),
    }


def _for_this_process(parts: Parts, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state as this process can hold it: its parts, where several hold some. ``checked`` sees what is damaged."""
    if (division := parts.division) is None:
        return state_dict
    try:
        return {**state_dict, "misa": own_progress(state_dict["misa"], division, parts.arena)}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError):
        return state_dict


def checked(parts: Parts, groups: Sequence[Mapping[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Refuse a state that does not belong to this optimizer.

    Args:
        parts: of the optimizer.
        groups: its parameter groups.
        state_dict: what is to be loaded.

    Returns:
        It, with the parts of this process where several hold some.

    Raises:
        ValueError: with everything that differs, one difference a line.
    """
    state_dict = _for_this_process(parts, state_dict)
    saved = state_dict.get("misa")
    if saved is None:
        raise ValueError(
            "this optimizer state was not written by MISA: it has no 'misa' entry "
            f"(found {', '.join(map(repr, state_dict)) or 'nothing'}). Resume with the optimizer that wrote it, or "
            "start from the model weights alone."
        )
    if not isinstance(saved, Mapping) or saved.get("version") != VERSION:
        found = saved.get("version") if isinstance(saved, Mapping) else type(saved).__name__
        raise ValueError(f"MISA state of version {found}; this release reads version {VERSION}")
    here = _identity(parts)
    if lacking := sorted((PROGRESS | here.keys()) - saved.keys()):
        raise ValueError(
            f"the optimizer state is damaged: it lacks {', '.join(lacking)}. Resume from another checkpoint."
        )
    differences = _differences(here, saved)
    there_groups = state_dict.get("param_groups") or []
    if len(there_groups) != len(groups):
        differences.append(f"parameter groups: {len(there_groups)} in the checkpoint, {len(groups)} here")
    if differences:
        raise ValueError(
            "the checkpoint belongs to another run, so continuing would not be the same training:\n  - "
            + "\n  - ".join(differences)
            + "\nUse the options of the checkpoint, or start anew from its model weights."
        )
    if (damage := _group_damage(there_groups, groups) or _damage(parts, saved)) is not None:
        raise ValueError(
            f"the optimizer state is damaged: {damage}. Resume from another checkpoint, or start anew from the weights."
        )
    return state_dict


def _differences(here: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What a checkpoint does not share with the optimizer that loads it, one a line."""
    options = {**YOUNGER, **saved["config"]}
    differences = [
        f"{option}: {options.get(option)!r} in the checkpoint, {value!r} here"
        for option, value in here["config"].items()
        if options.get(option) != value
    ]
    differences += [
        f"{option}: {saved['config'][option]!r} in the checkpoint, always {only!r} here"
        for option, only in RETIRED.items()
        if saved["config"].get(option, only) != only
    ]
    differences += [
        f"{what}: {saved[key]} in the checkpoint, {here[key]} here"
        for key, what in (("total", "parameters of the model"), ("dtype", "dtype of the trained weights"))
        if saved[key] != here[key]
    ]
    there, now = dict(map(tuple, saved["units"])), dict(map(tuple, here["units"]))
    changed = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    if changed:
        name = changed[0]
        differences.append(
            f"units: {len(changed)} differ, for instance {name} with {there.get(name, 'no')} parameters in the "
            f"checkpoint and {now.get(name, 'no')} here"
        )
    if saved["always"] != here["always"]:
        differences.append(f"always trained: {saved['always']} in the checkpoint, {here['always']} here")
    return differences


def _group_damage(saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> str | None:
    for index, (there, here) in enumerate(zip(saved, groups, strict=True)):
        if lacking := sorted(here.keys() - there.keys()):
            return f"parameter group {index} lacks {', '.join(lacking)}"
        if len(there["params"]) != len(here["params"]):
            return f"parameter group {index} has {len(there['params'])} parameters, {len(here['params'])} here"
        numbers = (there["lr"], there["eps"], there["weight_decay"], *there["betas"])
        if not all(isinstance(value, (int, float, Tensor)) and math.isfinite(value) for value in numbers):
            return f"parameter group {index} has settings that are no finite numbers: {numbers}"
    return None


def _damage(parts: Parts, saved: Mapping[str, Any]) -> str | None:
    """What is wrong with the progress that a state holds, although its run is this one; None when nothing is."""
    try:
        parts.tracker.check(saved["tracker"])
        clocks = [int(saved[name]) for name in CLOCKS]
        names, starts = [name for name, _ in saved["slots"]], [int(start) for _, start in saved["slots"]]
    except (TypeError, ValueError) as error:
        return str(error)
    if min(clocks) < 0 or not clocks[0] < int(saved["tracker"]["round_length"]):
        return f"the clocks say step {clocks[0]} of a round of {saved['tracker']['round_length']}"
    units = parts.partition.units
    active = {name for index in saved["tracker"]["active"] for name in units[index].params}
    if len(names) != len(set(names)) or set(names) != active | set(parts.partition.always):
        return "its slots are not those of its active units"
    end = 0
    for name, start in zip(names, starts, strict=True):
        if start < end or start % BLOCK:
            return f"the slot of {name} begins at element {start}, before the end of the last one or inside a block"
        end = start + padded(parts.active_set.numel(name))
    if end > parts.arena.capacity:
        return f"its slots end at element {end:,} of {parts.arena.capacity:,}"
    expected = {name: parts.arena.stretch(buffer, 0, end) for name, buffer in _buffers(parts.arena).items()}
    held = {f"buffers[{name!r}]": (saved["buffers"].get(name), like) for name, like in expected.items()}
    held |= {f"round[{name!r}]": (saved["round"].get(name), like) for name, like in _round_tensors(parts).items()}
    for what, (tensor, like) in held.items():
        if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
            return f"{what} is {_kind(tensor)}, expected {_kind(like)}"
    return parts.host.damage(saved["host"], parts.active_set.numel)


def _kind(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def unpack(parts: Parts, clocks: Clocks, saved: dict[str, Any]) -> Clocks:
    """Put a checked state back: same slots, same contents. Returns the clocks to go on with.

    Raises:
        ValueError: the state refers to this optimizer's own buffers, which have moved on since.
    """
    if _is_live(parts, saved):
        here = _progress(parts, clocks)
        if any(saved[key] != here[key] for key in ("inner_step", "total_steps", "slots")):
            raise ValueError(
                "this state_dict() holds references to the optimizer's live buffers, which training has changed since. "
                "Take a snapshot with copy.deepcopy(optimizer.state_dict()) or torch.save."
            )
        return clocks  # accelerate hands an optimizer its own state while preparing it
    parts.tracker.load_state_dict(saved["tracker"])
    parts.active_set.bind([name for name, _ in saved["slots"]], {}, [start for _, start in saved["slots"]])
    for name, buffer in _buffers(parts.arena).items():
        buffer[: saved["buffers"][name].numel()].copy_(saved["buffers"][name])
    for name, tensor in _round_tensors(parts).items():
        tensor.copy_(saved["round"][name])
    parts.host.load_state_dict(saved["host"])
    parts.active_set.forget_weights()
    return Clocks(*(int(saved.get(name, 0)) for name in Clocks._fields))  # empty_steps is younger than version 2


def _is_live(parts: Parts, saved: dict[str, Any]) -> bool:
    return bool(saved["round"]["slot_step"].data_ptr() == parts.arena.table.slot_step.data_ptr())


def _buffers(arena: Arena) -> dict[str, Tensor]:
    named = arena.buffers()
    named.pop("gradients", None)  # dead between two steps
    named.pop("active_weights", None)  # the model's own checkpoint has them
    return named


def _round_tensors(parts: Parts) -> dict[str, Tensor]:
    table = parts.arena.table
    return {
        "slot_step": table.slot_step,
        "slot_measured": table.slot_measured,
        "tile_sumsq": parts.arena.tile_sumsq,
        "norm_sums": parts.kernels.norm_sums,
        "skipped_on_device": parts.kernels.control.skipped_steps,
        **({} if parts.rest is None else parts.rest.round_tensors()),
    }
