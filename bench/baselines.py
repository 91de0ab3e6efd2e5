"""Every method that can train the same model, behind one interface: ``build(name, model, loss, settings) -> Method``.

Each is the real package where one exists. A method that cannot run here raises ``Unavailable`` with the line that its
row shows; the others still run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from misa_engine.bench import peers
from misa_engine.bench.measure import installed
from misa_engine.bench.method import Build, Loss, Method, Settings, Unavailable
from misa_engine.bench.unfused import misa_options, unfused_misa

# ---- our own ----


def _misa(name: str, **own: Any) -> Build:
    """MISA, or one of our rules that stands for another method: MisaConfig with ``own`` options."""

    def build_misa(model: nn.Module, loss: Loss, settings: Settings) -> Method:
        from misa_engine import MISA, MisaConfig

        try:
            config = MisaConfig.from_dict(misa_options(settings, max_grad_norm=settings.max_grad_norm, **own))
        except ValueError as error:
            raise Unavailable(f"unsupported: {error}") from error
        if config.update_in == "backward" and settings.accumulation > 1:
            raise Unavailable("unsupported: update_in='backward' updates at each micro-batch; use accumulation 1")
        optimizer = MISA(model, config)

        def account() -> dict[str, int]:
            return {key: value for key, value in optimizer.memory().items() if key != "weights"}

        return Method(
            name, model, loss, optimizer, settings, account,
            clips_inside=True, switches=lambda: optimizer.round,
        )  # fmt: skip

    return build_misa


def _outer_weights(model: nn.Module) -> tuple[str, ...]:
    """Names of the embeddings and the head."""
    outer = [getattr(model, f"get_{place}_embeddings")() for place in ("input", "output")]
    weights = {id(module.weight) for module in outer if module is not None}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in weights)


def _by_layers(name: str, layers: int, *, with_outer: bool = False, **own: Any) -> Build:
    """Our engine with whole layers as units and a budget of the ``layers`` largest, whatever the settings' delta."""

    def build_by_layers(model: nn.Module, loss: Loss, settings: Settings) -> Method:
        from misa_engine.method.partition import partition

        always = _outer_weights(model) if with_outer else ()
        parts = partition(model, "layer", always_train=always)
        largest = sum(sorted(unit.numel for unit in parts.units)[-layers:])
        delta = min(1.0, (largest + 1) / parts.total)
        options = {"granularity": "layer", "always_train": always, **own}
        return _misa(name, **options)(model, loss, replace(settings, delta=delta))

    return build_by_layers


# ---- registry ----


@dataclass(frozen=True)
class Baseline:
    """A row of BASELINES."""

    build: Build
    summary: str
    needs: tuple[tuple[str, str], ...] = ()
    """(module, what pip installs) of each package that it needs."""
    notes: str = ""
    """What a reader of its row must know."""
    opt_in: str = ""
    """Why it runs only when it is named; the status of its row otherwise."""

    def missing(self) -> str | None:
        """The status of a row whose packages are not here; None when all are."""
        absent = [package for module, package in self.needs if not installed(module)]
        licence = f" ({self.opt_in})" if self.opt_in else ""
        return f"missing: pip install {' '.join(absent)}{licence}" if absent else None


_ROUNDING_NOTE = "bf16 weights are rounded to nearest at each step"
_LOMO_NOTE = "clipping takes a second backward pass; no accumulation"

