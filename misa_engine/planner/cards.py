"""Graphics cards and published model configurations that ``misa plan`` knows by name. Data, nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from misa_engine.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Name -> MiB, as nvidia-smi or rocm-smi report the total of an idle card. Where a card was sold in two sizes its name
#: ends in the size.
CARDS: dict[str, int] = {
    "gtx1080ti": 11264, "rtx2060": 6144, "rtx2070": 8192, "rtx2080": 8192, "rtx2080ti": 11264, "titanrtx": 24576,
    "rtx3060-8": 8192, "rtx3060-12": 12288, "rtx3060ti": 8192, "rtx3070": 8192, "rtx3070ti": 8192,
    "rtx3080-10": 10240, "rtx3080-12": 12288, "rtx3080ti": 12288, "rtx3090": 24576, "rtx3090ti": 24564,
    "rtx4060": 8188, "rtx4060ti-8": 8188, "rtx4060ti-16": 16380, "rtx4070": 12282, "rtx4070super": 12282,
    "rtx4070ti": 12282, "rtx4070tisuper": 16376, "rtx4080": 16376, "rtx4080super": 16376, "rtx4090": 24564,
    "rtx4090d": 24564, "rtx4090laptop": 16376, "rtx5060": 8151, "rtx5060ti-8": 8151, "rtx5060ti-16": 16311,
    "rtx5070": 12227, "rtx5070ti": 16303, "rtx5080": 16303, "rtx5090": 32607, "rtx5090laptop": 24463,
    "rtxa2000-6": 6138, "rtxa2000-12": 12282, "rtxa4000": 16376, "rtxa4500": 20470, "rtxa5000": 24564,
    "rtxa6000": 49140, "rtx4000ada": 20475, "rtx5000ada": 32760, "rtx6000ada": 49140, "rtxpro6000": 97887,
    "p100": 16276, "p40": 24576, "t4": 15360, "v100-16": 16384, "v100-32": 32768, "a2": 15356, "a10": 23028,
    "a10g": 23028, "a16": 15356, "a30": 24576, "a40": 46068, "l4": 23034, "l40": 46068, "l40s": 46068,
    "a100-40": 40960, "a100-80": 81920, "a800": 81920, "h100": 81559, "h100nvl": 95830, "h800": 81559, "h20": 97871,
    "gh200": 97871, "h200": 143771, "b200": 183359, "gb200": 189471, "b300": 275040,
    "rx7900xtx": 24560, "rx9070xt": 16304, "w7900": 49136, "mi210": 65520, "mi250x": 65520, "mi300x": 196592,
    "mi325x": 262128, "mi355x": 294896,
}  # fmt: skip
#: Without bfloat16 arithmetic: known, but never recommended.
NO_BFLOAT16 = frozenset(
    ("gtx1080ti", "rtx2060", "rtx2070", "rtx2080", "rtx2080ti", "titanrtx", "p100", "p40", "t4", "v100-16", "v100-32")
)
#: What a lookup of names lists: the whole table would be a page.
COMMON_CARDS = "rtx3090, rtx4090, rtx5090, t4, a10, l4, a100-40, a100-80, h100, h200, b200, mi300x"
#: GiB beyond which an amount of memory is a mistake: no single card has half of it.
MOST_GIB = 1000

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
    "llama-3.1-8b": dict(
        model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False,
    ),
    "llama-3.2-1b": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, head_dim=64,
        tie_word_embeddings=True,
    ),
    "llama-2-13b": dict(
        model_type="llama", vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=40, max_position_embeddings=4096, tie_word_embeddings=False,
    ),
    "llama-3.3-70b": dict(
        model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False,
    ),
    "llama-3-70b": dict(
        model_type="llama", vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
    ),
    "llama-2-70b": dict(
        model_type="llama", vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=4096, tie_word_embeddings=False,
    ),
    "smollm2-135m": dict(
        model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "smollm2-1.7b": dict(
        model_type="llama", vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "mistral-nemo-12b": dict(
        model_type="mistral", vocab_size=131072, hidden_size=5120, intermediate_size=14336, num_hidden_layers=40,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072, head_dim=128,
        sliding_window=None, tie_word_embeddings=False,
    ),
    "mistral-small-24b": dict(
        model_type="mistral", vocab_size=131072, hidden_size=5120, intermediate_size=32768, num_hidden_layers=40,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=32768, head_dim=128, sliding_window=None,
        tie_word_embeddings=False,
    ),
    "qwen2.5-0.5b": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, use_sliding_window=False,
        tie_word_embeddings=True,
    ),
    "qwen2.5-1.5b": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=131072, use_sliding_window=False,
        tie_word_embeddings=True,
    ),
    "qwen2.5-3b": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, max_position_embeddings=32768, use_sliding_window=False,
        tie_word_embeddings=True,
    ),
    "qwen2.5-32b": dict(
        model_type="qwen2", vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_hidden_layers=64,
        num_attention_heads=40, num_key_value_heads=8, max_position_embeddings=131072, use_sliding_window=False,
        tie_word_embeddings=False,
    ),
    "qwen2.5-72b": dict(
        model_type="qwen2", vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=131072, use_sliding_window=False,
        tie_word_embeddings=False,
    ),
    "qwen3-0.6b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=40960, head_dim=128,
        use_sliding_window=False, tie_word_embeddings=True,
    ),
    "qwen3-1.7b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=40960, head_dim=128,
        use_sliding_window=False, tie_word_embeddings=True,
    ),
    "qwen3-4b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=40960, head_dim=128,
        use_sliding_window=False, tie_word_embeddings=True,
    ),
    "qwen3-14b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=5120, intermediate_size=17408, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=8, max_position_embeddings=40960, head_dim=128,
        use_sliding_window=False, tie_word_embeddings=False,
    ),
    "qwen3-32b": dict(
        model_type="qwen3", vocab_size=151936, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=40960, head_dim=128,
        use_sliding_window=False, tie_word_embeddings=False,
    ),
    "gemma-2-2b": dict(
        model_type="gemma2", vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=8192, head_dim=256, sliding_window=4096,
        tie_word_embeddings=True,
    ),
    "gemma-2-27b": dict(
        model_type="gemma2", vocab_size=256000, hidden_size=4608, intermediate_size=36864, num_hidden_layers=46,
        num_attention_heads=32, num_key_value_heads=16, max_position_embeddings=8192, head_dim=128, sliding_window=4096,
        tie_word_embeddings=True,
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
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "mistral-nemo-12b": "mistralai/Mistral-Nemo-Base-2407",
    "mistral-small-24b": "mistralai/Mistral-Small-24B-Base-2501",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-27b": "google/gemma-2-27b",
}

_BRANDS = ("nvidia", "geforce", "amd", "radeon", "instinct", "tesla", "quadro", "rtx", "gtx", "rx")
_NOISE = frozenset((*_BRANDS, "pcie", "gpu", "generation", "graphics"))
_SEVERAL = re.compile(r"\d+ ?[x*] ?[a-z0-9]", re.IGNORECASE)
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(g|gb|gib|m|mb|mib)?", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """A card, or just an amount of memory."""

    name: str
    total_bytes: int

    @classmethod
    def of(cls, text: str) -> Card:
        """A card in any spelling (``4090``, ``RTX 4090``, ``A100 80GB``), or a size: ``24``, ``24GiB`` (GB means GiB
        here) or ``24564MiB``. A bare number that is a card's is the card.

        Raises:
            UserError: neither, or a size that no card has; the message lists the common names.
        """
        name = _card_name(text)
        if name is not None:
            return cls(name, CARDS[name] << 20)
        size = _SIZE.fullmatch(text.strip())
        if size is None or float(size.group(1)) <= 0:
            several = " A plan is for one card: leave the number out." if _SEVERAL.match(text.strip()) else ""
            raise UserError(
                f"unknown card {text!r}.{several}{did_you_mean(text.strip().lower(), CARDS)} Known: {COMMON_CARDS} and "
                "others; or give its memory, for instance 24GiB."
            )
        unit = 2**20 if (size.group(2) or "g").lower().startswith("m") else 2**30
        total = int(float(size.group(1)) * unit)
        if total > MOST_GIB << 30:
            raise UserError(
                f"{text!r} is no card that is known, and as a size it is {total / 2**30:,.0f} GiB, more than any card "
                f"has. Known: {COMMON_CARDS} and others; or give the card's memory, for instance 24GiB or 24564MiB."
            )
        return cls(f"{size.group(1)} {'MiB' if unit == 2**20 else 'GiB'}", total)

    @classmethod
    def smallest(cls, needed: int) -> Card | None:
        """The smallest known card with ``needed`` bytes that computes in bfloat16."""
        fitting = [(mib << 20, name) for name, mib in CARDS.items() if mib << 20 >= needed and name not in NO_BFLOAT16]
        return cls(min(fitting)[1], min(fitting)[0]) if fitting else None


def _words(text: str) -> list[str]:
    """The parts of a card's name that tell it from others: without maker, brand, form factor and kind of memory."""
    words = [re.sub(r"^(rtx|gtx|rx)(?=.)", "", word) for word in re.findall(r"[a-z0-9.]+", text.lower())]
    return [word for word in words if word not in _NOISE and not re.fullmatch(r"sxm\d?|hbm\d?e?", word)]


