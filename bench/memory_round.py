"""Memory and speed of MISA and of its peers on real 7-8B shapes, under the memory limit of a 24 GB card.

    python -m misa_engine.bench.memory_round --output DIR                   # everything, about six minutes on one GPU
    python -m misa_engine.bench.memory_round --output DIR --cases qwen      # only cases whose name contains a word
    python -m misa_engine.bench.memory_round --render bench/results/memory/memory_round.json

Each case runs in a fresh process under the same conditions. Results are written after every case, so that whatever
ends the round leaves what was measured. Without a CUDA device a tiny shape goes through the same code; its numbers say
nothing about a GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from misa_engine.bench.baselines import BASELINES
from misa_engine.bench.cases import Case, empty_row
from misa_engine.bench.checks import GIB, JUDGED, ask_plan, judge, reserve_bytes
from misa_engine.bench.measure import environment
from misa_engine.bench.processes import make_processes
from misa_engine.bench.render import markdown, pictures, print_tables

#: An RTX 4090's memory as its driver states it, 24,564 MiB.
CARD_GIB = 24564 / 1024
PEERS = ("lora", "adamw8bit", "badam", "adamw", "misa-backward", "lisa", "uniform")
#: A search keeps one active set: the plan's worst draw, or without a plan layer 0, so that every layer's input is kept.
WORST_SET = {"rule": "static", "static_weights": {"*.layers.0.*": 1e12}}


def gpu_cases(limit_bytes: int) -> list[Case]:
    """The round on a GPU, most important cases first, so that a late one cannot take an early one's time."""
    main: dict[str, list[Case]] = {}
    switching: dict[str, Any] = {"batch": 1, "length": 256, "accumulation": 1, "inner_steps": 1, "steps": 200}
    for shape in ("llama-3-8b", "qwen2.5-7b"):
        common: dict[str, Any] = {"shape": shape, "limit_bytes": limit_bytes}
        main[shape] = [
            Case(f"{shape} 2x2048 misa", "train", timeline=True, **common),
            Case(f"{shape} 2x2048 misa-int8", "train", method="misa-int8", timeline=True, **common),
            Case(f"{shape} 1x8192 misa", "train", batch=1, length=8192, steps=4, warm_up=2, **common),
            Case(f"{shape} 200 switches", "switches", **switching, **common),
        ]
    common = {"shape": "llama-3-8b", "limit_bytes": limit_bytes}
    searching: dict[str, Any] = {"batch": 1, "length": 8192, "accumulation": 1, "inner_steps": 10**6, "misa": WORST_SET}
    main["llama-3-8b"].insert(2, Case("llama-3-8b longest", "longest", **searching, **common))
    peers = [
        peer_case(Case(f"llama-3-8b 2x2048 {name}", "train", method=name, steps=8, timeout_s=90, **common))
        for name in PEERS
    ]
    # the 8B shape, its main peers, the second shape, then what is only nice to have
    return [*main["llama-3-8b"], *peers[:3], *main["qwen2.5-7b"], *peers[3:]]


def peer_case(case: Case) -> Case:
    """The case with what its method cannot do left out: in the backward pass nothing is clipped or accumulated."""
    return replace(case, max_grad_norm=None, accumulation=1) if case.method == "misa-backward" else case


def cpu_cases() -> list[Case]:
    """Every code path on a CPU, in under a minute."""
    small: dict[str, Any] = {"device": "cpu", "length": 64, "delta": 0.1, "steps": 6, "inner_steps": 2}
    cases = [
        Case("tiny 2x64 misa", "train", shape="tiny", timeline=True, **small),
        Case("tiny 1x256 misa", "train", shape="tiny", batch=1, **{**small, "length": 256}),
        Case("tiny longest", "longest", shape="tiny", batch=1, accumulation=1, misa=WORST_SET, length_step=64,
             longest=256, **{**small, "inner_steps": 10**6}),
        Case("tiny 20 switches", "switches", shape="tiny", batch=1, accumulation=1,
             **{**small, "inner_steps": 1, "steps": 20}),
        Case("tiny-qwen 2x64 misa", "train", shape="tiny-qwen", **small),
    ]  # fmt: skip
    for name in ("misa-int8", *PEERS):
        cases.append(peer_case(Case(f"tiny 2x64 {name}", "train", shape="tiny", method=name, **small)))
    return cases


def searched_case(case: Case, plan: dict[str, Any]) -> Case:
    """A search as its plan sees it: the same worst draw and reserve, begun at the length that it predicts."""
    if plan["status"] != "ok":
        return case
    case = replace(case, misa={**case.misa, "static_weights": {name: 1e12 for name in plan["worst_draw"]}})
    if not case.limit_bytes:
        return case
    guess = plan["max_tokens_per_micro_batch"] // case.batch
    return replace(case, guess=guess, reserve_bytes=reserve_bytes(plan))


