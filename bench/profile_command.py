"""``misa profile``: a trace, a memory snapshot and a table of time and bytes by phase, for MISA or any baseline."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from misa_engine.bench.baselines import BASELINES
from misa_engine.bench.command import check_names
from misa_engine.bench.ledger import OWN, overhead
from misa_engine.bench.measure import environment, synchronize
from misa_engine.bench.method import Method, Settings, Unavailable
from misa_engine.bench.phases import PHASES, WINDOW, Cost, account
from misa_engine.bench.steps import StepCase
from misa_engine.bench.tables import Column, Row, Table, origin
from misa_engine.bench.timeline import record_timeline
from misa_engine.bench.workload import fitting_delta
from misa_engine.cli.parsing import MODEL_FLAGS, Parser, positive, truth
from misa_engine.engine.marks import phase
from misa_engine.errors import DONE, UserError

USAGE = "misa profile --model NAME --output DIR [--method NAME] [--length N] [--batch B] [--ledger] [options]"
LEDGER_STEPS = 20
MIB = 1 << 20
#: Options that are the case's own.
SHARED = ("method", "device", "batch", "length", "accumulation", "delta", "checkpointing")


def run(words: list[str]) -> int:
    """The whole command; returns its exit code."""
    options = _parser().parse_args(words)
    device = _checked(options)
    output = Path(options.output).expanduser()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: no such directory can be made ({error.strerror}).") from error
    case = StepCase(
        name="profile",
        shape=options.model,
        inner_steps=options.steps,  # so that any such stretch of steps holds one switch
        # an update inside the backward pass knows no global norm to clip
        max_grad_norm=None if options.method == "misa-backward" else options.max_grad_norm or None,
        phases=options.ledger,
        **{name: vars(options)[name] for name in SHARED},
    )
    try:
        method = case.prepare(row := case.row("started"))
    except Unavailable as error:
        raise UserError(f"{options.method}: {error}") from error
    batches, snapshot = case.stream(method), output / "memory_snapshot.pickle" if device.type == "cuda" else None
    document: dict[str, Any] = {"environment": environment(device), "settings": vars(options)}
    document |= profile_method(method, batches, options.steps, options.inner_steps, output / "trace.json.gz")
    document["timeline"] = record_timeline(method, batches, device, row["weights_bytes"], snapshot)
    if options.ledger:
        document["ledger"] = overhead(method, batches, LEDGER_STEPS, options.inner_steps)
    (output / "profile.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    (output / "profile.md").write_text(page := markdown(document), encoding="utf-8")
    print("\n".join([page, *(str(path) for path in sorted(output.iterdir()))]))
    return DONE


def _checked(options: argparse.Namespace) -> torch.device:
    """The device, if everything that was asked for exists. Fills in what was left open."""
    options.device = options.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    check_names([options.method], [options.model], options.device)
    if options.ledger and not options.method.startswith("misa"):
        raise UserError(f"--ledger compares MISA with its floor; {options.method} is not MISA. Leave --ledger out.")
    if options.length < 2:
        raise UserError(f"--length {options.length}: at least 2 tokens.")
    if options.delta is None:
        options.delta = fitting_delta(options.model, Settings.delta)
    if not 0 < options.delta <= 1:
        raise UserError(f"--delta {options.delta}: a share of the model above 0 and at most 1.")
    return torch.device(options.device)


# ---- a profile ----


def profile_method(
    method: Method, batches: Iterator[Tensor], steps: int, inner_steps: int, trace_file: Path
) -> dict[str, Any]:
    """Profile ``steps`` steps of a method, one switch among them, after a warm-up of a round.

    Args:
        method: what trains; a round of it is ``steps`` steps long.
        batches: endless token ids (batch, length).
        steps: profiled steps.
        inner_steps: steps over which the cost of a switch is spread in the overhead.
        trace_file: where the trace goes; its name ends in .json.gz.

    Returns:
        ``results``, a row a phase, and ``summary``.
    """
    first = next(batches)
    cuda = first.device.type == "cuda"

    def one_step() -> None:
        with phase("data"):
            micro_batches = [next(batches) for _ in range(method.settings.accumulation)]
        method.step(micro_batches)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    for _ in range(max(2, steps)):
        one_step()
    synchronize(first.device)
    with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
        one_step()  # the profiler's own first time
        synchronize(first.device)
        before = method.switches()
        with record_function(WINDOW):
            for _ in range(steps):
                one_step()
            with phase("rest (wait)"):
                synchronize(first.device)
        switches = method.switches() - before
    profiler.export_chrome_trace(str(trace_file))
    with gzip.open(trace_file, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    shapes = {tuple(p.shape) for p in method.model.parameters() if p.dim() == 2}
    seconds, costs = account(trace, cuda=cuda, tokens=first.numel(), weight_shapes=shapes)
    return {
        "results": [{"phase": name, **costs[name].of_a_step(steps, seconds)} for name in PHASES],
        "summary": summary(seconds, costs, steps, switches, inner_steps) | {"method": method.name, "cuda": cuda},
    }


def summary(
    seconds: float, costs: Mapping[str, Cost], steps: int, switches: int, inner_steps: int
) -> dict[str, float | int]:
    """The numbers of a whole step.

    Returns:
        ``step_s`` as profiled; ``overhead``, the share of hooks, norm, update and 1/T of a switch in a step that holds
        1/T of a switch; launches and host reads of a whole step, of the optimizer inside a round and of a switch.
    """
    switch = costs["switch"]
    own = [costs[name] for name in OWN if name != "switch"]
    switch_share_s = switch.time_s / switches / inner_steps if switches else 0.0
    own_s = sum(cost.time_s for cost in own) / steps + switch_share_s
    return {
        "steps": steps,
        "switches": switches,
        "inner_steps": inner_steps,
        "step_s": seconds / steps,
        "overhead": own_s / ((seconds - switch.time_s) / steps + switch_share_s),
        "launches_a_step": sum(cost.launches for cost in costs.values()) / steps,
        "own_launches_a_step": sum(cost.launches for cost in own) / steps,
        "host_reads_a_step": sum(cost.host_reads for cost in costs.values()) / steps,
        "own_host_reads_a_step": sum(cost.host_reads for cost in own) / steps,
        "host_reads_a_switch": switch.host_reads / switches if switches else 0.0,
        "peak_bytes": max(cost.peak_bytes for cost in costs.values()),
    }


# ---- what is shown ----

COLUMNS: tuple[Column, ...] = (
    ("phase", lambda row: row["phase"], ""),
    ("ms a step", lambda row: 1e3 * row["time_s"], ".3f"),
    ("share", lambda row: row["share"], ".1%"),
    ("allocated MiB a step", lambda row: row["allocated_bytes"] / MIB, ".1f"),
    ("peak MiB", lambda row: row["peak_bytes"] / MIB, ".1f"),
    ("launches a step", lambda row: row["launches"], ".0f"),
    ("reads a step", lambda row: row["host_reads"], ".1f"),
)


def markdown(document: Row) -> str:
    """The page of a profile: its table, and below it the few numbers of a whole step."""
    where, one = document["environment"], document["summary"]
    launches, reads = ("kernel launches", "synchronising calls") if one["cuda"] else ("operators", "host reads")
    lines = [
        "# {method} on {model}, {batch} x {length} tokens, checkpointing {checkpointing}".format(
            **document["settings"]
        ),
        "",
        f"{origin(where)} `{where['command']}`",
        "",
        *Table.of(document["results"], COLUMNS).lines(),
        "",
        f"- {one['steps']} steps, {one['switches']} switch(es), {1e3 * one['step_s']:.2f} ms a step under the profiler "
        f"({'device' if one['cuda'] else 'CPU'} time by phase)",
        f"- the optimizer's own share of a step: {one['overhead']:.2%} (hooks, clip/norm, update and 1/"
        f"{one['inner_steps']} of a switch)",
        f"- {launches} a step: {one['launches_a_step']:.0f}, of these the optimizer's {one['own_launches_a_step']:.0f}",
        f"- {reads} a step: {one['host_reads_a_step']:.1f}, of these the optimizer's "
        f"{one['own_host_reads_a_step']:.1f}; a switch: {one['host_reads_a_switch']:.0f}",
    ]
    if ledger := document.get("ledger"):
        parts = [f"{part} {1e3 * s:.3f} ms ({s / ledger['floor_s']:.2%})" for part, s in ledger["parts"].items()]
        lines += [
            f"- floor {1e3 * ledger['floor_s']:.2f} ms, MISA {1e3 * ledger['misa_s']:.2f} ms: overhead "
            f"{ledger['overhead']:+.2%}, medians of {ledger['steps']} alternating steps each",
            f"- of the floor: {', '.join(parts)}; a switch takes {1e3 * ledger['switch_s']:.2f} ms, "
            f"1/{ledger['inner_steps']} of it counts",
        ]
    return "\n".join([*lines, ""])


def _parser() -> Parser:
    parser = Parser("misa profile", usage=USAGE, description=__doc__)
    add = parser.add_argument
    add(*MODEL_FLAGS, required=True, help="configuration with random weights, such as llama-3-8b or tiny")
    add("--output", required=True, metavar="DIR", help="where the trace, the JSON and the page go")
    add("--method", default="misa", help=f"one of {', '.join(BASELINES)} (default: misa)")
    add("--ledger", action="store_true", help="also MISA against the same passes without an optimizer, in turns")
    add("--length", type=positive, default=512, help="tokens of a sequence (default: 512)")
    add("--batch", type=positive, default=1, help="sequences of a micro-batch (default: 1)")
    add("--accumulation", type=positive, default=1, help="micro-batches of a profiled step (default: 1)")
    add("--steps", type=positive, default=3, help="profiled steps, a switch among them (default: 3)")
    add("--inner_steps", type=positive, default=50, help="steps over which a switch is spread (default: 50)")
    add("--delta", type=float, help="share that trains at a time (default: 0.03, or what a small model needs)")
    add("--max_grad_norm", type=float, default=1.0, help="clip the global norm, 0 does not (default: 1)")
    add("--checkpointing", nargs="?", const=True, default=True, type=truth, metavar="BOOL",
        help="recompute activations (default: on)")  # fmt: skip
    add("--device", help="cpu or cuda:0 (default: cuda:0 where there is one)")
    return parser
