"""Write the generated tables of README.md and docs/: ``python docs/make_tables.py``. A test says when they are stale.

Each table stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``. The full benchmark page is not made here
but by ``misa bench --render bench/results/cpu/results.json --into docs/benchmarks.md``, and the same for
``bench/results/learning/*/results.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from misa_engine import MisaConfig, plan
from misa_engine.bench.reproduce.experiments import EXPERIMENTS
from misa_engine.bench.reproduce.paper import CLAIMS, REPORTED
from misa_engine.bench.tables import short
from misa_engine.cli.arguments import attribute_docs
from misa_engine.method.config import CHOICES
from misa_engine.planner.cards import CARDS, published_config
from misa_engine.planner.replicas import LINKS, replica_traffic, scaling
from misa_engine.planner.resting import resting_elements
from misa_engine.planner.sharded import (
    FLOP_PER_WEIGHT_AND_TOKEN,
    UTILISATION,
    enough_tokens,
    sharded_plan,
)
from misa_engine.planner.speeds import peak_flops
from misa_engine.planner.worst_case import MetaModel
from misa_engine.sweep.space import PAPER

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/cpu/results.json"
LEARNING = ROOT / "bench/results/learning"
#: Models of the README's table, and one card of each size.
MODELS = ("llama-3.2-3b", "llama-2-7b", "qwen2.5-7b", "llama-3-8b", "qwen2.5-14b")
SIZES = ("rtx4080", "rtx4090", "rtx5090", "l40s")
#: Cards and the links between them, of the tables of several GPUs.
PAIRS = (("rtx4090", "PCIe 4 x8"), ("rtx4090", "PCIe 4 x16"), ("a100-80", "NVLink"), ("h100", "NVLink"))
#: Cards, of the same tables.
COUNTS = (2, 4, 8, 16, 32, 64)


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def what_fits(models: tuple[str, ...] = MODELS) -> str:
    """Tokens of the largest micro-batch by model and card, in whole hundreds, with float32 and with 8-bit moments."""
    rows = []
    for model in models:
        config = published_config(model)
        cells = []
        for card in SIZES:
            plans = [plan(config, card=card, name=model, state_dtype=dtype) for dtype in ("float32", "int8")]
            tokens = [(found.max_tokens_per_micro_batch or 0) // 100 * 100 for found in plans]
            cells.append(" / ".join(f"{count:,}" if count else "–" for count in tokens))
        rows.append([model, *cells])
    return table(["model", *(f"{card} ({CARDS[card] / 1024:.0f} GiB)" for card in SIZES)], rows)


def peers() -> str:
    """The README's short form of the benchmark's results."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))["results"]
    (adamw,) = (row for row in results if row["method"] == "adamw")
    rows = []
    for row in results:
        seconds, peak = row["step_time_s"], row["peak_bytes"]
        if seconds and peak:
            of_adamw = f"{seconds['median'] / adamw['step_time_s']['median']:.2f}"
            rows.append([row["method"], of_adamw, f"{peak / adamw['peak_bytes']:.2f}"])
    return table(["method", "step time / AdamW's", "peak memory / AdamW's"], rows)


def learning() -> str:
    """The README's short form of what was learnt: rows of several seeds, and quick only if there is no other."""
    parts = []
    named = (LEARNING / name / "results.json" for name in ("real", "real_tasks", "small", "quick"))
    stored = [path for path in named if path.exists()]
    for path in [path for path in stored if path.parent.name != "quick"] or stored:
        document = json.loads(path.read_text(encoding="utf-8"))
        where, base = document["settings"], short(document["parameters"])
        for task in dict.fromkeys(row["task"] for row in document["results"]):
            rows = [row for row in document["results"] if row["task"] == task and row["loss"] is not None]
            rows = [row for row in rows if row["seeds"] > 1 and ":" not in row["method"]] or rows  # options: docs
            if path.parent.name != "quick" and all(row["seeds"] == 1 for row in rows):
                continue
            seeds = sorted({row["seeds"] for row in rows})
            rates = sorted({row["rates"] for row in rows})
            start = f"base {rows[0]['base_loss']:.3f}" if rows[0]["base_loss"] is not None else "base not measured"
            shown = f"Results `{path.parent.name}`, {task}, {base} parameters, {where['steps']} steps of "
            shown += f"{where['batch']} × {where['length']} tokens, "
            shown += f"learning rates: {_counts(rates)}, seeds: {_counts(seeds)}; {start}"
            if path.parent.name == "quick":
                shown += " (shows that everything runs; ranks nothing)"
            columns = {name: [value(row) for row in rows] for name, value in LEARNT.items()}
            columns = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
            parts.append(f"{shown}:\n\n{table(list(columns), list(map(list, zip(*columns.values(), strict=True))))}")
    return "\n\n".join(parts)


