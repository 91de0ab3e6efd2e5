"""Every method that can train the same model, behind one interface: ``build(name, model, loss, settings) -> Method``.

Each is the real package where one exists. A method that cannot run here raises ``Unavailable`` with the line that its
row shows; the others still run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from misa_engine.bench import peers
from misa_engine.bench.measure import installed
from misa_engine.bench.method import Loss, Method, Settings, Unavailable
from misa_engine.bench.unfused import misa_config, unfused_misa
from misa_engine.method.partition import partition

#: Categories of ``MISA.memory`` that are the model's weights, in full, in 8 bits or on the host.
FORMS_OF_WEIGHTS = (
    "weights", "resident_codes", "resident_steps", "resident_workspace", "host_masters", "host_embedding",
)  # fmt: skip


def _misa(model: nn.Module, loss: Loss, settings: Settings, **own: Any) -> Method:
    """MISA, or one of our rules that stands for another method: MisaConfig with ``own`` options."""
    from misa_engine import MISA
    from misa_engine.engine.residents import residents_of, rest

    if settings.residents is not None:
        own = {**own, "rest": "none"}
        if residents_of(model) is None:  # a model that fits; others are made with them (workload.build_resting)
            rest(model, settings.residents)
    config = misa_config(settings, max_grad_norm=settings.max_grad_norm, **own)
    if config.update_in == "backward" and settings.accumulation > 1:
        raise Unavailable("unsupported: update_in='backward' updates at each micro-batch; use accumulation 1")
    optimizer = MISA(model, config)

    def account() -> dict[str, int]:
        return {key: value for key, value in optimizer.memory().items() if key not in FORMS_OF_WEIGHTS}

    return Method(model, loss, optimizer, settings, account, clips_inside=True, switches=lambda: optimizer.round)


def _by_layers(
    model: nn.Module, loss: Loss, settings: Settings, *, layers: int, with_outer: bool = False, **own: Any
) -> Method:
    """Our engine with whole layers as units and a budget of the ``layers`` largest, whatever the settings' delta."""
    outer = [getattr(model, f"get_{place}_embeddings")() for place in ("input", "output")] if with_outer else []
    weights = {id(module.weight) for module in outer if module is not None}
    always = tuple(name for name, parameter in model.named_parameters() if id(parameter) in weights)
    parts = partition(model, "layer", always_train=always)
    largest = sum(sorted(unit.numel for unit in parts.units)[-layers:])
    settings = replace(settings, delta=min(1.0, (largest + 1) / parts.total))
    return _misa(model, loss, settings, granularity="layer", always_train=always, **own)


@dataclass(frozen=True)
class Baseline:
    """A row of BASELINES."""

    build: Callable[..., Method]
    """Called with model, loss, settings and ``options``."""
    options: Mapping[str, Any]
    summary: str
    needs: tuple[str, ...] = ()
    """Packages as pip names them."""
    notes: str = ""
    """What a reader of its row must know."""
    opt_in: str = field(default="", kw_only=True)
    """Why it runs only when it is named; the status of its row otherwise."""

    def missing(self) -> str | None:
        """The status of a row whose packages are not here; None when all are."""
        absent = [package for package in self.needs if not installed(package)]
        licence = f" ({self.opt_in})" if self.opt_in else ""
        return f"missing: pip install {' '.join(absent)}{licence}" if absent else None


_ROUNDED = "bf16 weights are rounded to nearest at each step"
_LOMO = "clipping takes a second backward pass; no accumulation"
_NO_CPU = "flashoptim's FlashAdamW has no other kernels"

