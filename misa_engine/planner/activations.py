"""Bytes of a forward and backward pass, in closed form, for gated-MLP decoders with rotary positions.

    what stays from forward to backward     saved_by_layer(): by layer, by which of its matrices train
    what comes and goes on top              peak(): the largest moment of the pass

Legend, all in elements of one token: h hidden, q and k widths of query and key (heads x head size), i intermediate,
V vocabulary; L layers, T tokens of a sequence, N tokens of a micro-batch. Weights and activations are bfloat16.

The formulas follow transformers 5.23, TRL 1.16 and liger-kernel 0.8.5, operation by operation. ``planner.probe``
measures the same pass on fake tensors; the tests hold the two within 3% of each other at full size. Families outside
``CLOSED_FORM`` (other norms, experts, eager attention) are measured by the probe instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

#: CUDA context, cuBLAS workspaces and loaded kernels: 0.35 to 0.5 GiB by card and driver; the upper end is taken.
CONTEXT_BYTES = 2**29
#: What the caching allocator cannot hand out (fragments, rounding to 2 MiB pages) and what a display server holds.
SLACK_BYTES = 3 * 2**28

#: model_type of the decoders that the formulas describe.
CLOSED_FORM = ("llama", "mistral", "qwen2", "qwen3")

LOSSES = ("plain", "chunked", "liger")
#: TRL 1.16's fused head works on tiles of tokens x vocabulary (trl.kernels.chunked_logprob, trl.trainer.utils).
CHUNKED_TOKENS, CHUNKED_VOCABULARY = 4096, 32768

QKV, GATE_UP = frozenset("qkv"), frozenset(("gate", "up"))


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its memory depends on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    qk_norm: bool = False
    tied: bool = False
    windows: tuple[int | None, ...] = ()
    """Attention window of each layer; None attends to everything."""

    @property
    def query(self) -> int:
        """Width of q and of the attention output."""
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        """Width of k, and of v."""
        return self.kv_heads * self.head_size

    @classmethod
    def of(cls, config: Any) -> DecoderShape | None:
        """Read a transformers config; None when the formulas do not describe its model."""
        if config.model_type not in CLOSED_FORM or getattr(config, "_attn_implementation", None) == "eager":
            return None
        if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
            return None
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            layers=layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            qk_norm=config.model_type == "qwen3",
            tied=bool(config.tie_word_embeddings),
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        )


@dataclass(frozen=True)
class MicroBatch:
    """How the forward and backward pass is run."""

    batch: int = 1
    """Sequences of a micro-batch."""
    length: int = 2048
    """Tokens of each."""
    checkpointing: bool = True
    """Recompute each layer in the backward pass; only its input is kept."""
    loss: str = "chunked"
    """plain: the model's own, all logits in float32; chunked: TRL's fused head; liger: fused linear cross-entropy."""
    liger: bool = False
    """Liger's RMSNorm, SwiGLU and RoPE."""
    gemm_gradients: bool = True
    """Weight gradients are written into their slots by the GEMM, without a temporary."""
    padded: bool = False
    """Sequences of unequal length: attention gets a mask, and SDPA its memory-efficient kernel instead of flash."""

    @property
    def tokens(self) -> int:
        """N, the tokens of a micro-batch."""
        return self.batch * self.length


@dataclass(frozen=True)
class Peak:
    """The moment of a pass at which the most bytes are alive, weights and arena excluded."""

    activations: int
    """Saved in the forward pass for the backward pass."""
    cross_entropy: int
    """Of the loss and of the output head's gradient."""
    temporaries: int
    """Gradients on their way and the working memory of operations."""
    moment: str
    """Where it is: loss, layer 31, embedding …"""

    @property
    def total(self) -> int:
        """All of it, bytes."""
        return self.activations + self.cross_entropy + self.temporaries