def _counts(numbers: list[int]) -> str:
    return "–".join(str(number) for number in dict.fromkeys((numbers[0], numbers[-1])))


def _number(spec: str, *keys: str, scale: float = 1.0) -> Callable[[dict[str, Any]], str]:
    def shown(row: dict[str, Any]) -> str:
        value: Any = row
        for key in keys:
            value = None if value is None else value.get(key)
        return "–" if value is None else format(value * scale, spec)

    return shown


#: Columns of what is learnt; one without any number is left out.
LEARNT: dict[str, Callable[[dict[str, Any]], str]] = {
    "method": lambda row: str(row["method"]),
    "held-out loss": _number(".3f", "loss"),
    "minus adamw": _number("+.3f", "to_adamw", "median"),
    "gap closed": _number(".0%", "gap_closed"),
    "forgetting": _number("+.3f", "forgetting"),
    "held MiB": _number(".1f", "total_held_bytes", scale=2.0**-20),
    "solved": _number(".0%", "accuracy"),
}


def by_presets() -> dict[str, list[object]]:
    """Option -> its value under each preset, for the options in which the presets differ."""
    configs = [MisaConfig(preset=name) for name in CHOICES["preset"]]
    values = {field.name: [getattr(config, field.name) for config in configs] for field in fields(MisaConfig)}
    differ = {name: found for name, found in values.items() if any(value != found[0] for value in found)}
    return {name: found for name, found in differ.items() if name != "preset"}


def replicas(model: str = "llama-3-8b", tokens: int = 4096, flops: float = 80e12, rest: str = "none") -> str:
    """Derived, not measured: milliseconds of a step's averages, and the share of K cards' speed that is left."""
    config = published_config(model)
    meta = MetaModel(config)
    misa = MisaConfig(rest=rest)
    parts = meta.partition(misa)
    resting = resting_elements(meta.model, parts, misa)
    found = plan(meta, misa=misa)
    compute = 6 * found.parameters * tokens / flops * found.step_cost
    rows = []
    for gpus in COUNTS:
        traffic = replica_traffic(parts, misa, meta.dtype, gpus, resting)
        shares = scaling(traffic, compute)
        cells = [f"{1e3 * traffic.seconds(speed):,.0f} ms, {shares[link]:.0%}" for link, speed in LINKS.items()]
        rows.append([str(gpus), *cells])
    return table(["cards", *LINKS], rows)


def scaling_on_paper(model: str = "llama-3-8b", tokens: int = 4096) -> str:
    """Computed, not measured: speed of K cards over K times one's, by link, for replicas and for sharded weights."""
    meta = MetaModel(published_config(model))
    misa = MisaConfig(rest="none")  # what sharded weights have
    single, parts = plan(meta, misa=misa), meta.partition(misa)
    by_mode = {
        "replicas": [replica_traffic(parts, misa, meta.dtype, gpus) for gpus in COUNTS],
        "sharded": [sharded_plan(meta, single, gpus) for gpus in COUNTS],
    }
    rows = []
    for card, link in PAIRS:
        compute = FLOP_PER_WEIGHT_AND_TOKEN * single.parameters * tokens / (peak_flops(card) * UTILISATION)
        for mode, traffics in by_mode.items():
            cells = []
            for traffic in traffics:
                exchange = traffic.seconds(LINKS[link])
                cells.append(f"{compute / (compute + exchange):.0%} – {min(1, compute / exchange):.0%}")
            rows.append([f"{card}, {link}", mode, f"{1e3 * compute:,.0f} ms", *cells])
    return table(["card and link", "weights", "arithmetic", *map(str, COUNTS)], rows)