BASELINES: dict[str, Baseline] = {
    # ours
    "misa": Baseline(_misa, {}, "MISA, fp32 moments"),
    "misa-int8": Baseline(_misa, {"state_dtype": "int8"}, "MISA, 8-bit moments"),
    "misa-none": Baseline(_misa, {"rest": "none"}, "MISA without a rest rule: what is not drawn stands still"),
    "misa-backward": Baseline(_misa, {"update_in": "backward"}, "MISA, update inside the backward pass"),
    "unfused-misa": Baseline(
        unfused_misa, {}, "MISA as the published code works: fp32 clones, eager AdamW, norms read on the host",
        (), "same sampler as misa-none; scores are read after clipping, moments begin anew at each switch",
    ),
    # other methods by our engine
    "uniform": Baseline(_misa, {"rule": "uniform", "rest": "none"}, "MISA's engine, uniform draws"),
    "lisa": Baseline(
        _by_layers, {"layers": 2, "with_outer": True, "rule": "uniform", "rest": "none"},
        "LISA: two layers, embeddings and head (our engine)",
    ),
    "lisa-layers": Baseline(
        _by_layers, {"layers": 2, "rule": "uniform", "rest": "none"},
        "LISA without embeddings and head: two layers (our engine)",
    ),
    "badam-like": Baseline(
        _by_layers, {"layers": 1, "rule": "cyclic", "revisit": "clear", "rest": "none"},
        "BAdam's rule: one layer after the other, fresh moments (our engine)",
    ),
    # all parameters
    "adamw": Baseline(
        peers.packaged, {"optimizer": "torch.optim.AdamW", "fused": True},
        "AdamW, all parameters, torch fused, states in the weights' dtype", (), _ROUNDED,
    ),
    "adamw-fp32": Baseline(
        peers.adamw_fp32, {}, "AdamW, all parameters, torch fused, fp32 states and master weights",
        (), "on an fp32 model the same as adamw",
    ),
    "adamw8bit": Baseline(
        peers.packaged, {"optimizer": "bitsandbytes.optim.AdamW8bit"},
        "AdamW, all parameters, 8-bit states (bitsandbytes)", ("bitsandbytes",), _ROUNDED,
    ),
    "adamw8bit-ao": Baseline(
        peers.packaged, {"optimizer": "torchao.optim.AdamW8bit"}, "AdamW, all parameters, 8-bit states (torchao)",
        ("torchao",), f"{_ROUNDED}; compiled at its first step, on a CPU by a C++ compiler (a minute)",
    ),
    "flashadamw": Baseline(
        peers.packaged, {"optimizer": "flashoptim.FlashAdamW", "cuda_only": _NO_CPU},
        "FlashAdamW: 8-bit states, 24-bit master weights (flashoptim, CUDA)", ("flashoptim",),
    ),
    "kahan": Baseline(
        peers.packaged, {"optimizer": "optimi.AdamW", "kahan_sum": True},
        "AdamW with Kahan summation, states in the weights' dtype (torch-optimi)",
        ("torch-optimi",), "the compensation is for bf16 weights; fp32 weights have none",
    ),
    # low ranks
    "lora": Baseline(peers.adapters, {}, "LoRA on all linear layers (peft), AdamW", ("peft",)),
    "rslora": Baseline(
        peers.adapters, {"use_rslora": True, "lora_alpha": 16},
        "rsLoRA on all linear layers (peft; scaled by 16/√r), AdamW", ("peft",),
    ),
    "dora": Baseline(peers.adapters, {"use_dora": True}, "DoRA on all linear layers (peft), AdamW", ("peft",)),
    "galore": Baseline(
        peers.packaged,
        {"optimizer": "galore_torch.GaLoreAdamW", "groups": peers.galore_groups, "no_deprecation_warning": True},
        "GaLore AdamW: gradients of the layers' matrices at a low rank (galore-torch)",
        ("galore-torch", "bitsandbytes"),
        "one SVD a matrix at the first and each 200th step, outside the timed steps of a short run",
    ),
    "apollo": Baseline(
        peers.packaged, {"optimizer": "apollo_torch.APOLLOAdamW", "groups": peers.apollo_groups},
        "APOLLO-Mini: one learning rate a matrix from a rank-1 projection (apollo-torch)", ("apollo-torch",),
        opt_in="opt-in: its licence is mostly CC-BY-NC, no commercial use; name it, --methods apollo",
    ),
    # blocks of layers, update inside the backward pass
    "badam": Baseline(peers.badam, {}, "BAdam: one layer at a time, fp32 copies (badam)", ("badam",)),
    "lomo": Baseline(
        peers.in_backward, {"kind": "Lomo"}, "LOMO: SGD inside the backward pass (lomo-optim)", ("lomo-optim",),
        f"no moments, so the same learning rate means smaller steps than Adam's; {_LOMO}",
    ),
    "adalomo": Baseline(
        peers.in_backward, {"kind": "AdaLomo"},
        "AdaLomo: factored second moment, inside the backward pass (lomo-optim, CUDA)",
        ("lomo-optim",), f"the learning rate is relative to a weight's rms; {_LOMO}",
    ),
}  # fmt: skip

#: Methods that our engine trains, so that options of MisaConfig can be given to them.
OURS = tuple(name for name, baseline in BASELINES.items() if baseline.build in (_misa, _by_layers))


def build(name: str, model: nn.Module, loss: Loss, settings: Settings) -> Method:
    """Make ``name`` train ``model``.

    Args:
        name: a key of BASELINES.
        model: all parameters trainable, on the final device.
        loss: token ids (batch, length) -> mean loss of ``model``.
        settings: shared by all methods.

    Raises:
        Unavailable: a package is missing or broken, or the combination is not supported; the message is a row's status.
        ValueError: the name is unknown.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown method {name!r}: choose among {', '.join(BASELINES)}")
    baseline = BASELINES[name]
    if status := baseline.missing():
        raise Unavailable(status)
    try:
        method = baseline.build(model, loss, settings, **baseline.options)
    except ImportError as error:  # installed, for another torch, CUDA or platform
        raise Unavailable(f"cannot be imported: {error}") from error
    method.name = name
    return method