BASELINES: dict[str, Baseline] = {
    "misa": Baseline(_misa("misa"), "MISA, fp32 moments"),
    "misa-int8": Baseline(_misa("misa-int8", state_dtype="int8"), "MISA, 8-bit moments"),
    "misa-backward": Baseline(_misa("misa-backward", update_in="backward"), "MISA, update inside the backward pass"),
    "unfused-misa": Baseline(
        unfused_misa,
        "MISA as the published code works: fp32 clones, eager AdamW, norms read on the host",
        notes="same sampler as misa; scores are read after clipping, moments begin anew at each switch",
    ),
    "uniform": Baseline(_misa("uniform", rule="uniform"), "MISA's engine, uniform draws"),
    "lisa": Baseline(
        _by_layers("lisa", 2, with_outer=True, rule="uniform"), "LISA: two layers, embeddings and head (our engine)"
    ),
    "lisa-layers": Baseline(
        _by_layers("lisa-layers", 2, rule="uniform"), "LISA without embeddings and head: two layers (our engine)"
    ),
    "badam-like": Baseline(
        _by_layers("badam-like", 1, rule="cyclic", revisit="clear"),
        "BAdam's rule: one layer after the other, fresh moments (our engine)",
    ),
    "adamw": Baseline(
        peers.adamw, "AdamW, all parameters, torch fused, states in the weights' dtype", notes=_ROUNDING_NOTE
    ),
    "adamw-fp32": Baseline(
        peers.adamw_fp32,
        "AdamW, all parameters, torch fused, fp32 states and master weights",
        notes="on an fp32 model the same as adamw",
    ),
    "adamw8bit": Baseline(
        peers.packaged("adamw8bit", "bitsandbytes.optim", "AdamW8bit"),
        "AdamW, all parameters, 8-bit states (bitsandbytes)",
        (("bitsandbytes", "bitsandbytes"),),
        _ROUNDING_NOTE,
    ),
    "adamw8bit-ao": Baseline(
        peers.packaged("adamw8bit-ao", "torchao.optim", "AdamW8bit"),
        "AdamW, all parameters, 8-bit states (torchao)",
        (("torchao", "torchao"),),
        f"{_ROUNDING_NOTE}; compiled at its first step, on a CPU by a C++ compiler (a minute)",
    ),
    "flashadamw": Baseline(
        peers.packaged(
            "flashadamw", "flashoptim", "FlashAdamW", cuda_only="flashoptim's FlashAdamW has no other kernels"
        ),
        "FlashAdamW: 8-bit states, 24-bit master weights (flashoptim, CUDA)",
        (("flashoptim", "flashoptim"),),
    ),
    "kahan": Baseline(
        peers.packaged("kahan", "optimi", "AdamW", kahan_sum=True),
        "AdamW with Kahan summation, states in the weights' dtype (torch-optimi)",
        (("optimi", "torch-optimi"),),
        "the compensation is for bf16 weights; fp32 weights have none",
    ),
    "lora": Baseline(peers.adapters("lora"), "LoRA on all linear layers (peft), AdamW", (("peft", "peft"),)),
    "dora": Baseline(
        peers.adapters("dora", use_dora=True), "DoRA on all linear layers (peft), AdamW", (("peft", "peft"),)
    ),
    "galore": Baseline(
        peers.galore,
        "GaLore AdamW: gradients of the layers' matrices at a low rank (galore-torch)",
        (("galore_torch", "galore-torch"), ("bitsandbytes", "bitsandbytes")),
        "one SVD a matrix at the first and each 200th step, outside the timed steps of a short run",
    ),
    "apollo": Baseline(
        peers.apollo,
        "APOLLO-Mini: one learning rate a matrix from a rank-1 projection (apollo-torch)",
        (("apollo_torch", "apollo-torch"),),
        opt_in="opt-in: its licence is mostly CC-BY-NC, no commercial use; name it, --methods apollo",
    ),
    "badam": Baseline(peers.badam, "BAdam: one layer at a time, fp32 copies (badam)", (("badam", "badam"),)),
    "lomo": Baseline(
        peers.in_backward("lomo", "Lomo"),
        "LOMO: SGD inside the backward pass (lomo-optim)",
        (("lomo_optim", "lomo-optim"),),
        f"no moments, so the same learning rate means smaller steps than Adam's; {_LOMO_NOTE}",
    ),
    "adalomo": Baseline(
        peers.in_backward("adalomo", "AdaLomo"),
        "AdaLomo: factored second moment, inside the backward pass (lomo-optim, CUDA)",
        (("lomo_optim", "lomo-optim"),),
        f"the learning rate is relative to a weight's rms; {_LOMO_NOTE}",
    ),
}


def default_methods() -> list[str]:
    """All methods but those that must be named."""
    return [name for name, baseline in BASELINES.items() if not baseline.opt_in]


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
    status = BASELINES[name].missing()
    if status is not None:
        raise Unavailable(status)
    try:
        method = BASELINES[name].build(model, loss, settings)
    except ImportError as error:  # installed, for another torch, CUDA or platform
        raise Unavailable(f"cannot be imported: {error}") from error
    method.notes = BASELINES[name].notes
    return method
