"""What the runs of ``misa bench learning`` say together: a line a method, tables, a page. From stored JSON alone.

A method counts with the learning rate whose median over the seeds is lowest. All differences are paired: the same
seed, so the same order of the same text, only the method differs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from misa_engine.bench.measure import environment
from misa_engine.bench.tables import Column, Table, field, origin, short

Row = Mapping[str, Any]
#: What the gap is measured between: MISA that moves nothing but what is drawn, and full AdamW.
FROM, TO = "misa-none", "adamw"
#: What "no more memory" means.
MEMORY_OF = "lora"
MIB = 1 << 20


def finished(rows: Iterable[Row]) -> list[Row]:
    """Runs with a result."""
    return [row for row in rows if row["status"] == "ok" and row["settings"]["learner"] != "base"]


def loss_of(row: Row) -> float:
    """Held-out loss at the end; what diverged is worse than anything."""
    value = row["learning"]["heldout_loss"]
    return value if math.isfinite(value) else math.inf


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A result for each task and method, tasks in the order of their names, methods by held-out loss."""
    found: list[dict[str, Any]] = []
    for task in sorted({row["settings"]["task"] for row in rows}):
        own = [row for row in rows if row["settings"]["task"] == task]
        base = next((row for row in own if row["settings"]["learner"] == "base" and row["status"] == "ok"), None)
        methods: dict[str, list[Row]] = {}
        for row in own:
            if row["settings"]["learner"] != "base":
                methods.setdefault(row["settings"]["learner"], []).append(row)
        results = [_method(task, name, runs, base) for name, runs in methods.items()]
        _compare(results)
        found += sorted(results, key=lambda one: (one["loss"] is None, one["loss"] or 0))
    return found


def _method(task: str, name: str, runs: list[Row], base: Row | None) -> dict[str, Any]:
    """One method at its best rate."""
    by_rate: dict[float, dict[int, Row]] = {}
    for row in finished(runs):
        by_rate.setdefault(row["settings"]["lr"], {})[row["settings"]["seed"]] = row
    result: dict[str, Any] = {"task": task, "method": name, "status": runs[0]["status"], "rates": len(by_rate)}
    result |= {"loss": None, "runs": {}, "base_loss": base and base["learning"]["heldout_loss"]}
    if not by_rate:
        return result
    result["status"] = "ok"
    most = max(len(seeds) for seeds in by_rate.values())  # a rate that a killed matrix left half done is no candidate
    medians = {
        lr: statistics.median(map(loss_of, seeds.values())) for lr, seeds in by_rate.items() if len(seeds) == most
    }
    lr = min(medians, key=lambda rate: medians[rate])
    seeds = by_rate[lr]
    rates = sorted(by_rate)
    result |= {
        "lr": lr, "at_edge": len(rates) > 1 and lr in (rates[0], rates[-1]), "seeds": len(seeds),
        "loss_by_lr": {f"{rate:g}": medians.get(rate) for rate in rates}, "runs": dict(sorted(seeds.items())),
        "loss": medians[lr], "losses": {seed: loss_of(row) for seed, row in sorted(seeds.items())},
    }  # fmt: skip
    rows = [row["learning"] for row in seeds.values()]
    result["forgetting"] = None
    if base is not None:
        kept = base["learning"]["own_kind_loss"]
        result["forgetting"] = statistics.median(row["own_kind_loss"] - kept for row in rows)
    for key in ("accuracy", "total_held_bytes", "train_seconds", "entropy_median", "expected_visits"):
        values = [row[key] for row in rows if row.get(key) is not None]
        result[key] = statistics.median(values) if values else None
    result["step_s"] = statistics.median(row["step_time_s"]["median"] for row in rows)
    result["visits"] = rows[0].get("visits")
    result["curve"] = _curve([row["curve"] for row in rows], base)
    return result


def _curve(curves: Sequence[Sequence[Row]], base: Row | None) -> list[dict[str, Any]]:
    """Medians over the seeds, from the base on."""
    start = base and base["learning"]["heldout_loss"]
    points = [{"tokens": 0, "seconds": 0.0, "loss": start}] if start is not None else []
    for same in zip(*curves, strict=False):
        one = {key: statistics.median(point[key] for point in same) for key in ("tokens", "seconds")}
        points.append({**one, "loss": statistics.median(point["heldout_loss"] for point in same)})
    return points


def _compare(results: list[dict[str, Any]]) -> None:
    """Against FROM and TO at the same seeds, at the seconds that TO took, and at no more bytes than MEMORY_OF."""
    by_name = {result["method"]: result for result in results if result["loss"] is not None}
    none, full, low = by_name.get(FROM, by_name.get("misa")), by_name.get(TO), by_name.get(MEMORY_OF)
    for result in by_name.values():
        for name, other in (("to_none", none), ("to_adamw", full)):
            theirs = other["losses"] if other else {}
            pairs = [loss - theirs[seed] for seed, loss in result["losses"].items() if seed in theirs]
            result[name] = {"median": statistics.median(pairs), "range": [min(pairs), max(pairs)]} if pairs else None
        result["gap_closed"] = _gap_closed(result["losses"], none, full)
        result["fits_lora"] = low and result["total_held_bytes"] <= 1.02 * low["total_held_bytes"]
        result["loss_at_time"] = _at(result["curve"], min(one["train_seconds"] for one in by_name.values()))


