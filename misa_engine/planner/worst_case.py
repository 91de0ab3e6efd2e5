"""The draw that needs the most memory, and what it needs.

Backward must reach the lowest layer, so that every layer is recorded, and the rest of the budget must lie where it
keeps the most activations. Most rounds need less: below the lowest active unit nothing is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import nn

from misa_engine.engine.residents import linear_modules
from misa_engine.engine.rest import can_rest, resting_while
from misa_engine.errors import UserError
from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import Partition, Unit, check_budget, partition_for
from misa_engine.planner import activations
from misa_engine.planner.activations import DecoderShape, MicroBatch, Peak

#: Norm modules of the families that ``memory`` describes, beyond the matrices that the partition names.
_NORMS = {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}
#: In a model_type: scans over tokens, which on fake tensors run token by token, for minutes.
RECURRENT = ("mamba", "jamba", "bamba", "rwkv", "xlstm", "recurrent_gemma", "zamba")

#: Share by which three points may miss a straight line. Mixtral and Qwen3-MoE miss by 0; short sequences bend little:
#: Gemma 2's eager attention by 0.03% up to 1,024 tokens, a sliding window's mask in a small Mixtral by 5%.
STRAIGHT = 1e-5


@dataclass
class MetaModel:
    """A model that is planned for: names and shapes, no weights."""

    config: Any
    """Its transformers configuration."""
    dtype: torch.dtype = torch.bfloat16
    name: str = ""
    model: nn.Module = field(init=False)
    shape: DecoderShape | None = field(init=False)

    def __post_init__(self) -> None:
        """Build the model on the meta device."""
        self.model = _on_meta(self.config, self.dtype)
        self.name = self.name or getattr(self.config, "_name_or_path", "") or self.config.model_type
        self.shape = DecoderShape.of(self.model.config) if self.dtype == torch.bfloat16 else None
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._partitions: dict[tuple[Any, ...], Partition] = {}
        self._passes: dict[tuple[Any, ...], Peak] = {}
        kinds = self.partition(MisaConfig(granularity="module", include_outside=True)).units
        self._kinds = {unit.name: unit.kind for unit in kinds}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    @cached_property
    def resident_matrices(self) -> tuple[str, ...]:
        """Names of the matrices that can rest in 8 bits, in the model's order; none without repeated layers."""
        try:
            return tuple(linear_modules(self.model)[0])
        except ValueError:
            return ()

    def partition(self, misa: MisaConfig) -> Partition:
        """The partition under MISA's options."""
        key = (misa.granularity, misa.always_train, misa.frozen, misa.include_outside, misa.family)
        if key not in self._partitions:
            self._partitions[key] = partition_for(self.model, misa)
        return self._partitions[key]

    def measured(self, depth: int, names: set[str], rests: set[str], micro_batch: MicroBatch) -> Peak:
        """A pass on fake tensors of the model with its lowest ``depth`` layers; each is run once.

        A plan asks for the same pass again for the room on the card and for each δ and each precision of moments: a
        pass takes half a second, and depends only on what trains in those layers.
        """
        kept, resting = (frozenset(name for name in group if _is_below(name, depth)) for group in (names, rests))
        key = (depth, kept, resting, micro_batch)
        if key not in self._passes:
            config = self.config if depth == self.config.num_hidden_layers else _shallow(self.config, depth)
            self._passes[key] = _measure(config, self.dtype, set(kept), set(resting), micro_batch)
        return self._passes[key]

    def places(self, names: Iterable[str]) -> tuple[dict[int, set[str]], bool, bool]:
        """Kinds that train by layer, whether the embedding trains, whether the output head does."""
        model: Any = self.model
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        embedding, head = (self._name_of(module) for module in ends)
        layers: dict[int, set[str]] = {}
        named = set(names)
        for name in named - {embedding, head}:
            words = name.split(".")
            numbers = [int(word) for word in words if word.isdigit()]
            kind = self._kinds.get(name) or _NORMS.get(words[-2])
            if numbers and kind and words[-1] == "weight":
                layers.setdefault(numbers[0], set()).add(kind)
        return layers, embedding in named, head in named

    def _name_of(self, module: nn.Module | None) -> str | None:
        return self._names.get(id(getattr(module, "weight", None)))


