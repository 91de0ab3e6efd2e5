"""``misa plan``: what a run will need and what fits a card, from the model's configuration alone."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from misa_engine.cli.parsing import MODEL_FLAGS, Parser, positive, positive_size, truth
from misa_engine.errors import BAD_INPUT, DONE, UserError, bad_input
from misa_engine.method.config import CHOICES, MisaConfig
from misa_engine.planner.activations import LOSSES
from misa_engine.planner.cards import HUB_IDS
from misa_engine.planner.coverage import ENOUGH, Coverage, run_length
from misa_engine.planner.speeds import FORMATS

USAGE = "misa plan --model NAME [--gpu CARD | --max_vram_gb GIB] [options]"
#: Options of MisaConfig that change memory, with the values they take.
MEMORY_OPTIONS = ("granularity", "state_dtype", "grad_dtype", "update_in", "master", "rest", "rest_scope")
#: Others that are taken from the command line where they are given.
OTHER_OPTIONS = ("inner_steps", "rest_lr", "rest_every", "rest_outside")
#: Passes over the data where nobody says, as in misa train.
EPOCHS = 3.0


def command(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    options = _parser().parse_args(words)
    with bad_input():
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    from misa_engine.cli.loading import fitting_length
    from misa_engine.planner.cards import Card
    from misa_engine.planner.worst_case import MetaModel

    _check_length(options)
    misa = _options_of(options)
    _check_cards(options)
    if options.sharded:
        misa = misa.without_own_rest()
    if options.length is not None and options.length < 2:
        raise UserError(f"--length must be at least 2, a token and the one that follows; got {options.length}")
    limit = Card.of(f"{options.max_vram_gb:g}GiB" if options.max_vram_gb is not None else options.gpu)
    config = model_config(options.model)
    options.length = fitting_length(options.length or 2048, options.length is not None, config)
    meta = MetaModel(config)
    result, error = _planned(options, meta, limit, misa)
    command = train_command(options, result) if options.max_vram_gb is not None or options.sharded else None
    coverage, fits = coverage_of(options, meta, result)
    traffic = _traffic_of(options, meta, result)
    if options.sharded and not traffic.fits:
        error = (
            f"{result.model} over {options.gpus} of {limit.name} needs {traffic.total_bytes / 2**30:.1f} GiB on "
            "each. Take more cards (--gpus), shorter sequences (--length) or a smaller --delta."
        )
    if options.plot:
        from misa_engine.planner.picture import save_picture

        save_picture(result, variants(meta, result), Path(options.plot))
    if options.json:
        more = {"coverage": coverage.to_dict()} if coverage else {}
        more |= {"sharded" if options.sharded else "replicas": traffic.to_dict()} if traffic else {}
        print(json.dumps({**result.to_dict(), **more, **({"command": command} if command else {})}, indent=2))
    else:
        print(describe(result, options.accumulation))
        if coverage is not None:
            print(f"\n{coverage.describe(fits)}")
        if traffic is not None:
            print(f"\n{traffic.describe()}")
        if command:
            print(f"\n{command}")
        if options.plot:
            print(f"\npicture: {options.plot}")
    if error is not None:
        print(f"misa: error: {error}", file=sys.stderr)
        return BAD_INPUT
    return DONE


def _options_of(options: argparse.Namespace) -> MisaConfig:
    """MISA's options, as the run will have them."""
    named = (*MEMORY_OPTIONS, *OTHER_OPTIONS)
    given = {name: getattr(options, name) for name in named if getattr(options, name) is not None}
    return MisaConfig.from_dict(
        {
            **given,
            "delta": MisaConfig.delta if options.delta is None else options.delta,
            "shard_state": options.shard_state,
            "always_train": tuple(options.always_train),
            "include_outside": options.include_outside,
        }
    )


def _check_cards(options: argparse.Namespace) -> None:
    """Refuse what several cards cannot have, and what needs several."""
    if options.sharded and (options.gpus is None or options.max_vram_gb is not None):
        raise UserError("--sharded needs --gpus, the number of cards, and looks at one --gpu, not at --max_vram_gb.")
    if options.shard_state and (options.gpus is None or options.sharded):
        raise UserError(
            "--shard_state is of --gpus with a whole model on each card, which share moments and residual bits; with "
            "--sharded they are divided anyway."
        )
    if options.gpus == 1:
        raise UserError("--gpus is the number of cards that train together, at least 2; for one leave it out.")
    if options.sharded and options.residents not in (None, "none"):
        raise UserError(
            f"--residents {options.residents} with --sharded: masters on the host are not sharded. Leave out one of "
            "the two; --gpus alone plans replicas, each with its own residents."
        )


