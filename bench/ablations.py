"""Does an option of MISA change what is learnt? The demo's model and text, several seeds.

    python -m misa_engine.bench.ablations sampler --output bench/results/sampler_defaults.json
    python -m misa_engine.bench.ablations moments --output bench/results/moments_8bit.json

Held-out loss after the same steps on the same batches; only the options of a setting and the sampler's seed differ. A
model of 4 million parameters from random weights answers for itself, not for fine-tuning an 8B model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from misa_engine import MISA
from misa_engine.bench.measure import environment
from misa_engine.cli.demo_data import LENGTH, OWN_OPTIONS, build_demo

OPTIONS = {**OWN_OPTIONS["misa"], "max_grad_norm": 1.0}

QUESTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sampler": {
        "uniform": {"rule": "uniform"},
        "relative, eta 0.3": {"eta": 0.3},
        "relative, eta 0.5": {"eta": 0.5},
        "relative, eta 1": {"eta": 1.0},
        "relative, eta 1, exponent at most 3": {"eta": 1.0, "exponent_cap": 3.0},
    },
    "moments": {
        "float32 moments": {},
        "8-bit moments": {"state_dtype": "int8"},
        "float32 moments, offloaded in 8 bits": {"revisit": "offload"},
    },
}


def run(settings: dict[str, Any], seed: int, steps: int, start: Path, rows: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Train once; return held-out loss and what the sampler did."""
    model = AutoModelForCausalLM.from_pretrained(start).train()
    options = {**OPTIONS, **settings}
    optimizer = MISA(model, lr=options.pop("learning_rate"), seed=seed, **options)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, steps)
    losses_seen = []
    for step in range(steps):
        ids = rows["train"][torch.arange(4 * step, 4 * step + 4) % len(rows["train"])]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses_seen.append(loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss.item() for part in rows["heldout"].split(16)]
    visits = optimizer.tracker.visits
    return {
        "seed": seed,
        "heldout_loss": statistics.fmean(losses),
        "training_loss_every_20": [statistics.fmean(losses_seen[k : k + 20]) for k in range(0, steps, 20)],
        "entropy_median": statistics.median(event.entropy for event in optimizer.events),
        "visits_least_most": [min(visits), max(visits)],
        "stale_rounds_max": max(event.stale_rounds_max for event in optimizer.events),
    }


def main() -> None:
    """Run every setting with every seed and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = build_demo(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(paths.model)
        rows = {}
        for name, path in (("train", paths.train), ("heldout", paths.heldout)):
            texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
            tokens = [token for text in texts for token in tokenizer(text)["input_ids"]]
            rows[name] = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
        rows["train"] = rows["train"][torch.randperm(len(rows["train"]), generator=torch.Generator().manual_seed(0))]
        results = []
        for name, settings in QUESTIONS[arguments.question].items():
            runs = [run(settings, seed, arguments.steps, paths.model, rows) for seed in range(arguments.seeds)]
            losses = [one["heldout_loss"] for one in runs]
            results.append({"setting": name, "options": settings, "heldout_loss_median": statistics.median(losses)})
            results[-1] |= {"heldout_loss_spread": [min(losses), max(losses)], "runs": runs}
            print(f"{name:<40} {statistics.median(losses):.4f}  {min(losses):.4f} … {max(losses):.4f}", flush=True)
    shared = {key: list(value) if isinstance(value, tuple) else value for key, value in OPTIONS.items()}
    document = {"environment": environment(torch.device("cpu")), "steps": arguments.steps, "shared_options": shared}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({**document, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