def check_decoder(config: Any) -> None:
    """Refuse BERT-like encoders.

    Many of them also have a class for causal language models (``BertLMHeadModel``), which loads and runs, but with
    attention in both directions: every token would see the one that it is to predict.

    Raises:
        UserError: the configuration is an encoder's, and none that was made a decoder (``is_decoder``).
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    kind = config.model_type
    # XLM's name for is_decoder is causal
    made_causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if kind in ENCODERS and not made_causal and not getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model type {kind!r} is an encoder (masked language model or classifier), no causal language model, which "
            "is what misa plans for and misa train trains. Train it in a script of your own with MISA or MisaTrainer."
        )


def _on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal language model of a configuration, without weights.

    Raises:
        UserError: there is none, or its memory cannot be measured without a GPU.
    """
    from transformers import AutoModelForCausalLM

    check_decoder(config)
    kind = config.model_type
    known = type(config) in AutoModelForCausalLM._model_mapping or hasattr(config, "auto_map")
    if not known or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"model type {kind!r} is no causal language model (a decoder that predicts the next token), which is what "
            "misa plans for and misa train trains."
        )
    if any(word in kind for word in RECURRENT):
        raise UserError(
            f"model type {kind!r} is recurrent: its memory depends on kernels that run on a GPU only, so there is no "
            "plan for it. Train without --max_vram_gb; a short run prints its peak."
        )
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


# ---- the worst draw ----


def draws(meta: MetaModel, misa: MisaConfig, micro_batch: MicroBatch) -> Iterator[tuple[str, ...]]:
    """Candidates for the draw that needs the most memory, as parameter names, always trained ones included.

    Not all draws, of which an 8B model has 10^20, but the budget filled in seven orders: by the activations that a unit
    keeps for each of its parameters, or altogether, in either case also with the top layer first; whole embeddings
    first; the smallest first. Backward must reach the bottom: each order begins with the smallest unit of the lowest
    layer, and is also tried without it where an embedding trains anyway.
    """
    parts = meta.partition(misa)
    budget = check_budget(parts, misa.delta)
    layered = [unit for unit in parts.units if unit.layer is not None]
    outside = [unit for unit in parts.units if unit.layer is None]
    if not layered:
        yield tuple(name for unit in _fill(outside, budget) for name in unit.params) + parts.always
        return
    bottom = min(layered, key=lambda unit: (unit.layer, unit.numel))
    top = max(unit.layer for unit in layered if unit.layer is not None)
    gain = _gains(meta, micro_batch, layered)
    by_ratio = sorted(layered, key=lambda unit: -gain[unit.name] / unit.numel)
    by_gain = sorted(layered, key=lambda unit: -gain[unit.name])
    at_top, gain_at_top = (sorted(order, key=lambda unit: unit.layer != top) for order in (by_ratio, by_gain))
    # in a layer that is computed again, down's input is free by the time the most is alive: the others come first
    before_down = sorted(at_top, key=lambda unit: (unit.layer != top, unit.kind == "down"))
    smallest = sorted(layered, key=lambda unit: unit.numel)
    # what stands in front of the orders: the bottom, nothing where an embedding trains always, or an embedding
    fronts = [[bottom], [*outside], *([unit] for unit in outside)]
    if any(meta.places(parts.always)[1:]):
        fronts.append([])
    for front, order in product(
        fronts, (by_ratio, by_gain, at_top, gain_at_top, before_down, [*outside, *by_ratio], smallest)
    ):
        chosen = _fill([*front, *order], budget)
        yield tuple(name for unit in chosen for name in unit.params) + parts.always


def _fill(order: Iterable[Unit], budget: int) -> list[Unit]:
    chosen: dict[str, Unit] = {}
    for unit in order:
        if unit.name not in chosen and unit.numel <= budget:
            chosen[unit.name] = unit
            budget -= unit.numel
    return list(chosen.values())


def _gains(meta: MetaModel, micro_batch: MicroBatch, units: Iterable[Unit]) -> dict[str, int]:
    """Bytes a token that the training of each unit keeps beyond a frozen layer's.

    What several matrices of a layer share (q, k and v their input) counts for the smallest of them, since a draw that
    needs the most spends its budget on no second one.
    """
    shape = meta.shape
    if shape is None:
        return {unit.name: unit.numel for unit in units}
    one = replace(micro_batch, batch=1, length=1, padded=False)
    flow = activations.Flow.of((), 1, recorded=True, input=True)
    training: dict[int, set[str]] = {}
    gains = {}
    for unit in sorted(units, key=lambda unit: unit.numel):
        gains[unit.name] = 0
        for layer, kinds in meta.places(unit.params)[0].items():
            before = training.setdefault(layer, set())
            after = before | kinds
            gains[unit.name] += activations.saved_by_layer(shape, one, after, flow) - activations.saved_by_layer(
                shape, one, before, flow
            )
            training[layer] = after
    return gains


