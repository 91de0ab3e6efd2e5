"""What the examples share: options, and a model of 100,000 parameters where none is named. Nothing is downloaded."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig

#: The least that a chat template needs.
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def arguments() -> argparse.Namespace:
    """``--model``, ``--steps`` and ``--output_dir``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="directory or Hub id of a causal language model; none: a tiny random one")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output_dir", default="example_out")
    return parser.parse_args()


def model_and_tokenizer(name: str | None) -> tuple[Any, Any]:
    """The named model in bfloat16 on the GPU, if there is one, or a tiny Llama with a byte tokenizer."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name is not None:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map={"": device})
        return model, AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0, chat_template=CHAT)
    config = LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(device), tokenizer