@dataclass(frozen=True)
class Flow:
    """Which tensors of a layer need a gradient."""

    layer: int
    recorded: bool
    """Anything in it or below it trains."""
    input: bool
    normed: bool
    attention: bool
    middle: bool
    gate: bool
    up: bool

    @classmethod
    def of(cls, active: Collection[str], layer: int, *, recorded: bool, input: bool) -> Flow:
        """Follow the gradient down a layer with these active kinds, whose input needs one or not."""
        normed = input or "norm1" in active
        attention = normed or bool(QKV & set(active))
        middle = attention or "o" in active
        mlp = middle or "norm2" in active
        return cls(layer, recorded, input, normed, attention, middle, mlp or "gate" in active, mlp or "up" in active)


def saved_by_layer(shape: DecoderShape, micro_batch: MicroBatch, active: Collection[str], flow: Flow) -> int:
    """Bytes that one layer keeps for its backward pass, its input (a checkpoint's boundary) not counted.

    Args:
        shape: the model.
        micro_batch: how it is run.
        active: kinds that train in this layer: q, k, v, o, gate, up, down, norm1, norm2.
        flow: where gradients flow in it.
    """
    h, i, query, key = shape.hidden, shape.intermediate, shape.query, shape.key

    def norm(width: int, rows: int, grad: bool, trains: bool = False, input_kept: bool = False) -> int:
        if micro_batch.liger:  # LigerRMSNormFunction saves its input and one float32 a row
            return (0 if input_kept else 2 * width) + 4 * rows if grad or trains else 0
        # x in float32 and one float32 a row; the normed x in bfloat16 for the gradient of the weight
        return (4 * width + 4 * rows if grad else 0) + (2 * width if trains else 0)

    masked = is_masked(shape, micro_batch, flow.layer)
    per_token = norm(h, 1, flow.input, "norm1" in active, input_kept=micro_batch.checkpointing)
    if QKV & set(active):
        per_token += 2 * h
    if shape.qk_norm:
        per_token += norm(query, shape.heads, flow.normed or "q" in active)
        per_token += norm(key, shape.kv_heads, flow.normed or "k" in active)
    if flow.attention:  # q, output; k, v, which a mask makes transformers repeat for every head; log-sum-exp
        per_token += 4 * query + 4 * (query if masked else key) + 4 * shape.heads
    elif "o" in active:
        per_token += 2 * query
    per_token += norm(h, 1, flow.middle, "norm2" in active)
    if GATE_UP & set(active):
        per_token += 2 * h
    if micro_batch.liger:
        per_token += 4 * i if flow.gate or flow.up else 0  # gate and up; SiLU is computed again
    else:
        per_token += (4 * i if flow.gate else 0) + (2 * i if flow.up else 0)  # gate and up; silu(gate)
    if "down" in active:
        per_token += 2 * i
    # SDPA turns the mask into bfloat16 in every layer and keeps it
    square = 2 * micro_batch.batch * micro_batch.length**2 if masked and flow.attention else 0
    return per_token * micro_batch.tokens + square


def is_masked(shape: DecoderShape, micro_batch: MicroBatch, layer: int) -> bool:
    """Whether attention gets a mask, and so not the flash kernel: padding, or a window shorter than the sequence."""
    window = shape.windows[layer] if shape.windows else None
    return micro_batch.padded or (window is not None and micro_batch.length >= window)


