"""Counts to JSON, JSON to ``docs/reliability.md``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "accelerate", "safetensors", "misa_engine")

#: heading -> (count that the section is about, what was done, how it was judged)
SECTIONS: dict[str, tuple[str, str, str]] = {
    "Fuzzed training": (
        "cases",
        "A tiny random model (Llama, GPT-2, Qwen2, OPT with LayerDrop, Mixtral, Qwen2-MoE, a hand-written stack with "
        "tied weights and a layer that is used twice, a plain `nn.Sequential` with experts that get no token), float32 "
        "or bfloat16, random options, accumulation, clipping (ours, torch's, by value, GradScaler), hooks on weights, "
        "gradients, modules and activations, gradients edited through `.data` or in place, replaced or dropped, "
        "non-finite gradients, closures, autograd's other entry points between the micro-batches (`autograd.grad`, "
        "`backward(inputs=...)`, `functional_call`, `func.grad`, `vmap`, `jvp`, `jacrev`, second derivatives, "
        "penalties), graphs walked after the step, saving and loading in the middle of a round.",
        "Beside it a copy of the model in plain torch, every parameter trainable. In each step: gradients of active "
        "weights equal plain torch's (bit for bit where autograd computes them; to the order of the same sums, in "
        "bfloat16 one rounding a micro-batch, where the GEMM writes them), weights follow Adam in float64, inactive "
        "weights keep their bits, the budget holds, a step with a non-finite gradient changes nothing, scores are the "
        "norms of the raw gradients, and a run that goes on from its state ends with the same bits.",
    ),
    "Killed runs": (
        "runs",
        "`misa train` on a tiny Llama, ended up to three times by SIGKILL at a random moment, before the n-th change "
        "of the disk, or in the middle of a slowed save, or by SIGINT or SIGTERM, and resumed each time. Also: a "
        "second run in the same directory, a return to an older checkpoint with another learning rate, a finished run "
        "resumed.",
        "Final weights bit for bit those of the undisturbed run, one continuous log (losses, switches, visits), every "
        "checkpoint whole after every kill.",
    ),
    "Damaged checkpoints": (
        "damaged files",
        "Every file of the last checkpoint: one bit flipped, cut short, lengthened, emptied, all zeros, deleted, "
        "exchanged for an earlier one, replaced by a folder or a dangling link. Resumed by `true` and by name.",
        "Refused with exit 2 and the file's name, or a line about the damage and an earlier checkpoint from which the "
        "run ends with the undisturbed run's bits. Never trained on in silence.",
    ),
    "Failing saves": (
        "failure points",
        "One change of the disk in a run (an open for writing, a write of torch or safetensors, rename, fsync, mkdir, "
        "unlink) raises ENOSPC or EIO.",
        "One line and a way on; every checkpoint whole; the continued run ends with the undisturbed run's bits.",
    ),
    "Damaged inputs": (
        "damaged inputs",
        "Every file of the model directory and the data: the same damage, JSON of another shape, JSON 100,000 levels "
        "deep, a line of 30 MB, random bytes.",
        "Exit 2 with the file's name and nothing written, or a run to its end. Never another exit code, never a wait.",
    ),
    "Full disks": (
        "small disks",
        "Runs on a tmpfs of a random size, from too small for the first checkpoint to almost enough.",
        "The same, after the disk has been made larger.",
    ),
}


def environment() -> dict[str, Any]:
    """Machine and versions."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": git.stdout.strip(),
        "processor": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def write(file: Path, counts: Counter[str], findings: list[dict[str, str]], seconds: dict[str, int], seed: int) -> None:
    """Write the counts of one session of the harness."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "environment": environment(),
        "seed": seed,
        "seconds": seconds,
        "counts": dict(sorted(counts.items())),
        "findings": findings,
    }
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def render(file: Path, page: Path) -> None:
    """Make the page."""
    content = json.loads(file.read_text(encoding="utf-8"))
    counts, where = content["counts"], content["environment"]
    minutes = sum(content["seconds"].values()) / 60
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        "# Reliability",
        "",
        "What was done to the engine, how often, and what came of it. Generated by `python tests/soak --render` from",
        "`bench/results/reliability.json`; do not edit.",
        "",
        f"{where['date']}, commit {where['commit']}, {where['processor']}, {where['cores']} cores, Python "
        f"{where['python']}, {versions}. {minutes:.0f} minutes, first seed {content['seed']}.",
        "",
        "| attack | number | findings |",
        "| - | - | - |",
    ]
    by_harness = {heading: _findings(content["findings"], heading) for heading in SECTIONS}
    for heading, (key, _, _) in SECTIONS.items():
        lines.append(f"| {heading.lower()} | {counts.get(key, 0):,} | {len(by_harness[heading])} |")
    for heading, (key, done, judged) in SECTIONS.items():
        lines += ["", f"## {heading}", "", done, "", f"Judged: {judged}", ""]
        shown = [(name, number) for name, number in counts.items() if _belongs(name, heading) and name != key]
        if not counts.get(key):
            lines.append("Not run.")
        lines += [f"- {number:,} {name}" for name, number in shown]
        lines += [f"- **finding**: {f['finding']} (`{f['reproduction']}`)" for f in by_harness[heading]]
    lines += [
        "",
        "## Run it",
        "",
        "```",
        "python tests/soak --minutes 30 --seed 0           # everything; 1 when something was found",
        "python tests/soak fuzz kill --minutes 10          # some of it: fuzz, kill, damage, failures, disk",
        "python tests/soak --minutes 30 --write            # with the counts and this page",
        "SOAK_MINUTES=30 pytest -m soak                    # the same as a test",
        "```",
        "",
        "A finding is printed with the line that makes it again. A slice of each harness is part of the ordinary tests",
        "(`tests/test_soak_slice.py`).",
        "",
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(lines), encoding="utf-8")


#: heading -> the word after ``python tests/soak`` and how its counts begin
WORDS = {
    "Fuzzed training": ("fuzz", ()),
    "Killed runs": ("kill", ("kill", "runs", "ended by", "finished")),
    "Damaged checkpoints": ("damage", ("damaged files", "refused", "fell back", "no damage")),
    "Failing saves": ("failures", ("failure", "save ")),
    "Damaged inputs": ("inputs", ("damaged inputs", "input ")),
    "Full disks": ("disk", ("disk", "small disks")),
}


def _belongs(name: str, heading: str) -> bool:
    if heading == "Fuzzed training":
        return (
            not any(name.startswith(begin) for _, begins in WORDS.values() for begin in begins)
            or "construction" in name
        )
    return any(name.startswith(begin) for begin in WORDS[heading][1]) and "construction" not in name


def _findings(findings: list[dict[str, str]], heading: str) -> list[dict[str, str]]:
    return [f for f in findings if f["reproduction"].split("tests/soak ")[1].split()[0] == WORDS[heading][0]]
