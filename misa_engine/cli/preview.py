"""What a run is going to do, before it does: units, budget, first draw and bytes, without building the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from misa_engine.errors import bad_input
from misa_engine.method.config import MisaConfig

if TYPE_CHECKING:
    from torch import nn

    from misa_engine.planner.coverage import Coverage


def preview_adamw(model: nn.Module) -> str:
    """The baseline: all parameters, four copies of them."""
    total = sum(parameter.numel() for parameter in model.parameters())
    size = sum(parameter.nbytes for parameter in model.parameters())
    memory = {"weights": size, "gradients": size, "exp_avg": size, "exp_avg_sq": size}
    return f"AdamW on all {total:,} parameters\n\n{memory_table(memory)}"


def preview(
    model: nn.Module, config: MisaConfig, *, fresh: bool = True, checkpointing: bool = True, accumulation: int = 1
) -> str:
    """Check model and options as the optimizer will, and describe what it will do. Allocates nothing on the device.

    Args:
        model: on the device where it will train, nothing frozen.
        config: MISA's options.
        fresh: the run begins; a resumed one goes on with the draw of its checkpoint, so that none is shown.
        checkpointing: layers are computed again, of which a rest rule's cost is a part.
        accumulation: micro-batches of a step, one of which moves what rests.

    Raises:
        UserError: the model cannot be trained, a pattern matches nothing, or the budget is too small.
    """
    from misa_engine.cli.plan import rest_line
    from misa_engine.engine.groups import build_groups
    from misa_engine.engine.guards import check_model, check_sparse, common_dtype
    from misa_engine.engine.residents import card_bytes, residents_of, resting_names
    from misa_engine.engine.rest import can_rest
    from misa_engine.engine.shards import is_sharded, most_elements
    from misa_engine.kernels.backend import choose_backend
    from misa_engine.method.partition import check_budget, partition_for
    from misa_engine.method.sampling import ImportanceTracker, static_weights
    from misa_engine.planner.plan import optimizer_bytes
    from misa_engine.planner.resting import rest_bytes, step_cost

    residents = residents_of(model)
    with bad_input():
        check_model(model, resting_names(model))
        parts = partition_for(model, config)
        budget = check_budget(parts, config.delta)
        named = dict(model.named_parameters())
        rests = can_rest(model, parts, config)
        names = (*parts.always, *(name for unit in parts.units for name in unit.params), *rests)
        trained = {name: named[name] for name in dict.fromkeys(names)}
        dtype = common_dtype(trained)
        check_sparse(model, trained)
        choose_backend(config.backend, (residents or next(iter(trained.values()))).device)
        build_groups(model, trained, config)
        weights = static_weights(parts.units, config.static_weights)
        tracker = ImportanceTracker([unit.numel for unit in parts.units], budget, config, weights)
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        parts.describe(),
        "",
        f"delta {config.delta:.4g}: at most {budget:,} of {total:,} parameters train at a time, redrawn "
        f"every {config.inner_steps} steps (preset {config.preset}, rule {config.rule})",
    ]
    if config.rest != "none":
        cost = step_cost(model, parts, rests, config, budget, checkpointing=checkpointing)
        lines.append(rest_line(config, len(rests), cost, accumulation))
    if fresh:
        drawn = [parts.units[index] for index in tracker.draw()]
        size = sum(unit.numel for unit in drawn)
        lines.append(f"first draw: {len(drawn)} units, {size:,} parameters, {size / budget:.1%} of the budget:")
        lines += [f"  {unit.name}  {unit.numel:,}" for unit in drawn]
    memory = {"weights": card_bytes(model)}
    if residents is not None:
        lines.append(residents.describe())
        memory |= residents.bytes()
    rows = {name: most_elements(parameter) for name, parameter in named.items() if is_sharded(parameter)}
    memory |= optimizer_bytes(parts, config, dtype, residents=residents is not None, rows=rows or None)
    memory["rest"] = rest_bytes(model, rests)
    return "\n".join([*lines, "", memory_table(memory)])


def coverage_of(trainer: Any) -> Coverage:
    """How often a trainer's run will visit its weights.

    Args:
        trainer: a MisaMixin with its data prepared; a stream needs ``max_steps``.
    """
    from misa_engine.method.partition import check_budget, partition_for
    from misa_engine.planner.coverage import Coverage, run_length

    args, misa, data = trainer.args, trainer.misa_config, trainer.train_dataset
    steps = run_length(
        len(data) if hasattr(data, "__len__") else 0,
        args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        epochs=args.num_train_epochs,
        drop_last=args.dataloader_drop_last,
        steps=args.max_steps,
    )
    parts = partition_for(trainer.model, misa)
    drawable = sum(unit.numel for unit in parts.units)
    return Coverage.of(misa, steps, drawable=drawable, budget=check_budget(parts, misa.delta))


def memory_table(categories: dict[str, int]) -> str:
    """Bytes by category, largest unit that keeps three digits, with the sum of those on the device (not ``host_…``)."""

    def size(count: int) -> str:
        unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB") if count >= 2**20 else (2**10, "KiB")
        return f"{count / unit:>10,.2f} {name}"

    lines = ["memory, without activations:"]
    lines += [f"  {name.replace('_', ' '):<24} {size(count)}" for name, count in categories.items() if count]
    on_device = sum(count for name, count in categories.items() if not name.startswith("host_"))
    return "\n".join([*lines, f"  {'together':<24} {size(on_device)}"])
