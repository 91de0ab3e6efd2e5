"""What the round promises, checked against what it measured; and the plan's predictions beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch

from misa_engine.bench.cases import Case, TrainingCase
from misa_engine.bench.workload import model_config
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.cards import Card
from misa_engine.planner.plan import plan
from misa_engine.trainer.lean import lean_options

GIB = 1 << 30
#: Reserved at 2 x 2,048 tokens on the Llama-3-8B shape; the best plain figure of others is 18.9 GiB.
MOST_RESERVED_BYTES = int(18.5 * GIB)
#: By how much the plan may be off.
TOLERANCES = {"allocated": 0.03, "reserved": 0.08, "longest": 0.05}
Row = Mapping[str, Any]


# ---- the plan ----


def is_judged(case: Case) -> TypeGuard[TrainingCase]:
    """Whether promises are made about a case: MISA's memory, in float32 and in 8 bits."""
    judged = isinstance(case, TrainingCase) and case.method in ("misa", "misa-int8")
    return judged and not case.name.startswith(("speed ", "profile "))


def ask_plan(case: TrainingCase) -> dict[str, Any]:
    """What ``misa_engine.plan`` predicts for a case, as plain values, and ``status``: "ok" or why there is none."""
    config = model_config(case.shape)
    liger = bool(lean_options(config.model_type, torch.device(case.device), sft=False))
    micro_batch = MicroBatch(
        batch=case.batch, length=case.length, checkpointing=case.checkpointing,
        loss="liger" if liger else "chunked", liger=liger,
    )  # fmt: skip
    options: dict[str, Any] = {"delta": case.delta, "state_dtype": "int8" if case.method == "misa-int8" else "float32"}
    card = Card("imitated", case.limit_bytes) if case.limit_bytes else None
    try:
        predicted = plan(
            config, card=card, micro_batch=micro_batch, name=case.shape, residents=case.residents, **options
        )
    except ValueError as error:
        return {"status": f"no plan: {error}"}
    return {"status": "ok", **predicted.to_dict()}


def reserve_bytes(plan: Row) -> int:
    """What the plan keeps free for the CUDA context and as slack, which a limited allocator does not see."""
    return sum(size for name, size in plan["bytes"].items() if "context" in name or "slack" in name)


def allocator_bytes(plan: Row) -> int:
    """What the plan expects the allocator to hand out: everything but context and slack."""
    return sum(plan["bytes"].values()) - reserve_bytes(plan)


# ---- the checks ----

#: Check, what is wanted, what came out (None where nothing did), whether that is fine, how it is shown.
Check = tuple[str, str, Any, bool, str]


def judge(results: Sequence[Row], plans: Mapping[str, Row]) -> list[dict[str, Any]]:
    """One line for each promise: what was wanted, what came out, and "pass", "fail" or why there is no verdict.

    Args:
        results: rows of the round.
        plans: case name -> what ``ask_plan`` answered, for the cases that are judged.
    """
    makers = {"steps": _of_steps, "longest": _of_longest, "switches": _of_switches}
    checks = []
    for row in (row for row in results if row["case"] in plans):
        for what, wanted, measured, fine, shown in makers[row["kind"]](row, plans[row["case"]]):
            one = {"case": row["case"], "check": what, "wanted": wanted, "measured": measured}
            one["text"] = "-" if measured is None else shown.format(measured)
            missing = f"not measured ({row['status']})" if measured is None else None
            one["verdict"] = row["note"] or missing or ("pass" if fine else "fail")
            checks.append(one)
    return checks


def _against_plan(name: str, what: str, ratio: float | None) -> Check:
    most = TOLERANCES[name]
    return what, f"within {most:.0%}", ratio and ratio - 1, ratio is not None and abs(ratio - 1) <= most, "{:+.1%}"


def _of_steps(row: Row, plan: Row) -> Iterator[Check]:
    ran = row["status"] == "ok"
    yield "runs", "ok", row["status"] if ran or row["status"] == "out of memory" else None, ran, "{}"
    if not ran:
        return
    if row["settings"]["batch"] * row["settings"]["length"] <= 4096:
        reserved, most = row["peak_reserved_bytes"], MOST_RESERVED_BYTES
        gib = reserved and reserved / GIB
        yield "reserved", f"<= {most / GIB:.1f} GiB", gib, bool(reserved) and reserved <= most, "{:.2f} GiB"
    if plan["status"] == "ok":
        for name in ("allocated", "reserved"):
            peak = row[f"peak_{name}_bytes"]
            yield _against_plan(name, f"plan / {name} - 1", allocator_bytes(plan) / peak if peak else None)


def _of_longest(row: Row, plan: Row) -> Iterator[Check]:
    found, planned = row.get("longest_with_reserve"), plan.get("max_tokens_per_micro_batch")
    ratio = found / planned if found is not None and planned else None
    yield _against_plan("longest", "longest / plan - 1", ratio)


def _of_switches(row: Row, plan: Row) -> Iterator[Check]:
    for name in ("allocated", "reserved"):
        growth = row.get(f"growth_{name}_bytes")
        yield f"growth of {name} over {row['settings']['switches']} switches", "0", growth, growth == 0, "{:,} B"
