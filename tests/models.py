"""Tiny random models of every family, built from real transformers configs: ``TINY["llama"]()``.

CPU, fp32, seeded without touching the global generator, no dropout, vocabulary 64. All take ``input_ids`` and
``labels``. Options override the config: ``TINY["llama"](num_hidden_layers=1, tie_word_embeddings=True)``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

VOCABULARY = 64

#: Fields by their most common name; a config class takes GPT-2's ``n_embd`` and the like under these names too.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Half as many key and value heads as query heads: k and v are smaller than q and o.
GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}
MOE = {**GROUPED, "num_experts_per_tok": 2}
QWEN_MOE = {**MOE, "num_experts": 4, "moe_intermediate_size": 24}
ENCODER = {"intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

#: name -> (config class, auto class, what differs from COMMON)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "AutoModelForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "AutoModelForCausalLM", GROUPED),
    "qwen2": ("Qwen2Config", "AutoModelForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "AutoModelForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", "AutoModelForCausalLM", {**GROUPED, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", "AutoModelForCausalLM", {**GROUPED, "head_dim": 8}),
    "phi3": ("Phi3Config", "AutoModelForCausalLM", GROUPED),
    "gpt2": ("GPT2Config", "AutoModelForCausalLM", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": ("OPTConfig", "AutoModelForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "gpt_neox": ("GPTNeoXConfig", "AutoModelForCausalLM", {"intermediate_size": 64}),
    "olmo2": ("Olmo2Config", "AutoModelForCausalLM", GROUPED),
    "mixtral": ("MixtralConfig", "AutoModelForCausalLM", {**MOE, "num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", "AutoModelForCausalLM", {**QWEN_MOE, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3MoeConfig", "AutoModelForCausalLM", {**QWEN_MOE, "head_dim": 8}),
    "bert": ("BertConfig", "AutoModelForMaskedLM", ENCODER),
    "roberta": ("RobertaConfig", "AutoModelForMaskedLM", ENCODER),
    "distilbert": ("DistilBertConfig", "AutoModelForMaskedLM", {"hidden_dim": 64, "dropout": 0.0}),
}


def build(name: str, **options: Any) -> nn.Module:
    """The tiny model ``name`` with ``options`` put over its config, in training mode."""
    import transformers  # seconds to import; files that need no model must not pay for it

    config_class, auto_class, special = MODELS[name]
    config = getattr(transformers, config_class)(**{**COMMON, **special, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, auto_class).from_config(config).train()


TINY: dict[str, Callable[..., nn.Module]] = {name: partial(build, name) for name in MODELS}
