"""Train a real model shape (random weights) for some rounds and account for time and memory by category.

    python bench/real_shape.py --shape llama-1b --delta 0.03 --output bench/results/real_shape.json

On a CUDA device the categories of ``optimizer.memory()`` are compared with what the allocator says; on a CPU only
times and the process's peak memory are recorded. A shape-only model says nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from misa_engine import MISA, __version__

#: Published configurations: TinyLlama 1.1B, Llama-3.2-3B, and one that a laptop can run.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=384, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "llama-1b": dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "llama-3b": dict(
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, tie_word_embeddings=True,
    ),
}  # fmt: skip


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat the run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "misa_engine": __version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and 20th/80th percentile."""
    low, *_, high = statistics.quantiles(values * 2, n=5, method="inclusive")  # twice: one value is enough
    return {"median": statistics.median(values), "p20": low, "p80": high}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build, train ``--steps`` steps, return times and bytes."""
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    if cuda and arguments.vram_gib:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.vram_gib * 2**30 / total), device)

    def allocated() -> int:
        return torch.cuda.memory_allocated(device) if cuda else 0

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[arguments.shape])).train()
    torch.set_default_dtype(torch.float32)
    model.config.use_cache = False
    if arguments.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    after_model = allocated()
    optimizer = MISA(model, lr=1e-5, delta=arguments.delta, inner_steps=arguments.inner_steps, cold_start="none")
    after_optimizer = allocated()
    generator = torch.Generator().manual_seed(0)
    vocabulary, shape = model.config.vocab_size, (arguments.batch, arguments.length)
    times: list[float] = []
    held_at_round_start: list[int] = []
    optimizer.on_switch(lambda _: held_at_round_start.append(allocated()))
    for step in range(arguments.steps + 3):
        ids = torch.randint(vocabulary, shape, generator=generator).to(device)
        if cuda:
            torch.cuda.synchronize()
            if step == 3:
                torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        if step >= 3:
            times.append(time.perf_counter() - started)
    step_time = spread(times)
    by_category = optimizer.memory()
    engine_bytes = sum(by_category.values()) - by_category["weights"] - by_category["host_moments"]
    result: dict[str, Any] = {
        "shape": arguments.shape,
        "parameters": optimizer.partition.total,
        "delta": arguments.delta,
        "batch": arguments.batch,
        "length": arguments.length,
        "checkpointing": arguments.checkpointing,
        "steps": arguments.steps,
        "rounds": optimizer.round,
        "step_time_s": step_time,
        "tokens_per_s": arguments.batch * arguments.length / step_time["median"],
        "switch_ms": spread([event.milliseconds for event in list(optimizer.events)[1:]]),
        "bytes_by_category": by_category,
        "engine_bytes_predicted": engine_bytes,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "final_loss_is_finite": bool(torch.isfinite(model(input_ids=ids, labels=ids).loss)),
    }
    if cuda:
        result |= {
            "weights_allocated": after_model,
            "engine_allocated": after_optimizer - after_model,
            "engine_prediction_error": engine_bytes / (after_optimizer - after_model) - 1,
            "weights_prediction_error": by_category["weights"] / after_model - 1,
            "peak_allocated": torch.cuda.max_memory_allocated(device),
            "peak_reserved": torch.cuda.max_memory_reserved(device),
            "growth_over_switches": held_at_round_start[-1] - held_at_round_start[0] if held_at_round_start else 0,
        }
    return result


def main() -> None:
    """Run one shape and add its result to the output file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--inner_steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--vram_gib", type=float, default=0.0, help="imitate a card of this size; 0 is the whole card")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; results are appended to its list")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        document = {"environment": environment(torch.device(arguments.device)), "results": []}
        if arguments.output.exists():
            document = json.loads(arguments.output.read_text())
        document["results"].append(result)
        arguments.output.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
