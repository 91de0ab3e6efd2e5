"""What is trained: model shapes with random weights, batches of random tokens or text, and a loss without full logits.

Memory and speed depend on shapes alone, so no weights are needed; such a model says nothing about quality. Texts are

    stdlib       the sources of the running Python's standard library
    FILE         any text file

A token is a byte plus 3 (0 to 2 are special), so that every vocabulary of at least 259 holds it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from misa_engine.cli.demo_data import standard_library
from misa_engine.engine.marks import phase
from misa_engine.method.partition import partition
from misa_engine.planner.cards import published_config
from misa_engine.trainer.lean import lean_options


def _small(family: str, vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, **own: Any) -> Any:
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate}
    return {"model_type": family, **sizes, "num_hidden_layers": layers, "num_attention_heads": heads, **own}


#: For a CPU: every code path in seconds. The published shapes are those of ``misa_engine.planner.cards``.
SMALL_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _small("llama", 384, 128, 352, 4, 4, num_key_value_heads=2),
    "tiny-qwen": _small("qwen2", 384, 128, 352, 4, 4, num_key_value_heads=2),
    "llama-2m": _small("llama", 384, 192, 512, 4, 3, num_key_value_heads=3),
    "llama-90m": _small("llama", 8192, 768, 2048, 12, 12, num_key_value_heads=12, tie_word_embeddings=True),
}
#: Tokens whose logits exist at a time: 256 of a vocabulary of 128,256 are 0.13 GB in float32.
LOSS_CHUNK = 256


def model_config(shape: str) -> PreTrainedConfig:
    """The published configuration of a model, or one of SMALL_SHAPES.

    Raises:
        ValueError: the name is unknown.
    """
    if shape in SMALL_SHAPES:
        return AutoConfig.for_model(**SMALL_SHAPES[shape])
    return published_config(shape)


def fitting_delta(shape: str, delta: float) -> float:
    """``delta``, or where a small shape's largest matrix is a larger share of it, that share rounded up to 0.001."""
    if shape not in SMALL_SHAPES:
        return delta
    with torch.device("meta"):
        parts = partition(AutoModelForCausalLM.from_config(model_config(shape)))
    return max(delta, math.ceil(1000 * max(unit.numel for unit in parts.units) / parts.total) / 1000)


def flash_attention_only() -> None:
    """Leave torch no attention but what a 24 GB card uses and the plan counts on; 2.11 prefers cuDNN on sm_90."""
    torch.backends.cuda.enable_flash_sdp(True)
    for other in ("cudnn", "mem_efficient", "math"):
        getattr(torch.backends.cuda, f"enable_{other}_sdp")(False)


def build_model(
    shape: str,
    device: torch.device,
    *,
    checkpointing: bool,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    residents: str | None = None,
) -> PreTrainedModel:
    """A model with random weights, made in its final dtype on its final device.

    Nothing is copied or converted, so that an 8B model takes 15 GiB while it is made, too.

    Args:
        shape: a name that ``model_config`` knows.
        device: where it is made and stays.
        checkpointing: recompute each layer in the backward pass.
        dtype: None is bfloat16 on CUDA and float32 elsewhere.
        seed: of the weights; the global generators are seeded.
        residents: format in which its layers' matrices rest in 8 bits on the device; the exact ones are on the host.
    """
    torch.manual_seed(seed)
    if device.type == "cuda":
        flash_attention_only()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    config = model_config(shape)
    config.use_cache = False
    if residents is not None:
        model = build_resting(config, device, dtype, residents)
    else:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": _recomputation})
        # With non-reentrant checkpointing nothing needs it, and every method's backward may stop where it can.
        model.disable_input_require_grads()
    return model


def build_resting(config: Any, device: torch.device, dtype: torch.dtype, residents: str) -> PreTrainedModel:
    """A model with residents and random weights; one matrix at a time is on the device in full."""
    from misa_engine.trainer.loading import random_model

    model: PreTrainedModel = random_model(config, residents, device=device, dtype=dtype, attn_implementation="sdpa")
    return model