class WorstCase:
    """The largest peak over ``draws``, for any size of micro-batch.

    Args:
        meta: the model.
        misa: budget and partition.
        micro_batch: checkpointing, loss and kernels; batch and length may be others later.
    """

    def __init__(self, meta: MetaModel, misa: MisaConfig, micro_batch: MicroBatch):
        self._meta = meta
        found = dict.fromkeys(draws(meta, misa, micro_batch))  # several orders often lead to the same draw
        self.can_rest = can_rest(meta.model, meta.partition(misa), misa)
        position = {name: place for place, (name, _) in enumerate(meta.model.named_parameters())}
        self._rests = {names: resting_while(names, self.can_rest, position, misa) for names in found}
        self._draws = [(names, *meta.places((*names, *self._rests[names]))) for names in found]
        self._rest = misa.rest != "none"
        self._rest_outside = misa.rest_outside

    def resting(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """What rests while one of the draws looked at trains."""
        return self._rests[names]

    @property
    def positions(self) -> int | None:
        """Longest sequence that the model takes, where its configuration says so."""
        return getattr(self._meta.config, "max_position_embeddings", None)

    @property
    def exact(self) -> bool:
        """Whether peaks come from formulas and cost microseconds."""
        return self._meta.shape is not None

    def grows_with_tokens(self, micro_batch: MicroBatch, lengths: tuple[int, ...]) -> bool:
        """Whether a family without formulas needs as much for each token, whatever the length of its sequence.

        Masks and eager attention need the length's square, which bends the line through three lengths; where it is
        straight, only the number of tokens matters. The shallowest model shows it, since all its kinds of layers occur.
        """
        if getattr(self._meta.model.config, "_attn_implementation", None) == "eager":
            return False
        names = self._largest_draw()
        trained, rests = set(names), set(self._rests[names])
        depth = min(_period(self._meta.config), self._meta.config.num_hidden_layers)
        passes = (self._meta.measured(depth, trained, rests, replace(micro_batch, length=length)) for length in lengths)
        totals = [found.total for found in passes]
        (a, b, c), (ya, yb, yc) = lengths, totals
        return abs(ya + (yc - ya) * (b - a) / (c - a) - yb) < STRAIGHT * yb

    def _largest_draw(self) -> tuple[str, ...]:
        return max((names for names, *_ in self._draws), key=len)

    def peak(self, micro_batch: MicroBatch) -> tuple[Peak, tuple[str, ...]]:
        """The peak, and the active parameters that cause it."""
        shape = self._meta.shape
        if shape is None:
            names = self._largest_draw()
            return _measured_peak(self._meta, set(names), set(self._rests[names]), micro_batch), names
        rest = {"rest": self._rest, "rest_outside": self._rest_outside}
        peaks = [
            (activations.peak(shape, micro_batch, layers, embedding=embedding, head=head, **rest), names)
            for names, layers, embedding, head in self._draws
        ]
        return max(peaks, key=lambda entry: entry[0].total)


# ---- families without formulas ----


def _is_below(name: str, depth: int) -> bool:
    """Whether a parameter is in one of the lowest layers, or in none."""
    numbers = [int(word) for word in name.split(".") if word.isdigit()]
    return not numbers or numbers[0] < depth


def _measured_peak(meta: MetaModel, names: set[str], rests: set[str], micro_batch: MicroBatch) -> Peak:
    """Run two shallow models of the same configuration on fake tensors and go on in a straight line to the full depth.

    Layers of one kind cost the same, so the line is exact up to where the peak lies.
    """
    full = meta.config.num_hidden_layers
    period = _period(meta.config)
    if full <= 2 * period:
        return meta.measured(full, names, rests, micro_batch)
    small, large = (meta.measured(depth, names, rests, micro_batch) for depth in (period, 2 * period))
    steps = (full - period) / period

    def at_full_depth(a: int, b: int) -> int:
        return round(a + (b - a) * steps)

    return Peak(
        at_full_depth(small.activations, large.activations),
        0,
        at_full_depth(small.temporaries, large.temporaries),
        large.moment,
    )


def _measure(config: Any, dtype: torch.dtype, names: set[str], rests: set[str], micro_batch: MicroBatch) -> Peak:
    from misa_engine.planner.probe import measure

    try:
        measured = measure(
            config,
            names,
            resting=rests,
            batch=micro_batch.batch,
            length=micro_batch.length,
            checkpointing=micro_batch.checkpointing,
            loss=micro_batch.loss,
            liger=micro_batch.liger,
            gemm_gradients=micro_batch.gemm_gradients,
            padded=micro_batch.padded,
            dtype=dtype,
        )
    except Exception as error:
        raise UserError(
            f"the memory of model type {config.model_type!r} with loss {micro_batch.loss!r} cannot be measured without "
            f"a GPU ({type(error).__name__}: {error}). Try --loss plain."
        ) from error
    return Peak(measured.saved, 0, max(0, measured.peak - measured.saved), measured.at)


def _period(config: Any) -> int:
    """Layers after which the kinds of layers (sliding or full attention) repeat; at least 2, so that one lies above."""
    kinds = getattr(config, "layer_types", None) or []
    for period in range(1, len(kinds)):
        if all(kinds[k] == kinds[k % period] for k in range(len(kinds))):
            return max(2, period)
    return 2


def _shallow(config: Any, layers: int) -> Any:
    fields = {**config.to_dict(), "num_hidden_layers": layers}
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:layers]
    shallow = type(config).from_dict(fields)
    shallow._attn_implementation = getattr(config, "_attn_implementation", None)
    return shallow
