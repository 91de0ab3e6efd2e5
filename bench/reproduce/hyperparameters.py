"""The recipes' settings row by row: value, and whether the paper, the published code or nobody states it.

``tests/test_reproduce_recipes.py`` compares every row with the packaged file, and every line of a file with a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from misa_engine.bench.reproduce.paper import ARXIV

#: github.com/pkumelon/MISA, its README's commands.
CODE = "published code, README"
#: Its scripts, as lovekdl/MISA, which is the same code, has them at 01f9467.
SCRIPTS = "published code, scripts"
PAPER = f"{ARXIV}, experiments"
ALGORITHM_1 = f"{ARXIV}, Algorithm 1"
OURS = "not published: ours"


@dataclass(frozen=True)
class Row:
    """A setting of a recipe."""

    option: str
    value: Any
    source: str
    """One of the names above, with a word more where it needs one."""


_MATH = f"{SCRIPTS}/train_math_misa.sh (written for Llama-2-7B)"
_METHOD = (Row("delta", 0.03, PAPER), Row("inner_steps", 50, CODE), Row("eta", 1.0, CODE))


def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> Row:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    heads_and_length = {
        "num_attention_heads": heads, "num_key_value_heads": heads, "max_position_embeddings": 1024,
    }  # fmt: skip
    return Row("config_overrides", {**sizes, **heads_and_length}, f"{PAPER} (sizes), GaLore's configurations (heads)")


def _pretraining(sizes: Row) -> tuple[Row, ...]:
    return (
        Row("model_name_or_path", "huggyllama/llama-7b", f"{OURS}: vocabulary of 32,000 as in the paper"),
        sizes,
        Row("dataset", "allenai/c4", PAPER),
        Row("dataset_config", "en", OURS),
        Row("dataset_streaming", True, OURS),
        Row("from_scratch", True, PAPER),
        Row("delta", 0.25, f"{CODE} (BCD_RATIO)"),
        Row("inner_steps", 50, f"{CODE} (BCD_INTERVAL)"),
        Row("eta", 500.0, f"{CODE} (MISA_ETA)"),
        Row("always_train", ["embed_tokens", "lm_head"], f"{CODE} (include_embedding_and_lm_head)"),
        Row("learning_rate", 1e-3, CODE),
        Row("lr_scheduler_type", "cosine", OURS),
        Row("warmup_steps", 0.1, f"{CODE} (5,500 of 55,000)"),
        Row("max_grad_norm", 0.0, f"{CODE} (grad_clipping)"),
        Row("max_length", 256, PAPER),
        Row("packing", True, OURS),
        Row("packing_strategy", "wrapped", OURS),
        Row("gradient_checkpointing", False, OURS),
        Row("max_eval_samples", 2000, OURS),
    )


#: Recipe without its first word -> rows. ``paper-`` and ``official-`` differ in the preset alone.
HYPERPARAMETERS: dict[str, tuple[Row, ...]] = {
    "llama2-7b-alpaca": (
        Row("model_name_or_path", "meta-llama/Llama-2-7b-hf", CODE),
        Row("dataset", "vicgalle/alpaca-gpt4", CODE),
        *_METHOD,
        Row("learning_rate", 5e-5, CODE),
        Row("lr_scheduler_type", "cosine", CODE),
        Row("per_device_train_batch_size", 2, CODE),
        Row("gradient_accumulation_steps", 8, CODE),
        Row("max_length", 512, CODE),
        Row("num_train_epochs", 3, CODE),
        Row("completion_only_loss", True, OURS),
        Row("seed", 42, CODE),
        Row("max_eval_samples", 500, f"{CODE} (validation_samples)"),
        Row("eval_fraction", 0.01, OURS),
        Row("eval_steps", 200, CODE),
    ),
    "llama3-8b-commonsense": (
        Row("model_name_or_path", "meta-llama/Meta-Llama-3-8B", PAPER),
        Row("dataset", "commonsense_170k.json", PAPER),
        *_METHOD,
        Row("learning_rate", 1e-5, f"{OURS}, within the paper's search from 2e-4 to 1e-6"),
        Row("lr_scheduler_type", "cosine", f"{CODE} (instruction tuning)"),
        Row("warmup_steps", 0.03, OURS),
        Row("per_device_train_batch_size", 8, OURS),
        Row("gradient_accumulation_steps", 2, OURS),
        Row("max_length", 256, OURS),
        Row("num_train_epochs", 3, f"{CODE} (instruction tuning)"),
        Row("eval_fraction", 0.005, OURS),
    ),
    "llama3-8b-math": (
        Row("model_name_or_path", "meta-llama/Meta-Llama-3-8B", PAPER),
        Row("dataset", "math_10k.json", PAPER),
        *_METHOD,
        Row("learning_rate", 5e-5, _MATH),
        Row("lr_scheduler_type", "cosine", _MATH),
        Row("per_device_train_batch_size", 2, _MATH),
        Row("gradient_accumulation_steps", 4, _MATH),
        Row("max_length", 512, _MATH),
        Row("num_train_epochs", 3, _MATH),
        Row("seed", 42, _MATH),
        Row("eval_fraction", 0.01, OURS),
    ),
    "llama-130m-c4": (
        *_pretraining(_sizes(768, 2048, 12, 12)),
        Row("per_device_train_batch_size", 128, f"{OURS}; 256 sequences a step are the paper's"),
        Row("gradient_accumulation_steps", 2, f"{OURS}; 256 sequences a step are the paper's"),
        Row("max_steps", 20000, f"{OURS}: GaLore's at this size"),
        Row("eval_split", "validation", OURS),
        Row("eval_steps", 1000, OURS),
        Row("save_steps", 1000, OURS),
    ),
    "llama-350m-c4": (
        *_pretraining(_sizes(1024, 2736, 24, 16)),
        Row("per_device_train_batch_size", 32, CODE),
        Row("gradient_accumulation_steps", 8, f"{CODE} (total batch 256)"),
        Row("max_steps", 55000, CODE),
        Row("seed", 1234, CODE),
        Row("eval_split", "validation", OURS),
        Row("eval_steps", 1500, CODE),
        Row("save_steps", 1000, OURS),
    ),
}

#: What the two recipes of each experiment differ in.
VARIANTS = {"paper": Row("preset", "paper", ALGORITHM_1), "official": Row("preset", "official", CODE)}
