"""What ``misa bench`` can run: the settings that a run shares, and named presets of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: What every comparison should hold, in the order of its tables.
METHODS = ("adamw", "lora", "galore", "badam", "lisa", "uniform", "unfused-misa", "misa", "misa-int8")
GIB = 1 << 30
#: An RTX 4090's memory as its driver states it, 24,564 MiB.
CARD_GIB = 24564 / 1024

#: Does an option of MISA change what is learnt? The options of each setting, by question.
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
#: Steps of a profile where nobody says otherwise: a trace of many opens in no viewer.
PROFILED_STEPS = 3
SUITES = {
    "throughput": "step time, phases, peak memory and MISA's own overhead, one process a method",
    "profile": "trace, memory snapshot, time and bytes by phase of a few steps; also: misa profile",
    "loss": "held-out loss from one trained base model: a smoke test of learning",
    "all": "throughput and loss",
    "sampler": "held-out loss of MISA's samplers from random weights",
    "moments": "held-out loss of MISA's precisions of moments from random weights",
    "round": "everything that wants a GPU: tests, kernels, memory limits, speed, a profile (bench/gpu_round.sh)",
}


def option(default: Any, text: str) -> Any:
    """A field of Bench with what ``misa bench --help`` says of it; no text, no option."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Bench:
    """One run: everything that its cases share. Each field with a text is an option of ``misa bench``."""

    suite: str = "all"
    model: str = option("llama-90m", "configuration for time and memory, random weights")
    loss_model: str = option("llama-2m", "configuration for the loss curves")
    methods: tuple[str, ...] = option(METHODS, "methods, separated by commas")
    device: str = option("cpu", "cpu or cuda:0")
    vram_gib: float = option(0.0, "GiB that the allocator may reserve on a GPU; 0 is the whole card")
    batch: int = option(4, "sequences of a micro-batch")
    length: int = option(128, "tokens of a sequence")
    accumulation: int = option(1, "micro-batches of a step")
    checkpointing: bool = option(False, "recompute activations")
    loss: str = option("plain", "plain (all logits at once) or lean (in chunks, Liger's on a GPU)")
    delta: float = option(0.03, "share that trains at a time")
    inner_steps: int = option(10, "steps between two switches, for every method that switches")
    max_grad_norm: float = 1.0
    warm_up: int = option(3, "steps before the timed ones")
    steps: int = option(20, "timed steps; of a profile 3, a switch among them")
    data: str = option("stdlib", "stdlib, arithmetic or a text file: base model, time and memory")
    loss_data: str = option("arithmetic", "the same for the loss curves, another text than the base model's")
    loss_steps: int = option(80, "steps of the loss curves")
    loss_batch: int = option(8, "sequences of a step there")
    loss_delta: float = option(0.1, "share that trains there; a small model's largest matrix is 1/20 of it")
    base_steps: int = option(150, "steps of the base model")
    base_lr: float = 2e-3
    lrs: tuple[float, ...] = option((1e-3, 3e-3), "learning rates tried; each method counts with its best")
    seeds: int = option(1, "seeds of the loss curves")
    timeout_s: int = option(300, "seconds that a case may take")
    sizes: str = option("", "round: parameters of the kernel benchmarks, as in 4M,64M")


_ON_GPU: dict[str, Any] = {
    "device": "cuda:0", "batch": 2, "length": 2048, "checkpointing": True, "loss": "lean", "vram_gib": CARD_GIB,
}  # fmt: skip
#: Named settings for ``--preset``; options given beside them win.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "quick": {
        "device": "cpu", "model": "tiny", "loss_model": "tiny", "length": 64, "loss_steps": 10, "base_steps": 5,
        "lrs": (1e-3,), "delta": 0.1, "inner_steps": 4, "steps": 8, "warm_up": 1, "loss_batch": 2, "sizes": "20k",
    },
    "gpu": {
        **_ON_GPU, "model": "tinyllama", "loss_model": "llama-90m", "steps": 30, "loss_steps": 400, "base_steps": 400,
        "loss_batch": 32,
    },
    "gpu-8b": {**_ON_GPU, "suite": "throughput", "model": "llama-3-8b"},
}  # fmt: skip