def _planned(options: argparse.Namespace, meta: Any, limit: Any, misa: MisaConfig) -> tuple[Any, str | None]:
    """The plan for one card, chosen to fit or as asked for, and what is wrong with one that does not fit."""
    from misa_engine.planner.activations import MicroBatch
    from misa_engine.planner.plan import plan
    from misa_engine.planner.solve import Wishes, again, impossible, solve

    checkpointing = options.gradient_checkpointing
    micro_batch = MicroBatch(
        batch=options.batch or 1,
        length=options.length,
        checkpointing=checkpointing is not False,
        loss=options.loss,
        liger=options.use_liger_kernel,
        padded=options.padded,
    )
    gpus = options.gpus or 1
    if options.max_vram_gb is not None:
        wishes = Wishes(options.delta, options.state_dtype, checkpointing, options.batch, options.length)
        wishes = replace(wishes, residents=options.residents, gpus=gpus)
        return again(meta, solve(meta, limit, misa, micro_batch, wishes), card=limit), None
    result = plan(meta, card=limit, misa=misa, micro_batch=micro_batch, residents=options.residents, gpus=gpus)
    fits = result.fits or options.sharded  # rows are looked at by themselves
    return result, None if fits else impossible(meta, limit, result)


def _traffic_of(options: argparse.Namespace, meta: Any, result: Any) -> Any:
    """What several cards exchange, and hold where they hold rows; None for one card."""
    if options.sharded:
        from misa_engine.planner.sharded import sharded_plan

        return sharded_plan(meta, result, options.gpus)
    if options.gpus is None:
        return None
    from misa_engine.planner.replicas import replica_traffic
    from misa_engine.planner.resting import resting_elements

    parts = meta.partition(result.misa)
    resting = resting_elements(meta.model, parts, result.misa)
    return replica_traffic(parts, result.misa, meta.dtype, options.gpus, resting)


def model_config(name: str) -> Any:
    """The configuration of a built-in name, a local directory or a Hub id.

    Raises:
        UserError: none of them; the message lists the built-in names.
    """
    from misa_engine.cli.hub import check_reachable
    from misa_engine.cli.loading import check_model_directory, check_unquantized
    from misa_engine.planner.cards import MODELS, published_config

    if name.lower() in MODELS:
        return published_config(name)
    if "/" not in name and not Path(name).exists():
        return published_config(name)  # raises, and lists what is known
    from transformers import AutoConfig

    check_model_directory(name, weights=False)
    check_reachable(name, "config.json", "--model")
    try:
        found = AutoConfig.from_pretrained(Path(name).expanduser() if Path(name).expanduser().is_dir() else name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the configuration of {name} cannot be loaded: {reason} Names that need no network: {', '.join(MODELS)}."
        ) from error
    check_unquantized(found, name)
    return found


def variants(meta: Any, result: Any) -> dict[str, Any]:
    """The same run with the other precision of moments and without, or with, checkpointing."""
    from misa_engine.planner.solve import again

    found = {}
    for checkpointing in (True, False):
        for state_dtype in CHOICES["state_dtype"]:
            misa = result.misa.altered(state_dtype=state_dtype)
            micro_batch = replace(result.micro_batch, checkpointing=checkpointing)
            label = f"{state_dtype} moments\n{'' if checkpointing else 'no '}checkpointing"
            found[label] = again(meta, result, misa=misa, micro_batch=micro_batch)
    return found


def _check_length(options: argparse.Namespace) -> None:
    """What says how long the run is must say it."""
    if options.epochs is not None and options.records is None:
        raise UserError("--num_train_epochs needs --records, the number of samples; or give --max_steps.")
    if options.epochs is not None and not 0 < options.epochs < math.inf:
        raise UserError(f"--num_train_epochs must be larger than 0; got {options.epochs:g}")