# ---- the round ----


def run_round(
    cases: Sequence[Case], output: Path, *, deadline_s: float, limit_bytes: int, processes: str = "auto"
) -> dict[str, Any]:
    """Run all cases on one device; ``output``/memory_round.json is complete after each."""
    started = time.monotonic()
    device = torch.device(cases[0].device)
    runner = make_processes(processes, cases[0].device)
    document: dict[str, Any] = {
        "environment": environment(device),
        "limit": {
            "bytes": limit_bytes,
            "what": "set_per_process_memory_fraction: what PyTorch's allocator may reserve on this larger card; the "
            "CUDA context and other programs do not count",
        }
        if device.type == "cuda"
        else {"bytes": 0, "what": "none on a CPU"},
        "results": [],
        "checks": [],
    }
    planned = [case for case in cases if case.method in JUDGED and case.kind != "switches"]
    plans = document["plans"] = {case.name: ask_plan(case) for case in planned}
    for number, case in enumerate(cases, start=1):
        left = deadline_s - (time.monotonic() - started)
        case = replace(case, snapshot=str(output / "snapshots" / f"{case.name.replace(' ', '_')}.pickle"))
        if left < 15:
            row = empty_row(case, f"not run: the round's {deadline_s:.0f} s were over")
        else:
            if case.kind == "longest":
                case = searched_case(case, plans[case.name])
            began = time.monotonic()
            row = runner.run(case, min(case.timeout_s, left))
            row["case_s"] = time.monotonic() - began
        document["results"].append(row)
        document["checks"] = judge(document["results"], document["plans"])
        write(document, output)
        print(f"[{number}/{len(cases)}] {row.get('case_s', 0):5.1f} s  {case.name}: {row['status']}", flush=True)
    runner.close()
    return document


def write(document: dict[str, Any], output: Path) -> Path:
    """Write the JSON in one go, so that an interrupted round leaves a whole file."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "memory_round.json"
    part = path.with_suffix(".part")
    text = re.sub(
        r"\[\s+([^][,{}]+),\s+([^][,{}\s]+)\s+\]", r"[\1, \2]", json.dumps(document, indent=1)
    )  # pairs: one line
    part.write_text(text + "\n")
    part.replace(path)
    return path


def render(path: Path) -> list[Path]:
    """Tables and pictures from a stored round, beside it."""
    document = json.loads(path.read_text())
    document["checks"] = judge(document["results"], document["plans"])
    try:
        drawn = pictures(document, path.parent)
    except ModuleNotFoundError as error:
        drawn = []
        print(f"no pictures: {error}; draw them elsewhere with --render {path}", file=sys.stderr)
    page = path.with_suffix(".md")
    page.write_text(markdown(document, drawn))
    print_tables(document)
    return [page, *drawn]


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the options and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of memory_round.json, its page and its pictures")
    parser.add_argument("--render", type=Path, metavar="FILE", help="only draw tables and pictures of a stored round")
    parser.add_argument("--cases", default="", metavar="WORD", help="only cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--vram_gib", type=float, default=CARD_GIB, help="card to imitate (default: 24564 MiB)")
    parser.add_argument("--deadline_s", type=float, default=1800, help="cases that would begin later are not run")
    parser.add_argument("--processes", choices=("auto", "fork", "fresh"), default="auto", help="how a case is started")
    options = parser.parse_args(argv)
    if options.render:
        if not options.render.is_file():
            parser.error(f"--render {options.render}: no such file; name the memory_round.json of a round")
        print("\n".join(map(str, render(options.render))))
        return 0
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible; leave the option out to go through the code on the CPU")
    limit = int(options.vram_gib * GIB)
    cases = [case for case in (gpu_cases(limit) if cuda else cpu_cases()) if options.cases in case.name]
    if options.list:
        print("\n".join(f"{case.name}  ({BASELINES[case.method].summary})" for case in cases))
        return 0
    if not cases:
        parser.error(f"--cases {options.cases!r} matches no case; --list names them")
    if options.output is None:
        parser.error("--output FOLDER is needed")
    if not cuda:
        print("no CUDA device: a tiny shape on the CPU, to show that everything works; no memory claim")
    run_round(
        cases,
        options.output,
        deadline_s=options.deadline_s,
        limit_bytes=limit if cuda else 0,
        processes=options.processes,
    )
    render(options.output / "memory_round.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