class _Recomputation(ExitStack):
    """The phase "recompute", which begins anew whenever the context is entered: LOMO runs two backward passes."""

    def __enter__(self) -> _Recomputation:
        self.enter_context(phase("recompute"))
        return super().__enter__()


def _recomputation() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Torch's checkpointing asks for the contexts of the forward pass and of what it runs again."""
    return nullcontext(), _Recomputation()


def token_batches(model: Any, batch: int, length: int, device: torch.device, seed: int = 0) -> Iterator[Tensor]:
    """Endless random token ids (batch, length), the same for every method."""
    generator = torch.Generator(device=device).manual_seed(seed)
    vocabulary = model.config.vocab_size
    while True:
        yield torch.randint(vocabulary, (batch, length), generator=generator, device=device)


# ---- text that every machine has, as token ids: nothing is downloaded ----

#: Share of the documents that is held out; whole documents, so that nothing in it was seen.
HELD_OUT = 0.1
SPECIAL = 3
#: Bytes of text used at most: 40,000 rows of 128.
MOST_BYTES = 5 << 20


def documents(source: str, seed: int = 0) -> list[str]:
    """The texts of a source.

    Args:
        source: "stdlib", or the path of a text file.
        seed: of the order of documents.

    Raises:
        ValueError: the file cannot be read or is too short to hold something out.
    """
    if source == "stdlib":
        return [text[:65536] for text in itertools.islice(standard_library(seed), 300)]
    try:
        text = Path(source).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--data {source}: neither stdlib nor a readable text file ({error})") from error
    pieces = re.findall(r"(?s).{1,4096}", text[:MOST_BYTES])
    if len(pieces) < 20:
        raise ValueError(f"--data {source} holds {len(text)} characters; at least {20 * 4096} are needed")
    return pieces


@lru_cache(maxsize=4)
def rows(source: str, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of token ids to train on, shuffled, and rows held out; both (n, length) int64."""
    texts = documents(source, seed)
    held_out = max(1, round(HELD_OUT * len(texts)))
    generator = torch.Generator().manual_seed(seed)
    train, test = _packed(texts[held_out:], length), _packed(texts[:held_out], length)
    return train[torch.randperm(len(train), generator=generator)], test


def _packed(texts: list[str], length: int) -> Tensor:
    data = "\0".join(texts).encode()[:MOST_BYTES]
    data = data[: len(data) // length * length]
    if not data:
        raise ValueError(f"the text is shorter than one sequence of {length} bytes")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).long().add_(SPECIAL).view(-1, length)


def batches(data: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    """Endless micro-batches (size, length) in the data's order, the same for every method."""
    for position in itertools.count(0, size):
        yield data[torch.arange(position, position + size) % len(data)].to(device)


# ---- loss ----


def make_loss(
    model: PreTrainedModel, device: torch.device, kind: str = "lean"
) -> tuple[str, Callable[[Tensor], Tensor]]:
    """The leanest loss that can run here: Liger's fused linear cross-entropy on CUDA, else one in chunks.

    Args:
        model: a causal language model.
        device: where it trains.
        kind: "lean", or "plain" for the model's own.

    Returns:
        What it is called in a row, and token ids (batch, length) -> mean next-token loss.
    """
    if kind == "plain":
        return "plain", lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss
    if lean_options(model.config.model_type, device, sft=False):
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)
        return "liger", lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss
    return "chunked", lambda ids: chunked_loss(model, ids)


def chunked_loss(model: PreTrainedModel, ids: Tensor, chunk: int = LOSS_CHUNK) -> Tensor:
    """Mean next-token loss; the logits of ``chunk`` tokens exist at a time and are made again in the backward pass.

    Args:
        model: a causal language model of transformers without soft-capped logits.
        ids: (batch, length) token ids.
        chunk: tokens a piece.
    """
    head = model.get_output_embeddings()

    def piece(hidden: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(head(hidden).float(), targets, reduction="sum")

    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": _recomputation}
    losses = [checkpoint(piece, h, t, **options) for h, t in pieces]
    return torch.stack(losses).sum() / len(targets)