def coverage_of(options: argparse.Namespace, meta: Any, result: Any) -> tuple[Coverage | None, bool | None]:
    """How often the run visits its weights, and whether the δ for enough visits fits the card; None where unknown."""
    from misa_engine.planner.solve import again

    if options.steps is None and options.records is None:
        return None, None
    misa, micro_batch = result.misa, result.micro_batch
    steps = run_length(
        options.records or 0,
        micro_batch.batch,
        accumulation=options.accumulation,
        epochs=EPOCHS if options.epochs is None else options.epochs,
        steps=options.steps or -1,
    )
    drawable = sum(unit.numel for unit in meta.partition(misa).units)
    coverage = Coverage.of(misa, steps, drawable=drawable, budget=result.delta_parameters)
    delta = coverage.enough.get("delta")
    if coverage.visits >= ENOUGH or delta is None or meta.shape is None:  # without formulas a plan takes a second
        return coverage, None
    return coverage, again(meta, result, card=result.card, misa=misa.altered(delta=delta)).fits


def train_command(options: argparse.Namespace, result: Any) -> str:
    """The ``misa train`` call that runs the plan."""
    model, misa, micro_batch = options.model, result.misa, result.micro_batch
    given: dict[str, Any] = {
        "model_name_or_path": HUB_IDS.get(model.lower(), model),
        "dataset": "DATA",
        "output_dir": "OUT",
        "delta": f"{misa.delta:g}",
        "state_dtype": misa.state_dtype,
        "per_device_train_batch_size": micro_batch.batch,
        "max_length": micro_batch.length,
        "gradient_checkpointing": str(micro_batch.checkpointing).lower(),
    }
    shown = [name for name in (*MEMORY_OPTIONS, *OTHER_OPTIONS) if name != "state_dtype"]
    given |= {name: getattr(misa, name) for name in shown if getattr(misa, name) != getattr(MisaConfig, name)}
    given |= {"residents": result.residents.format} if result.residents else {}
    given |= {"gradient_accumulation_steps": options.accumulation} if options.accumulation > 1 else {}
    given |= {"max_steps": options.steps} if options.steps is not None else {}
    given |= {"num_train_epochs": f"{options.epochs:g}"} if options.epochs is not None else {}
    if misa.update_in == "backward":
        given["max_grad_norm"] = 0
    given |= {name: "true" for name in ("include_outside", "shard_state") if getattr(misa, name)}
    words = [f"--{name} {str(value).lower() if value is True else value}" for name, value in given.items()]
    words += [f"--always_train {' '.join(map(repr, misa.always_train))}"] if misa.always_train else []
    words += ["--fsdp"] if options.sharded else []
    launch = "misa" if result.gpus == 1 else f"torchrun --nproc_per_node {result.gpus} -m misa_engine"
    return f"{launch} train {' '.join(words)}"


def describe(result: Any, accumulation: int = 1) -> str:
    """The plan as lines of text, for so many micro-batches a step."""
    micro_batch, misa = result.micro_batch, result.misa
    loss = {
        "plain": "all logits at once",
        "chunked": "cross-entropy in chunks",
        "liger": "Liger's fused cross-entropy",
    }
    parts = [
        f"{micro_batch.batch} x {micro_batch.length} tokens",
        f"{'' if micro_batch.checkpointing else 'no '}gradient checkpointing",
        loss[micro_batch.loss] + (", Liger's kernels" if micro_batch.liger else ""),
        f"{misa.state_dtype} moments",
    ]
    parts += ["update in backward"] if misa.update_in == "backward" else []
    width = max(len(name) for name in result.bytes)
    lines = [
        f"{result.model}: {result.parameters:,} parameters; delta {misa.delta:g}: at most {result.delta_parameters:,} "
        f"train at a time",
        f"a micro-batch of {'; '.join(parts)}",
        "",
        *(f"  {name.replace('_', ' '):<{width}}  {_gib(size)}" for name, size in result.bytes.items()),
        f"  {'together':<{width}}  {_gib(result.total_bytes)}",
        "",
        f"largest at: {result.moment}, when these train: {_summary(result.worst_draw)}",
        *([rest_line(misa, len(result.resting), result.step_cost, accumulation)] if misa.rest != "none" else []),
        *(result.residents.describe() if result.residents else ()),
        *(f"note: {note}" for note in result.notes),
    ]
    card = result.card
    if card is not None:
        verdict = "fits" if result.fits else "does not fit"
        if result.fits and result.residents:
            verdict += f", {(card.total_bytes - result.total_bytes) / 2**30:.2f} GiB left beside the slack"
        lines.append(f"{card.name} ({card.total_bytes / 2**30:.2f} GiB): {verdict}")
    if result.max_tokens_per_micro_batch is not None:
        lines.append(
            f"room for {result.max_tokens_per_micro_batch:,} tokens in a micro-batch, {result.max_length:,} in one "
            "sequence"
        )
    return "\n".join(lines)