def _card_name(text: str) -> str | None:
    """The key of CARDS that ``text`` means; None when it is no card's name.

    Raises:
        UserError: a card that was never sold with the memory that is named with it.
    """
    words = _words(text)
    sizes = _sizes_of_cards()
    if "".join(words) in sizes:  # sold in two sizes and none named: the smaller, on which the plan then also holds
        return min(sizes["".join(words)].items())[1]
    memory = re.fullmatch(r"(\d{1,3})(g|gb|gib)?", words[-1]) if len(words) > 1 else None
    if memory is None or "".join(words[:-1]) not in sizes:
        return None
    wanted, sold = int(memory.group(1)), sizes["".join(words[:-1])]
    closest = min(sold, key=lambda size: abs(size - wanted))
    if abs(closest - wanted) > 0.08 * wanted:  # 24 GB are 22.5 GiB where error correction takes its share
        raise UserError(f"{text!r}: that card has {' or '.join(f'{size:.0f}' for size in sorted(sold))} GiB.")
    return sold[closest]


@cache
def _sizes_of_cards() -> dict[str, dict[float, str]]:
    """Spelling without size -> GiB -> name."""
    found: dict[str, dict[float, str]] = {}
    for name, mib in CARDS.items():
        found.setdefault("".join(_words(name.partition("-")[0])), {})[mib / 1024] = name
    return found


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