def where_it_pays(delta: float = 0.03, gpus: int = 8) -> str:
    """Computed, not measured: tokens from which on arithmetic takes as long as the exchange, by card and link."""
    rows = []
    for card in ("rtx3090", "rtx4090", "rtx5090", "a100-80", "h100"):
        cells = []
        for speed in LINKS.values():
            counts = (enough_tokens(share, peak_flops(card) * UTILISATION, speed, gpus) for share in (delta, None))
            cells.append(" / ".join(f"{count:,.0f}" for count in counts))
        rows.append([card, *cells])
    return table(["card", *LINKS], rows)


def options() -> str:
    """Every field of MisaConfig: its default and its docstring."""
    docs, default, presets = attribute_docs(MisaConfig), MisaConfig(), by_presets()
    rows = []
    for field in sorted(fields(MisaConfig), key=lambda field: field.name in presets):  # those of the presets last
        value = "the preset's" if field.name in presets else f"`{getattr(default, field.name)!r}`"
        text = docs[field.name].replace("``", "`").replace("|", "\\|")
        choices = CHOICES.get(field.name, ())
        if choices and not all(choice in text for choice in choices):
            text += f" One of {', '.join(choices)}."
        rows.append([f"`{field.name}`", value, text])
    return table(["option", "default", "meaning"], rows)


def presets() -> str:
    """What the presets set, where they differ."""
    rows = [[f"`{name}`", *(f"`{value!r}`" for value in values)] for name, values in by_presets().items()]
    return table(["option", *CHOICES["preset"]], rows)


def experiments() -> str:
    """What ``misa reproduce`` runs."""
    rows = []
    for name, one in EXPERIMENTS.items():
        told = sum(number.experiment == name for number in REPORTED)
        known = [f"{told} number{'s' if told > 1 else ''}"] if told else []
        known += [
            f"{claim.better} {'close to' if claim.close else 'before'} {claim.worse}"
            for claim in CLAIMS
            if claim.experiment == name
        ]
        methods = ", ".join(entry.label for entry in one.entries[:7])
        more = f" and {len(one.entries) - 7} more" if len(one.entries) > 7 else ""
        runs = f"{len(one.models)} × {len(one.entries)} × {len(one.seeds)}"
        measured = ", ".join(metric.replace("_", " ") for metric in one.metrics[:5])
        rows.append([f"`{name}`", one.title, ", ".join(one.models), methods + more, runs, measured,
            "; ".join(known) or "none that could be checked"])  # fmt: skip
    headings = ["name", "experiment", "models", "rows", "models × rows × seeds", "measured", "the paper's, beside it"]
    return table(headings, rows)


def sweep_space() -> str:
    """What misa sweep searches unless it is told."""
    rows = [[f"`{space.describe()}`", space.source] for space in PAPER.values()]
    return table(["range", "where it comes from"], rows)


#: (file, name between its markers) -> what makes the content.
TABLES = {
    (ROOT / "README.md", "what fits"): what_fits,
    (ROOT / "README.md", "peers"): peers,
    (ROOT / "README.md", "learning"): learning,
    (ROOT / "docs/guide/options.md", "options"): options,
    (ROOT / "docs/guide/reproduce.md", "experiments"): experiments,
    (ROOT / "docs/guide/several_gpus.md", "replicas"): replicas,
    (ROOT / "docs/guide/several_gpus.md", "replicas, resting"): partial(replicas, rest=MisaConfig().rest),
    (ROOT / "docs/guide/several_gpus.md", "scaling"): scaling_on_paper,
    (ROOT / "docs/guide/several_gpus.md", "where it pays"): where_it_pays,
    (ROOT / "docs/guide/options.md", "presets"): presets,
    (ROOT / "docs/guide/sweep.md", "sweep space"): sweep_space,
}


def between(text: str, name: str) -> tuple[str, str, str]:
    """What stands before, between and after the markers of ``name``; raises ValueError where there are none."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the markers {begin} and {end} must be there once each")
    before, rest = text.split(begin)
    content, after = rest.split(end)
    return f"{before}{begin}\n\n", content.strip(), f"\n\n{end}{after}"


def main() -> None:
    """Bring every table up to date."""
    for (path, name), make in TABLES.items():
        before, _, after = between(path.read_text(encoding="utf-8"), name)
        path.write_text(before + make() + after, encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {name}")


if __name__ == "__main__":
    main()