def rest_line(misa: MisaConfig, count: int, step_cost: float, accumulation: int) -> str:
    """What the rest rule does and costs.

    Args:
        misa: rule, rate, scope and period.
        count: matrices that rest beside a draw.
        step_cost: of a step with one micro-batch, over that without the rule.
        accumulation: micro-batches of a step, of which one moves what rests.
    """
    every = f" at every {misa.rest_every} steps" if misa.rest_every > 1 else ""
    return (
        f"rest {misa.rest}: up to {count} matrices outside the draw move by {misa.rest_rate:g} x lr{every}; expected "
        f"arithmetic of a step {1 + (step_cost - 1) / accumulation:.2f} x that without"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:8.2f} GiB" if size >= 2**27 else f"{size / 2**20:8.2f} MiB"


def _summary(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _parser() -> argparse.ArgumentParser:
    parser = Parser("misa plan", USAGE, __doc__)
    add = parser.add_argument
    add(*MODEL_FLAGS, required=True, help="built-in name, directory or Hub id")
    add(
        "--gpu",
        default="rtx4090",
        help="a card in any spelling (4090, RTX 3090 Ti, A100 80GB, mi300x; default: rtx4090) or a size like 24GiB",
    )
    add(
        "--max_vram_gb",
        type=positive_size,
        help="choose delta, moments, checkpointing and micro-batch to fit into so many GiB",
    )
    add("--steps", "--max_steps", type=positive, help="steps of the run, to see how often it visits each weight")
    add("--records", type=positive, help="samples of the data, to count the steps of the run from")
    add("--epochs", "--num_train_epochs", type=float, help=f"passes over --records (default: {EPOCHS:g})")
    add("--accumulation", "--gradient_accumulation_steps", type=positive, default=1,
        help="micro-batches of a step (default: 1)")  # fmt: skip
    add("--gpus", type=positive, help="cards that train together, a whole model on each: what they exchange")
    add("--sharded", action="store_true", help="of --gpus: rows of the weights on each (fully_shard), not all of them")
    add("--shard_state", nargs="?", const=True, default=False, type=truth, metavar="BOOL",
        help="of --gpus: each card keeps a part of the moments and residual bits (default: off)")  # fmt: skip
    add("--inner_steps", type=positive, help=f"T, steps between two draws (default: {MisaConfig.inner_steps})")
    add("--rest_lr", type=float, help="as in misa train; does not change the plan")
    add("--rest_every", type=positive, help="as in misa train (default: 1)")
    add("--rest_outside", nargs="?", const=True, type=truth, metavar="BOOL", help="embeddings and head rest too")
    add("--delta", type=float, help="share of the model that trains at a time (default: 0.03)")
    for name in MEMORY_OPTIONS:
        default = getattr(MisaConfig, name)
        add(f"--{name}", choices=CHOICES[name], help=f"as in misa train (default: {default})")
    add("--residents", choices=("none", *FORMATS),
        help="what is not drawn rests in 8 bits on the card, exact in host memory (default: none; with --max_vram_gb "
        "where bfloat16 does not fit)")  # fmt: skip
    add("--always_train", nargs="+", default=[], metavar="PATTERN", help="trained in every step, outside delta")
    add("--include_outside", action="store_true", help="embeddings and head are units too")
    add("--length", "--max_length", type=positive,
        help="tokens of a sequence (default: 2048, or the model's positions)")  # fmt: skip
    add("--batch", "--per_device_train_batch_size", type=positive, help="sequences of a micro-batch (default: 1)")
    add("--gradient_checkpointing", "--checkpointing", nargs="?", const=True, type=truth, metavar="BOOL",
        help="recompute activations (default: on)")  # fmt: skip
    add("--no_checkpointing", dest="gradient_checkpointing", action="store_false", help="keep all activations")
    add("--loss", choices=LOSSES, default="chunked", help="how the loss is computed: chunked (what misa train does), "
        "plain (all logits), liger (fused linear cross-entropy)")  # fmt: skip
    add("--use_liger_kernel", nargs="?", const=True, default=False, type=truth, metavar="BOOL",
        help="Liger's RMSNorm, SwiGLU and RoPE, used by misa train on a GPU (default: off)")  # fmt: skip
    add("--padded", action="store_true", help="sequences of unequal length in a micro-batch, without packing")
    add("--json", action="store_true", help="print JSON")
    add("--plot", metavar="FILE.png", help="draw the categories as stacked bars")
    parser.set_defaults(gradient_checkpointing=None)
    return parser