def _gap_closed(losses: Mapping[int, float], none: Row | None, full: Row | None) -> float | None:
    """Median over the seeds; None where TO is not ahead of FROM in each: a gap within the seeds' range is none."""
    if none is None or full is None:
        return None
    gaps = {seed: none["losses"][seed] - loss for seed, loss in full["losses"].items() if seed in none["losses"]}
    if min(gaps.values(), default=0) <= 0:
        return None
    shares = [(none["losses"][seed] - losses[seed]) / gap for seed, gap in gaps.items() if seed in losses]
    return statistics.median(shares) if shares else None


def _at(curve: Sequence[Row], seconds: float) -> float | None:
    """Loss at a time, between the points on either side."""
    for before, after in zip(curve, curve[1:], strict=False):
        if before["seconds"] <= seconds <= after["seconds"]:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"] or 1)
            return before["loss"] + share * (after["loss"] - before["loss"])
    return None


# ---- tables ----


def _range(row: Row) -> str | None:
    if row["loss"] is None:
        return None
    losses = list(row["losses"].values())
    return f"{row['loss']:.4f}" + (f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else "")


def _difference(name: str) -> Callable[[Row], str | None]:
    def value(row: Row) -> str | None:
        one = row.get(name)
        if one is None:
            return None
        low, high = one["range"]
        return f"{one['median']:+.4f}" + (f" ({low:+.4f} to {high:+.4f})" if low != high else "")

    return value


def _lr(row: Row) -> str | None:
    return None if row["loss"] is None else f"{row['lr']:g}" + ("*" if row["at_edge"] else "")


COLUMNS: tuple[Column, ...] = (
    ("method", field("method"), ""),
    ("held-out loss", _range, ""),
    ("minus adamw", _difference("to_adamw"), ""),
    ("minus misa-none", _difference("to_none"), ""),
    ("gap closed", field("gap_closed"), ".0%"),
    ("at equal time", field("loss_at_time"), ".4f"),
    ("solved", field("accuracy"), ".1%"),
    ("forgetting", field("forgetting"), "+.4f"),
    ("held MiB", field("total_held_bytes", scale=1 / MIB), ".1f"),
    ("CPU s a step", field("step_s"), ".3f"),
    ("lr", _lr, ""),
    ("rates", field("rates"), ""),
    ("seeds", field("seeds"), ""),
    ("visits", field("visits", "median"), ".1f"),
    ("entropy", field("entropy_median"), ".2f"),
)
TEXT = (
    "Each method at the learning rate with the lowest median over the seeds, among as many rates for every method (* "
    "the best is the lowest or highest of them: more may be had). *Minus* is paired by seed, median and range. *Gap "
    "closed*: 0% is `misa-none`, which moves nothing but what is drawn, 100% full AdamW; none where AdamW is not ahead "
    "in every seed. *At equal time*: where the curve stands after the CPU seconds of the fastest method's whole run; "
    "its schedule was not made for that end. *Forgetting*: loss on the standard library's sources, after - before. "
    "*Held*: gradients, optimizer state, scratch and adapters at a step, exact, without weights and activations. "
    "Visits are rounds in which a weight was drawn, median over the units."
)


def tables(results: Sequence[Row]) -> list[Table]:
    """For each task all methods, then those that hold no more than LoRA."""
    found = []
    for task in dict.fromkeys(result["task"] for result in results):
        own = [result for result in results if result["task"] == task]
        start = f" (base: {own[0]['base_loss']:.4f})" if own[0]["base_loss"] is not None else ""
        ran = [result for result in own if result["loss"] is not None]
        if ran:
            found.append(Table.of(ran, COLUMNS, f"{task}{start}, all methods at equal tokens").without_empty())
        small = [result for result in ran if result["fits_lora"]]
        if len(small) < len(ran) and small:
            title = f"{task}: those that hold no more than {MEMORY_OF}"
            found.append(Table.of(small, COLUMNS[:9], title).without_empty())
    return found


def page(document: Row, pictures: Sequence[Path] = ()) -> str:
    """A matrix as a page."""
    where, settings = document["environment"], document["settings"]
    shown = "; ".join(f"{name} {value}" for name, value in settings.items())
    lines = ["# What is learnt from a pretrained base", "", origin(where), f"Command: `{where['command']}`.", ""]
    lines += [f"Settings: {shown}. {short(document['parameters'])} parameters.", "", TEXT]
    for table in tables(document["results"]):
        lines += ["", f"**{table.title[:1].upper()}{table.title[1:]}**", "", *table.lines()]
    failed = {(r["task"], r["method"], r["status"]) for r in document["results"] if r["loss"] is None}
    lines += ["", *(f"- {task}, {method}: {status}" for task, method, status in sorted(failed))] if failed else []
    lines += [""] + [f"![{path.stem}]({path.as_posix()})" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


def document_of(rows: Sequence[Row], settings: Row) -> dict[str, Any]:
    """What results.json holds of a matrix: summaries; the runs are files of their own."""
    return {
        "kind": "learning",
        "environment": environment(torch.device("cpu")),
        "settings": dict(settings),
        "parameters": max((row["learning"]["total_parameters"] for row in rows if "learning" in row), default=None),
        "results": [{name: value for name, value in one.items() if name != "runs"} for one in summarise(rows)],
    }
