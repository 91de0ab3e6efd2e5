"""What a MISA checkpoint holds, how it is checked, and how it is put back.

Layout of ``state_dict()["misa"]``, plain Python values and tensors only:

    version, config, units [[name, numel]], total      identify the run; compared before anything is loaded
    tracker                                            scores, visits, generator, active set, round
    inner_step, total_steps, skipped_steps             clocks
    slots [[parameter name, first element]]            who lies where in the arena
    buffers {gradients excluded}                       moments and residual bits, up to the last slot
    rounds {slot_step, slot_measured, tile_sumsq, norm_sums}   what the round has accumulated so far
    host {name: [step, {category: tensor}]}            what is kept of inactive parameters (host.py)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from misa_engine.method.config import FREE_ON_LOAD, RETIRED

if TYPE_CHECKING:
    from misa_engine.engine.optimizer import MISA

VERSION = 2


def pack(optimizer: MISA) -> dict[str, Any]:
    """Collect everything beyond torch's parameter groups; tensors are references."""
    arena, config = optimizer.arena, optimizer.config.to_dict()
    return {
        "version": VERSION,
        "config": {option: value for option, value in config.items() if option not in FREE_ON_LOAD},
        "units": [[unit.name, unit.numel] for unit in optimizer.units],
        "always": list(optimizer.partition.always),
        "total": optimizer.partition.total,
        "dtype": str(optimizer.dtype),
        "tracker": optimizer.tracker.state_dict(),
        "inner_step": optimizer.inner_step,
        "total_steps": optimizer.total_steps,
        "skipped_steps": optimizer.skipped_steps,
        "slots": [[name, slot.start] for name, slot in zip(arena.names, arena.slots, strict=True)],
        "buffers": {name: arena.stretch(buffer, 0, arena.used) for name, buffer in _buffers(optimizer).items()},
        "round": _round_tensors(optimizer),
        "host": optimizer.host.state_dict(),
    }


def check(optimizer: MISA, state_dict: dict[str, Any]) -> None:
    """Refuse a state that does not belong to this optimizer.

    Raises:
        ValueError: with everything that differs, one difference a line.
    """
    saved = state_dict.get("misa")
    if saved is None:
        raise ValueError(
            "this optimizer state was not written by MISA: it has no 'misa' entry "
            f"(found {', '.join(map(repr, state_dict)) or 'nothing'}). Resume with the optimizer that wrote it, or "
            "start from the model weights alone."
        )
    if saved["version"] != VERSION:
        raise ValueError(f"MISA state of version {saved['version']}; this release reads version {VERSION}")
    here = pack(optimizer)
    differences = [
        f"{option}: {saved['config'].get(option)!r} in the checkpoint, {value!r} here"
        for option, value in here["config"].items()
        if saved["config"].get(option) != value
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
    if len(state_dict["param_groups"]) != len(optimizer.param_groups):
        differences.append(
            f"parameter groups: {len(state_dict['param_groups'])} in the checkpoint, {len(optimizer.param_groups)} here"
        )
    if differences:
        raise ValueError(
            "the checkpoint belongs to another run, so continuing would not be the same training:\n  - "
            + "\n  - ".join(differences)
            + "\nUse the options of the checkpoint, or start anew from its model weights."
        )


def unpack(optimizer: MISA, saved: dict[str, Any]) -> None:
    """Put a checked state back: same slots, same contents, same clocks.

    Raises:
        ValueError: the state refers to this optimizer's own buffers, which have moved on since.
    """
    if _is_live(optimizer, saved):
        here = pack(optimizer)
        if any(saved[key] != here[key] for key in ("inner_step", "total_steps", "slots")):
            raise ValueError(
                "this state_dict() holds references to the optimizer's live buffers, which training has changed since. "
                "Take a snapshot with copy.deepcopy(optimizer.state_dict()) or torch.save."
            )
        return  # accelerate hands an optimizer its own state while preparing it
    optimizer.tracker.load_state_dict(saved["tracker"])
    names = [name for name, _ in saved["slots"]]
    for name in set(optimizer.arena.names) - set(names):
        optimizer._freeze(optimizer._parameters[name])
    optimizer._bind(names, {}, [start for _, start in saved["slots"]])
    for name, buffer in _buffers(optimizer).items():
        buffer[: saved["buffers"][name].numel()].copy_(saved["buffers"][name])
    for name, tensor in _round_tensors(optimizer).items():
        tensor.copy_(saved["round"][name])
    optimizer.host.load_state_dict(saved["host"])
    optimizer.inner_step = int(saved["inner_step"])
    optimizer.total_steps = int(saved["total_steps"])
    optimizer.skipped_steps = int(saved["skipped_steps"])


def _is_live(optimizer: MISA, saved: dict[str, Any]) -> bool:
    return saved["round"]["slot_step"].data_ptr() == optimizer.arena.table.slot_step.data_ptr()


def _buffers(optimizer: MISA) -> dict[str, Tensor]:
    named = optimizer.arena.buffers()
    named.pop("gradients", None)  # dead between two steps
    return named


def _round_tensors(optimizer: MISA) -> dict[str, Tensor]:
    arena = optimizer.arena
    return {
        "slot_step": arena.table.slot_step,
        "slot_measured": arena.table.slot_measured,
        "tile_sumsq": arena.tile_sumsq,
        "norm_sums": optimizer._kernels.norm_sums,
        "skipped_on_device": optimizer._kernels.control.skipped_steps,
    }