def peak(
    shape: DecoderShape,
    micro_batch: MicroBatch,
    active: Mapping[int, Collection[str]],
    *,
    embedding: bool = False,
    head: bool = False,
    rest: bool = False,
    rest_outside: bool = False,
) -> Peak:
    """The largest moment of a forward and backward pass.

    Args:
        shape: the model.
        micro_batch: how it is run.
        active: layer -> kinds that train in it (see ``saved_by_layer``).
        embedding: the embedding trains.
        head: the output head trains.
        rest: what ``active`` names only rests in part: its gradients are autograd's own, freed as they are used.
        rest_outside: and so with the ends that train.
    """
    h, tokens = shape.hidden, micro_batch.tokens
    inside = replace(micro_batch, gemm_gradients=micro_batch.gemm_gradients and not rest)
    outside = replace(micro_batch, gemm_gradients=micro_batch.gemm_gradients and not rest_outside)
    lowest = 0 if embedding else min((layer for layer, kinds in active.items() if kinds), default=shape.layers)
    saved = [0] * shape.layers
    boundary = 2 * h * tokens if micro_batch.checkpointing else 0
    mask = _mask_bytes(shape, micro_batch)
    # cosines and sines of the positions; ids, labels and attention mask in int64
    shared = (
        4 * shape.head_size * micro_batch.length + 24 * micro_batch.tokens + (mask if micro_batch.checkpointing else 0)
    )

    # autograd holds the head's gradient of a tied matrix until the embedding's arrives, unless a GEMM wrote it away
    in_slot = outside.gemm_gradients and micro_batch.loss == "plain"
    held = 2 * shape.vocabulary * h if shape.tied and embedding and head and not in_slot else 0

    kept = shared  # what lies below the present layer
    moments = []
    for layer in range(shape.layers):
        kinds = active.get(layer, ())
        flow = Flow.of(kinds, layer, recorded=layer >= lowest, input=layer > lowest or embedding)
        if flow.recorded:
            saved[layer] = saved_by_layer(shape, micro_batch, kinds, flow)
            kept += boundary
            extra = held + max(_backward_moments(shape, inside, kinds, flow))
            moments.append(Peak(kept + saved[layer], 0, extra, f"layer {layer}"))
        forward = _forward_moment(shape, micro_batch, kinds, flow, saved[layer], kept)
        passing = forward - kept + (0 if micro_batch.checkpointing else mask)
        moments.append(Peak(kept, 0, passing, f"forward of layer {layer}"))
        if not micro_batch.checkpointing:
            kept += saved[layer]
    moments += _loss_moments(shape, outside, kept, lowest < shape.layers, head)
    if embedding:  # its dense gradient is as large as itself
        gradient = 2 * shape.vocabulary * h
        moments.append(Peak(shared, 0, 2 * h * tokens + gradient * (2 if shape.tied and head else 1), "embedding"))
    return max(moments, key=lambda moment: moment.total)


def _mask_bytes(shape: DecoderShape, micro_batch: MicroBatch) -> int:
    """The mask that all layers share: one byte for each pair of positions, where a layer needs one."""
    masked = any(is_masked(shape, micro_batch, layer) for layer in range(shape.layers))
    return (micro_batch.batch if micro_batch.padded else 1) * micro_batch.length**2 if masked else 0


def _forward_moment(
    shape: DecoderShape, micro_batch: MicroBatch, active: Collection[str], flow: Flow, saved: int, kept: int
) -> int:
    """Bytes alive at the end of a layer's MLP in the forward pass."""
    narrow, wide = 2 * shape.hidden * micro_batch.tokens, 2 * shape.intermediate * micro_batch.tokens
    lasting = flow.input and not micro_batch.checkpointing  # kept for the backward pass, and so in ``saved``
    # besides the product: embedding, layer input, sum after attention, normed input of the MLP, output of the MLP
    passing = 5 * narrow
    if flow.layer == 0 or (micro_batch.checkpointing and flow.recorded) or (micro_batch.liger and lasting):
        passing -= narrow  # the layer's input is the embedding, a checkpoint's boundary, or saved by Liger's norm
    if micro_batch.checkpointing:
        return kept + max(passing + wide, passing - narrow + 3 * wide)
    if micro_batch.liger and flow.middle:
        passing -= narrow
    if GATE_UP & set(active):
        passing -= narrow
    if "down" not in active:
        passing += wide
    unsaved = (
        2 - 2 * (flow.gate or flow.up) if micro_batch.liger else 2 - flow.gate - flow.up
    )  # of the product's two factors
    return kept + saved + max(passing, passing - narrow + unsaved * wide)


