"""FAMILIES: how each model family names its layers, the matrices in them and the blocks they form.

Data, one row a family. To add one, add a row: a matrix is an ordered ``(pattern, kind)`` pair and a block an ordered
``Block``; the first match wins, patterns are shell style and match the path below a layer
(``self_attn.q_proj`` for ``model.layers.3.self_attn.q_proj.weight``). The names are those of transformers 5, where the
experts of a mixture are two 3-D tensors (``mlp.experts.gate_up_proj`` and ``mlp.experts.down_proj``).
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain

from misa_engine.method.config import check_choice


@dataclass(frozen=True)
class Block:
    """One half of a layer. Where a family has no such submodule (OPT's fc1 and fc2), ``name`` is a virtual prefix."""

    kind: str
    """What it is: attention or mlp (which includes a mixture's experts and router)."""
    name: str
    """Name below the layer, the end of the unit's name: ``mlp`` in ``model.layers.3.mlp``."""
    prefixes: tuple[str, ...]
    """Submodules of the layer that belong to the block."""


@dataclass(frozen=True)
class Family:
    """One row: everything that partition() needs to know about a family."""

    model_types: tuple[str, ...]
    """Values of ``model.config.model_type`` that are recognised as this family."""
    layers: str
    """Name of the list of layers, the last component before the layer's number."""
    matrices: tuple[tuple[str, str], ...]
    """(pattern of the path below the layer, kind), first match wins."""
    blocks: tuple[Block, ...]
    """Attention and MLP, first match wins."""

    def kind(self, path: str) -> str | None:
        """Kind of the matrix at ``path`` below a layer; None when the row does not name it."""
        return next((kind for pattern, kind in self.matrices if fnmatchcase(path, pattern)), None)

    def block(self, path: str) -> Block | None:
        """The block that ``path`` below a layer lies in; None outside the named blocks (a layer's own norms)."""
        return next((block for block in self.blocks if any(lies_below(path, p) for p in block.prefixes)), None)


def lies_below(path: str, prefix: str) -> bool:
    """Whether ``path`` is ``prefix`` or below it, by whole components: ``layers.10`` is not below ``layers.1``."""
    return path == prefix or path.startswith(f"{prefix}.")


_ATTENTION = (
    ("self_attn.q_proj", "q"),
    ("self_attn.k_proj", "k"),
    ("self_attn.v_proj", "v"),
    ("self_attn.o_proj", "o"),
)
_GATED = (("mlp.gate_proj", "gate"), ("mlp.up_proj", "up"), ("mlp.down_proj", "down"))
_LLAMA = (*_ATTENTION, *_GATED)
_FUSED = (
    ("self_attn.qkv_proj", "qkv"),
    ("self_attn.o_proj", "o"),
    ("mlp.gate_up_proj", "gate_up"),
    ("mlp.down_proj", "down"),
)
# A mixture's row includes _GATED because single layers may be dense (decoder_sparse_step, mlp_only_layers).
_EXPERTS = (
    *_LLAMA,
    ("mlp.gate", "router"),
    ("mlp.experts.gate_up_proj", "experts_gate_up"),
    ("mlp.experts.down_proj", "experts_down"),
)
_SHARED_EXPERT = (
    ("mlp.shared_expert.gate_proj", "shared_gate"),
    ("mlp.shared_expert.up_proj", "shared_up"),
    ("mlp.shared_expert.down_proj", "shared_down"),
    ("mlp.shared_expert_gate", "shared_router"),
)
# Conv1D stores (in, out) instead of (out, in): the same matrix to an elementwise optimizer.
_GPT2 = (("attn.c_attn", "qkv"), ("attn.c_proj", "o"), ("mlp.c_fc", "fc_in"), ("mlp.c_proj", "fc_out"))
_OPT = (*_ATTENTION[:3], ("self_attn.out_proj", "o"), ("fc1", "fc_in"), ("fc2", "fc_out"))
_NEOX = (
    ("attention.query_key_value", "qkv"),
    ("attention.dense", "o"),
    ("mlp.dense_h_to_4h", "fc_in"),
    ("mlp.dense_4h_to_h", "fc_out"),
)
_BERT = (
    ("attention.self.query", "q"),
    ("attention.self.key", "k"),
    ("attention.self.value", "v"),
    ("attention.output.dense", "o"),
    ("intermediate.dense", "fc_in"),
    ("output.dense", "fc_out"),
)
_DISTILBERT = (
    ("attention.q_lin", "q"),
    ("attention.k_lin", "k"),
    ("attention.v_lin", "v"),
    ("attention.out_lin", "o"),
    ("ffn.lin1", "fc_in"),
    ("ffn.lin2", "fc_out"),
)

_SELF_ATTN = Block("attention", "self_attn", ("self_attn",))
_ATTENTION_BLOCK = Block("attention", "attention", ("attention",))
_MLP = Block("mlp", "mlp", ("mlp",))
_DECODER = (_SELF_ATTN, _MLP)
_ENCODER = (_ATTENTION_BLOCK, Block("mlp", "mlp", ("intermediate", "output")))

FAMILIES: dict[str, Family] = {
    "llama": Family(("llama", "granite", "smollm3", "olmo"), "layers", _LLAMA, _DECODER),
    "mistral": Family(("mistral", "ministral3"), "layers", _LLAMA, _DECODER),
    "qwen2": Family(("qwen2",), "layers", _LLAMA, _DECODER),
    "qwen3": Family(("qwen3",), "layers", _LLAMA, _DECODER),
    "gemma2": Family(("gemma", "gemma2"), "layers", _LLAMA, _DECODER),
    "gemma3": Family(("gemma3_text", "gemma3"), "layers", _LLAMA, _DECODER),
    "olmo2": Family(("olmo2", "olmo3"), "layers", _LLAMA, _DECODER),
    "phi3": Family(("phi3",), "layers", _FUSED, _DECODER),
    "gpt2": Family(("gpt2", "gpt_bigcode"), "h", _GPT2, (Block("attention", "attn", ("attn",)), _MLP)),
    "opt": Family(("opt",), "layers", _OPT, (_SELF_ATTN, Block("mlp", "mlp", ("fc1", "fc2")))),
    "gpt_neox": Family(("gpt_neox",), "layers", _NEOX, (_ATTENTION_BLOCK, _MLP)),
    "mixtral": Family(("mixtral", "olmoe"), "layers", _EXPERTS, _DECODER),
    "qwen2_moe": Family(("qwen2_moe",), "layers", (*_EXPERTS, *_SHARED_EXPERT), _DECODER),
    "qwen3_moe": Family(("qwen3_moe",), "layers", _EXPERTS, _DECODER),
    "bert": Family(("bert", "electra"), "layer", _BERT, _ENCODER),
    "roberta": Family(("roberta", "xlm-roberta", "camembert"), "layer", _BERT, _ENCODER),
    "distilbert": Family(("distilbert",), "layer", _DISTILBERT, (_ATTENTION_BLOCK, Block("mlp", "ffn", ("ffn",)))),
}

#: What an unknown model is read with: every name that some family uses. partition() supplies the list of layers and
#: names what is left over by its path.
INFERRED = Family(
    model_types=(),
    layers="",
    matrices=tuple(dict.fromkeys(chain.from_iterable(row.matrices for row in FAMILIES.values()))),
    blocks=tuple(dict.fromkeys(chain.from_iterable(row.blocks for row in FAMILIES.values()))),
)

#: (pattern of the full path, kind) of what lies outside the layers, the same for all families; first match wins.
OUTSIDE: tuple[tuple[str, str], ...] = (
    ("*position_embeddings", "position"),
    ("*embed_positions", "position"),
    ("*wpe", "position"),
    ("*token_type_embeddings", "token_type"),
    ("*embed_tokens", "embedding"),
    ("*word_embeddings", "embedding"),
    ("*wte", "embedding"),
    ("*embed_in", "embedding"),
    ("*embed_out", "head"),
    ("*lm_head*", "head"),
    ("*cls.predictions*", "head"),
    ("*generator_*", "head"),
    ("*vocab_*", "head"),
    ("*classifier*", "head"),
    ("*qa_outputs", "head"),
    ("*score", "head"),
    ("*pooler*", "pooler"),
)


def outside_kind(path: str) -> str | None:
    """Kind of the parameter at the full ``path`` outside the layers; None when no row of OUTSIDE names it."""
    return next((kind for pattern, kind in OUTSIDE if fnmatchcase(path, pattern)), None)


def family_of(model_type: str | None) -> str | None:
    """Name of the row that lists ``model_type``; None for an unknown one."""
    return next((name for name, row in FAMILIES.items() if model_type in row.model_types), None)


def family_named(name: str) -> str:
    """Resolve what a user calls a family, a row's name or one of its model types, to the row's name.

    Raises:
        ValueError: no row has that name; all are listed and the closest is suggested.
    """
    model_types = chain.from_iterable(row.model_types for row in FAMILIES.values())
    check_choice("family", name, dict.fromkeys((*FAMILIES, *model_types)))
    return name if name in FAMILIES else str(family_of(name))
