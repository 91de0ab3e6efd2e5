"""What ``misa bench`` can run: the settings that a run shares, and named presets of them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: What every comparison should hold, in the order of its tables.
METHODS = ("adamw", "lora", "galore", "badam", "lisa", "uniform", "unfused-misa", "misa-none", "misa", "misa-int8")
GIB = 1 << 30
#: An RTX 4090's memory as its driver states it, 24,564 MiB.
CARD_GIB = 24564 / 1024

#: Steps of a profile where nobody says otherwise: a trace of many opens in no viewer.
PROFILED_STEPS = 3
SUITES = {
    "throughput": "step time, phases, peak memory and MISA's own overhead, one process a method",
    "profile": "trace, memory snapshot, time and bytes by phase of a few steps; also: misa profile",
    "learning": "methods x learning rates x seeds from a pretrained base: misa bench learning --help",
    "residents": "8B in 12 GiB and 14B in 24, what is not drawn at rest in 8 bits (on a CPU tiny shapes)",
    "round": "everything that wants a GPU: tests, kernels, memory limits, residents, speed (bench/gpu_round.sh)",
}


def option(default: Any, text: str) -> Any:
    """A field of Bench with what ``misa bench --help`` says of it; no text, no option."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Bench:
    """One run: everything that its cases share. Each field with a text is an option of ``misa bench``."""

    suite: str = "throughput"
    model: str = option("llama-90m", "configuration for time and memory, random weights")
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
    data: str = option("stdlib", "stdlib or a text file: of time and memory")
    timeout_s: int = option(300, "seconds that a case may take")
    sizes: str = option("", "round: parameters of the kernel benchmarks, as in 4M,64M")


_ON_GPU: dict[str, Any] = {
    "device": "cuda:0", "batch": 2, "length": 2048, "checkpointing": True, "loss": "lean", "vram_gib": CARD_GIB,
}  # fmt: skip
#: Named settings for ``--preset``; options given beside them win.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "quick": {
        "device": "cpu", "model": "tiny", "length": 64, "delta": 0.1, "inner_steps": 4, "steps": 8, "warm_up": 1,
        "sizes": "20k",
    },
    "gpu": {**_ON_GPU, "model": "tinyllama", "steps": 30},
    "gpu-8b": {**_ON_GPU, "suite": "throughput", "model": "llama-3-8b"},
}  # fmt: skip

#: Models over bytes that the learning suite trains itself, by AdamW on the standard library.
RECIPES: dict[str, dict[str, Any]] = {
    name: {
        "model": {
            "vocab_size": 320, "hidden_size": hidden, "intermediate_size": 8 * hidden // 3 // 16 * 16,
            "num_hidden_layers": layers, "num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 32,
            "max_position_embeddings": 512, "initializer_range": round(hidden**-0.5, 3), "tie_word_embeddings": False,
        },
        "steps": steps, "batch": batch, "length": 128, "lr": lr,
    }
    for name, hidden, layers, steps, batch, lr in (
        ("tiny", 64, 2, 60, 8, 4e-3), ("quick", 128, 6, 300, 8, 3e-3), ("small", 160, 8, 1500, 16, 2e-3),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Learning:
    """A matrix of ``misa bench learning``. Each field with a text is an option of it."""

    base: str = option("small", "tiny, quick or small (trained here, once), or a model directory as of misa fetch")
    tasks: tuple[str, ...] = option(("text",), "text, instruct, math")
    methods: tuple[str, ...] = option((), "methods, or MISA with options: misa:rest=sign:rest_lr=0.3 (default: all)")
    base_lr: float = option(1e-3, "what each method's rates are tried around, times the method's own factor")
    factors: tuple[float, ...] = option((0.4, 1.0, 2.5), "rates tried by every method, as multiples")
    lrs: tuple[float, ...] = option((), "the same rates for every method instead of these multiples")
    seeds: tuple[int, ...] = option((0,), "seeds, separated by commas")
    steps: int = option(300, "of a run")
    batch: int = option(4, "sequences of a step")
    length: int = option(128, "tokens of a sequence")
    delta: float = option(0.06, "share that trains at a time")
    inner_steps: int = option(5, "steps between two switches, for every method that switches")
    rows: int = option(64, "rows of each held-out text")
    questions: int = option(0, "problems of the task math to solve")
    points: int = option(4, "of each curve")
    dtype: str = option("float32", "of the weights: float32 or bfloat16")
    threads: int = option(0, "of a run (default: torch's)")
    timeout_s: int = option(3600, "seconds that a run may take")


#: ``misa bench learning --preset NAME``: what it runs, and how long that takes.
LEARNING: dict[str, dict[str, Any]] = {
    "quick": {"base": "quick", "steps": 60, "delta": 0.1, "inner_steps": 2, "rows": 32, "factors": (1.0,)},
    "small": {"seeds": (0, 1, 2, 3, 4)},
    "real": {
        "base": "", "tasks": ("text", "instruct", "math"), "base_lr": 1e-4, "seeds": (0, 1, 2), "steps": 60,
        "delta": 0.1, "inner_steps": 2, "rows": 24, "questions": 32, "points": 2,
    },
}  # fmt: skip
