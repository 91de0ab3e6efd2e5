"""What MISA refuses, and why: checks of the model at construction and at every training forward.

All of them raise ValueError (what is wrong, what was found, what to do) before anything is changed.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from misa_engine.engine.shards import local
from misa_engine.method.config import MisaConfig
from misa_engine.method.partition import describe_new

logger = logging.getLogger(__name__)


def one_config(config: MisaConfig | None, options: Mapping[str, Any]) -> MisaConfig:
    """The config, or the one that single options make; TypeError or ValueError for anything else."""
    if config is not None and not isinstance(config, MisaConfig):
        raise TypeError(f"the second argument is a MisaConfig, options go by name (lr=...); got {config!r}")
    if config is not None and options:
        raise ValueError(f"give either config or single options, not both; got config and {', '.join(options)}")
    return config if config is not None else MisaConfig.from_dict(options)


def announce(model: nn.Module, new: Sequence[str], config: MisaConfig) -> None:
    """Say what the user should know before the first step."""
    announce_new(new)
    announce_compiled(model)
    announce_closing(config)


def announce_new(names: Sequence[str]) -> None:
    """Say, at level warning, which parameters are trained in every step because their checkpoint did not hold them."""
    if names:
        logger.warning("%s trained in every step. frozen=[...] leaves them out.", describe_new(names))


def announce_compiled(model: nn.Module) -> None:
    """Say, at level warning, what ``torch.compile(model)`` costs: one graph holds all layers, so no draw fits it twice.

    In a graph the layers' own ``forward`` runs (``gemm_gradients.py``), hence the second cost.
    """
    if any(isinstance(getattr(module, "_orig_mod", None), nn.Module) for module in model.modules()):
        logger.warning(
            "The model is compiled as a whole: each round of other active matrices is compiled anew, after %d of them "
            "(torch._dynamo.config.recompile_limit) torch runs it uncompiled, and weight gradients are copied into "
            "their slots instead of being computed there. Compile layer by layer: layer.compile(), after MISA(model).",
            torch._dynamo.config.recompile_limit,
        )


def announce_closing(config: MisaConfig) -> None:
    """Say, at level warning, when line 16 of Algorithm 1, as long as β₁/(1-β₁) steps, moves further than a round."""
    steps = round(config.betas[0] / (1.0 - config.betas[0]), 6)  # 9.000000000000002 at 0.9
    if config.closing_momentum and config.inner_steps < steps:
        logger.warning(
            "closing_momentum with inner_steps=%d: the step that closes a round is as long as %.0f of its steps. Use "
            "longer rounds, closing_momentum=False, or a learning rate that is smaller by as much.",
            config.inner_steps,
            steps,
        )


def check_model(model: nn.Module, resting: Collection[str] = ()) -> None:
    """Refuse models that the engine would train wrongly.

    Args:
        model: the model.
        resting: names of parameters that rest on the host (``misa_engine.engine.residents``).

    Raises:
        TypeError: it is no model.
        ValueError: the model is wrapped for data parallelism, frozen, without memory (meta device), spread
            over several devices, checkpoints with ``use_reentrant=True``, trains under another MISA, or holds weights
            that are not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"MISA takes the model itself, MISA(model, lr=...), because it has to know names and layers; got "
            f"{type(model).__name__}. Learning rates by parameter: parameter_groups=[{{'pattern': ..., 'lr': ...}}]."
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"the model is wrapped in {type(model).__name__}, which keeps the set of synchronised gradients that it "
            "saw first, so that ranks drift apart silently when the active matrices change. Pass the bare model "
            "(model.module): after torch.distributed.init_process_group, MISA averages the gradients itself, in one "
            "process for each GPU."
        )
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameters; pass the model itself, not a wrapper or a config.")
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no memory. Load the weights first (from_pretrained) and build "
                "the optimizer afterwards."
            )
    taken = [name for name, parameter in parameters.items() if _claimed.get(id(parameter)) is parameter]
    if taken:
        raise ValueError(
            f"{len(taken)} parameters already train under another MISA, {taken[0]} first. Call its remove() before "
            "building a new one; to keep its progress, pass its state_dict() on."
        )
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        raise ValueError(
            f"{len(frozen)} of {len(parameters)} parameters are already frozen (requires_grad=False), "
            f"{frozen[0]} first. MISA has to see them trainable to register its hooks and freezes them itself: build "
            "it before freezing (model.requires_grad_(True)), and name what must never train in frozen=(...)."
        )
    devices = {parameter.device for name, parameter in parameters.items() if name not in resting}
    if len(devices) > 1:
        raise ValueError(
            f"the model is spread over {', '.join(sorted(map(str, devices)))}; MISA needs it on one device. Load it "
            "without device_map, or with device_map={'': 0}."
        )
    stop_reentrant_checkpointing(model)
    check_finite(parameters)


#: id -> parameter, of everything that trains under a MISA which was not removed.
_claimed: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()


