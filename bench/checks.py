"""What the round promises, checked against what it measured; and the plan's predictions beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from misa_engine.bench.cases import TrainingCase
from misa_engine.bench.workload import model_config
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.cards import Card
from misa_engine.planner.plan import plan
from misa_engine.trainer.lean import lean_options

GIB = 1 << 30
#: Reserved at 2 x 2,048 tokens on the Llama-3-8B shape; the best plain figure of others is 18.9 GiB.
MOST_RESERVED_BYTES = int(18.5 * GIB)
#: The methods whose rows the promises are about.
JUDGED = ("misa", "misa-int8")
ALLOCATED_TOLERANCE, RESERVED_TOLERANCE, LENGTH_TOLERANCE = 0.03, 0.08, 0.05


# ---- the plan ----


def ask_plan(case: TrainingCase) -> dict[str, Any]:
    """What ``misa_engine.plan`` predicts for a case, as plain values, and ``status``: "ok" or why there is none."""
    device = torch.device(case.device)
    config = model_config(case.shape)
    liger = bool(lean_options(config.model_type, device, sft=False))
    micro_batch = MicroBatch(
        batch=case.batch,
        length=case.length,
        checkpointing=case.checkpointing,
        loss="liger" if liger else "chunked",
        liger=liger,
    )
    state_dtype = "int8" if case.method == "misa-int8" else "float32"
    card = Card("imitated", case.limit_bytes) if case.limit_bytes else None
    try:
        predicted = plan(
            config, card=card, micro_batch=micro_batch, name=case.shape, delta=case.delta, state_dtype=state_dtype
        )
    except ValueError as error:
        return {"status": f"no plan: {error}"}
    return {"status": "ok", **predicted.to_dict()}


def reserve_bytes(plan: Mapping[str, Any]) -> int:
    """What the plan keeps free for the CUDA context and as slack, which a limited allocator does not see."""
    return sum(size for name, size in plan.get("bytes", {}).items() if _is_reserve(name))


def allocator_bytes(plan: Mapping[str, Any]) -> int:
    """What the plan expects the allocator to hand out: everything but context and slack."""
    return sum(size for name, size in plan.get("bytes", {}).items() if not _is_reserve(name))


def _is_reserve(category: str) -> bool:
    return "context" in category or "slack" in category


# ---- the checks ----


def judge(results: Sequence[Mapping[str, Any]], plans: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each promise: what was wanted, what came out, and "pass", "fail" or why there is no verdict.

    Args:
        results: rows of the round.
        plans: case name -> what ``ask_plan`` answered.
    """
    checks: list[dict[str, Any]] = []

    def add(row: Mapping[str, Any], what: str, wanted: str, measured: float | None, fine: bool) -> None:
        if row["note"]:
            verdict = row["note"]
        elif measured is None:
            verdict = f"not measured ({row['status']})"
        else:
            verdict = "pass" if fine else "fail"
        checks.append({"case": row["case"], "check": what, "wanted": wanted, "measured": measured, "verdict": verdict})

    for row in results:
        if row.get("method") not in JUDGED or row["case"].startswith("speed "):
            continue
        plan = plans.get(row["case"], {})
        if row["kind"] == "steps":
            settings, reserved = row["settings"], row["peak_reserved_bytes"]
            if row["status"] != "ok":
                add(row, "runs", "ok", None if row["status"] != "out of memory" else 0, False)
                continue
            add(row, "runs", "ok", 1, True)
            if settings["batch"] * settings["length"] <= 4096:
                most = MOST_RESERVED_BYTES
                add(row, "reserved", f"<= {most / GIB:.1f} GiB", reserved, bool(reserved) and reserved <= most)
            if plan.get("status") == "ok":
                predicted = allocator_bytes(plan)
                for name, tolerance in (("allocated", ALLOCATED_TOLERANCE), ("reserved", RESERVED_TOLERANCE)):
                    peak = row[f"peak_{name}_bytes"]
                    error = predicted / peak - 1 if peak else None
                    add(row, f"plan / {name} - 1", f"within {tolerance:.0%}", error, abs(error or 0) <= tolerance)
        elif row["kind"] == "longest":
            found, planned = row.get("longest_with_reserve"), plan.get("max_tokens_per_micro_batch")
            ratio = found / planned if found is not None and planned else None
            add(row, "longest / plan - 1", f"within {LENGTH_TOLERANCE:.0%}", ratio and ratio - 1,
                ratio is not None and abs(ratio - 1) <= LENGTH_TOLERANCE)  # fmt: skip
        elif row["kind"] == "switches":
            for name in ("allocated", "reserved"):
                growth = row.get(f"growth_{name}_bytes")
                add(row, f"growth of {name} over {row['settings']['switches']} switches", "0", growth, growth == 0)
    return checks


def check_text(check: Mapping[str, Any]) -> str:
    """What a check measured, in its unit."""
    measured = check["measured"]
    if measured is None:
        return "-"
    if check["check"] == "reserved":
        return f"{measured / GIB:.2f} GiB"
    if check["check"].endswith("- 1"):
        return f"{measured:+.1%}"
    if check["check"] == "runs":
        return "yes" if measured else "no"
    return f"{measured:,} B"
