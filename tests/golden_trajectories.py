"""What a refactoring must not change: hashes of weights, scores and draws over 40 steps of tiny models.

    python tests/golden_trajectories.py            # compare with golden_trajectories.json, name what differs
    python tests/golden_trajectories.py --write    # record anew, after a change that is meant to move numbers

Every preset without a rest rule and floor, and "resting" (preset engine with its own), x dtype x ``update_in``, on a
tiny Llama and GPT-2. Hashes are of bits, and a matrix product rounds differently on another processor or torch
version, so a file speaks only for the environment that it names.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import platform
import sys
from pathlib import Path

import torch

from misa_engine import MISA
from training import batches, loss_of, tiny

FILE = Path(__file__).with_suffix(".json")
STEPS = 40
CASES = tuple(
    itertools.product(
        ("llama", "gpt2"), ("engine", "paper", "official", "resting"), ("float32", "bfloat16"), ("step", "backward")
    )
)


def environment() -> dict[str, str]:
    """What the last bit of a matrix product depends on."""
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return {
        "torch": torch.__version__,
        "processor": models[0].partition(":")[2].strip() if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def trajectory(family: str, preset: str, dtype: str, update_in: str) -> dict[str, str]:
    """Train for 40 steps (T = 4, two micro-batches in every third step) and hash what came out."""
    model = tiny(family, getattr(torch, dtype))
    clip = None if update_in == "backward" else 1.0
    optimizer = MISA(
        model,
        lr=3e-3,
        delta=0.3,
        inner_steps=4,
        preset="engine" if preset == "resting" else preset,
        rest="row_norm" if preset == "resting" else "none",
        probability_floor=0.5 if preset == "resting" else 0.0,
        weight_decay=0.1,
        max_grad_norm=clip,
        update_in=update_in,
    )
    data, draws = batches(), [optimizer.active]
    for step in range(STEPS):
        for micro in range(passes := 2 if step % 3 == 0 else 1):
            optimizer.last_micro_batch = micro == passes - 1
            loss_of(model, next(data)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.active != draws[-1]:
            draws.append(optimizer.active)
    weights = [parameter.detach().view(torch.uint8).numpy().tobytes() for parameter in model.parameters()]
    return {
        "weights": digest(*weights),
        "scores": digest(json.dumps([optimizer.scores, optimizer.probabilities]).encode()),
        "draws": digest(json.dumps(draws).encode()),
    }


def record() -> dict[str, dict[str, str]]:
    return {"/".join(case): trajectory(*case) for case in CASES}


def main() -> int:
    torch.set_num_threads(1)
    found = record()
    if "--write" in sys.argv[1:]:
        FILE.write_text(json.dumps({"environment": environment(), "cases": found}, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} cases written to {FILE}")
        return 0
    kept = json.loads(FILE.read_text(encoding="utf-8"))
    if kept["environment"] != environment():
        print(f"recorded elsewhere: {kept['environment']}; here: {environment()}")
    different = [
        f"{case}: {what}" for case in found for what in found[case] if found[case][what] != kept["cases"][case][what]
    ]
    print("\n".join(different) or f"{len(found)} cases as recorded")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