def claim(parameters: Iterable[nn.Parameter]) -> None:
    """Let no other MISA train these parameters, until ``release``."""
    for parameter in parameters:
        _claimed[id(parameter)] = parameter


def release(parameters: Iterable[nn.Parameter]) -> None:
    """Undo ``claim``."""
    for parameter in parameters:
        _claimed.pop(id(parameter), None)


@torch.no_grad()
def check_finite(parameters: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are NaN or infinite. One read of all weights and one wait for their device.

    Raises:
        ValueError: with the first such parameter's name.
    """
    floating = {name: local(parameter) for name, parameter in parameters.items() if parameter.is_floating_point()}
    sums = {name: parameter.sum(dtype=torch.float32) for name, parameter in floating.items()}
    suspects = []
    for device in {value.device for value in sums.values()}:
        there = {name: value for name, value in sums.items() if value.device == device}
        values = torch.stack(list(there.values())).tolist()
        suspects += [name for name, value in zip(there, values, strict=True) if not math.isfinite(value)]
    # in the model's order; a sum alone may overflow
    bad = [name for name in floating if name in suspects and not bool(floating[name].isfinite().all())]
    if bad:
        broken = int((~floating[bad[0]].isfinite()).sum())
        raise ValueError(
            f"{len(bad)} of {len(parameters)} parameters hold NaN or infinite weights: {bad[0]} has {broken}. The "
            "model is damaged or was not loaded whole; nothing can be trained from it."
        )


def check_sparse(model: nn.Module, trained: Collection[str]) -> None:
    """Refuse embeddings whose gradients are sparse, if they are to be trained.

    Raises:
        ValueError: with the module's name.
    """
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and f"{name}.weight" in trained:
            raise ValueError(
                f"{name} is an embedding with sparse=True, whose gradients are sparse; MISA takes dense ones. Set "
                f"model.get_submodule({name!r}).sparse = False, or leave it frozen."
            )


def common_dtype(parameters: Mapping[str, torch.Tensor]) -> torch.dtype:
    """Check all parameters that will be trained; returns their dtype.

    Raises:
        ValueError: as ``check_trainable``.
    """
    dtype: torch.dtype | None = None
    for name, parameter in parameters.items():
        dtype = check_trainable(name, parameter, dtype)
    assert dtype is not None
    return dtype


def check_trainable(name: str, parameter: torch.Tensor, expected: torch.dtype | None) -> torch.dtype:
    """Check one parameter that will be trained; returns its dtype.

    Raises:
        ValueError: the dtype is neither float32 nor bfloat16 or differs from ``expected``, or memory is not contiguous.
    """
    dtype = parameter.dtype
    if dtype == torch.float16:
        raise ValueError(
            f"{name} is float16, whose gradients underflow without loss scaling. Load the model in bfloat16 "
            "(dtype=torch.bfloat16): same memory, and MISA keeps an exact float32 master for it."
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name} is {dtype}; MISA trains float32 and bfloat16 weights. Load the model in bfloat16.")
    if expected is not None and dtype != expected:
        raise ValueError(
            f"{name} is {dtype} but other trained parameters are {expected}; MISA keeps one arena of one dtype. "
            f"Convert the model (model.to({expected})) or leave {name} frozen."
        )
    if not parameter.is_contiguous():
        raise ValueError(f"{name} is not contiguous in memory; replace it by its .contiguous() copy before training.")
    return dtype


def stop_reentrant_checkpointing(model: nn.Module) -> None:
    """Keep gradient checkpointing, but only in the form that lets the backward pass stop at the lowest active unit.

    transformers registers a hook that makes the embedding's output require gradients as soon as checkpointing is
    enabled; with it every frozen layer below the lowest active one is recomputed. The hook is removed here: with
    ``use_reentrant=False`` nothing needs it.

    Raises:
        ValueError: checkpointing with ``use_reentrant=True``.
    """
    for name, module in model.named_modules():
        if not getattr(module, "gradient_checkpointing", False):
            continue
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant", False):
            raise ValueError(
                f"{name or type(model).__name__} uses gradient checkpointing with use_reentrant=True, which fails or "
                "recomputes every frozen layer once inputs do not require gradients. Use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        break  # transformers sets one function for all modules
    disable = getattr(model, "disable_input_require_grads", None)
    if disable is not None and getattr(model, "_require_grads_hook", None) is not None:
        disable()


class CheckpointingGuard:
    """Runs ``stop_reentrant_checkpointing`` before a training forward whenever checkpointing was switched on anew."""

    def __init__(self, model: nn.Module):
        self._seen: object = None
        self._handle = model.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, model: nn.Module, args: object) -> None:
        # enabling checkpointing always leaves a fresh hook object on the model, so looking at it costs one getattr
        hook = getattr(model, "_require_grads_hook", None)
        if model.training and hook is not None and hook is not self._seen:
            self._seen = hook
            stop_reentrant_checkpointing(model)

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