def _backward_moments(shape: DecoderShape, micro_batch: MicroBatch, active: Collection[str], flow: Flow) -> list[int]:
    """Bytes on top of what is saved, at the moments of a layer's backward pass."""
    h, tokens, query, key = shape.hidden, micro_batch.tokens, shape.query, shape.key
    narrow, wide = 2 * h * tokens, 2 * shape.intermediate * tokens
    down, product = "down" in active, flow.gate or flow.up
    extra = [2 * narrow]
    if micro_batch.liger and product:  # SwiGLU's backward writes the gradients over gate and up
        extra.append(narrow + wide)
    elif product:  # gradients of the product, of silu(gate) and of up; down's input is free by then
        extra.append(narrow + (1 + flow.gate + flow.up) * wide - (wide if down else 0))
        if down:
            extra.append(narrow + wide)
    if micro_batch.checkpointing and product:  # the forward that is made again, at the product: what is not saved of
        normed = 0 if GATE_UP & set(active) else narrow  # the MLP's normed input,
        middle = 0 if micro_batch.liger and flow.middle else narrow  # the sum after attention,
        silu = 0 if micro_batch.liger or flow.up else wide  # silu(gate)
        extra.append(narrow + normed + middle + silu + (0 if down else wide))  # and the product, beside the gradient
    if flow.input:
        mlp = (2 if micro_batch.liger else 3) * wide + (wide if down else 0)
        flash = 4 * query + (4 * query if key < query else 0)  # inside CUDA's kernel: dq in float32, dk and dv by head
        extra.append(2 * narrow + (2 * query + 4 * key + flash) * tokens - mlp)
        if not micro_batch.liger:
            extra.append(narrow + 20 * h * tokens - mlp)  # RMSNorm's backward: five float32 copies
    if not micro_batch.gemm_gradients:  # the gradient as autograd makes it, before it is copied to its slot
        matrix = 2 * h * shape.intermediate
        if down:
            extra.append(narrow + (wide if product else 0) + matrix)
        if GATE_UP & set(active):  # up's comes first; at gate's, the factors of the product are free
            gate_only = 0 if "up" in active else (1 if micro_batch.liger else 2) * wide
            extra.append(3 * narrow + matrix - gate_only - (wide if down else 0))  # two input gradients and the sum
    return extra


def _loss_moments(shape: DecoderShape, micro_batch: MicroBatch, kept: int, below: bool, head: bool) -> list[Peak]:
    """Moments of the final norm, the output head and the loss."""
    h, tokens, vocabulary = shape.hidden, micro_batch.tokens, shape.vocabulary
    narrow, logits = 2 * h * tokens, 2 * vocabulary * tokens
    weight = 2 * vocabulary * h if head else 0
    norm = (2 * h + 4 if micro_batch.liger else 4 * h + 4) * tokens if below else 0
    moments = []
    if below and not micro_batch.liger:
        moments.append(Peak(kept + norm, 0, 20 * h * tokens, "final norm"))
    if micro_batch.loss == "plain":
        saved = norm + (narrow if head else 0)
        moments.append(Peak(kept + saved, 6 * logits, 0, "loss"))  # log-softmax and two gradients in float32
        if not micro_batch.gemm_gradients:
            moments.append(Peak(kept + saved, logits + weight, narrow, "head"))
    elif micro_batch.loss == "chunked":
        tile = 2 * min(tokens, CHUNKED_TOKENS) * CHUNKED_VOCABULARY
        # a copy of the hidden states, their gradient in float32 and bfloat16; the head's likewise
        moments.append(Peak(kept + norm, narrow + tile + 3 * narrow + 3 * weight, 0, "loss"))
    else:
        rows = liger_rows(tokens, h, vocabulary)
        moments.append(Peak(kept + norm, 2 * rows * vocabulary + narrow + weight, narrow, "loss"))
    return moments


def liger_rows(tokens: int, hidden: int, vocabulary: int) -> int:
    """Tokens whose logits Liger's fused linear cross-entropy makes at a time (fused_linear_cross_entropy_forward)."""
    share = -(-tokens // -(-vocabulary // hidden))
    return min(1 << max(share - 1, 0).bit_length(), tokens)
