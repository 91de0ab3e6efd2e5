"""Graphics cards and published model configurations that ``misa plan`` knows by name. Data, nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from misa_engine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Name -> MiB, as nvidia-smi reports the total of an idle card.
CARDS: dict[str, int] = {
    "rtx4060ti-16": 16380,
    "rtx4080": 16376,
    "rtx3090": 24576,
    "rtx4090": 24564,
    "a10": 23028,
    "l4": 23034,
    "rtx5090": 32607,
    "a100-40": 40960,
    "l40s": 46068,
    "a100-80": 81920,
    "h100": 81559,
}

#: Name -> fields of the published config.json on which memory depends (huggingface.co, read in 2026).
MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    ),
    "llama-2-7b": dict(
        model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096, tie_word_embeddings=False,
    ),
    "mistral-7b": dict(
        model_type="mistral", vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768, sliding_window=None,
        tie_word_embeddings=False,
    ),
    "qwen2.5-7b": dict(
        model_type="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=131072, use_sliding_window=False,
        tie_word_embeddings=False,
    ),
    "qwen3-8b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        use_sliding_window=False, tie_word_embeddings=False,
    ),
    "gemma-2-9b": dict(
        model_type="gemma2", vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42,
        num_attention_heads=16, num_key_value_heads=8, head_dim=256, max_position_embeddings=8192, sliding_window=4096,
        tie_word_embeddings=True,
    ),
    "tinyllama": dict(
        model_type="llama", vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
    ),
    "llama-3.2-3b": dict(
        model_type="llama", vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
        num_attention_heads=24, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "qwen2.5-14b": dict(
        model_type="qwen2", vocab_size=152064, hidden_size=5120, intermediate_size=13824, num_hidden_layers=48,
        num_attention_heads=40, num_key_value_heads=8, max_position_embeddings=131072, use_sliding_window=False,
        tie_word_embeddings=False,
    ),
}  # fmt: skip

#: The same models on the Hub.
HUB_IDS = {
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.3",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "gemma-2-9b": "google/gemma-2-9b",
    "tinyllama": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B",
}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(g|gb|gib|m|mb|mib)?", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A card, or just an amount of memory."""

    name: str
    total_bytes: int

    @classmethod
    def of(cls, text: str) -> Card:
        """A name of CARDS, or a size such as ``24``, ``24GiB`` (the same: GB means GiB here) or ``24564MiB``.

        Raises:
            UserError: neither; the message lists the known names.
        """
        key = text.strip().lower()
        if key in CARDS:
            return cls(key, CARDS[key] << 20)
        size = _SIZE.fullmatch(key)
        if size is None or float(size.group(1)) <= 0:
            raise UserError(
                f"unknown card {text!r}.{did_you_mean(key, CARDS)} Known: {', '.join(CARDS)}; or give its memory, for "
                "instance 24GiB."
            )
        unit = 2**20 if (size.group(2) or "g").startswith("m") else 2**30
        return cls(f"{size.group(1)} {'MiB' if unit == 2**20 else 'GiB'}", int(float(size.group(1)) * unit))

    @classmethod
    def smallest(cls, needed: int) -> Card | None:
        """The smallest known card with ``needed`` bytes."""
        fitting = [(mib << 20, name) for name, mib in CARDS.items() if mib << 20 >= needed]
        return cls(min(fitting)[1], min(fitting)[0]) if fitting else None


def published_config(name: str) -> PretrainedConfig:
    """The transformers configuration of a model in MODELS.

    Raises:
        UserError: the name is unknown; the message lists the known ones.
    """
    from transformers import AutoConfig

    key = name.strip().lower()
    if key not in MODELS:
        raise UserError(f"unknown model {name!r}.{did_you_mean(key, MODELS)} Known: {', '.join(MODELS)}.")
    fields = dict(MODELS[key])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, dtype="bfloat16")
    config._name_or_path = key
    return config
