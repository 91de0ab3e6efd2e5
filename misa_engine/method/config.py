"""MisaConfig: every option of the engine, validated once, before anything is allocated.

Three presets bundle the options in which the paper, the published code and this engine differ. A preset fills in
what the user did not give; an option given explicitly wins.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from misa_engine.method.rules import RULES


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The options in which the paper, the published code and this engine differ. Defaults are the engine's."""

    score: str = "mean_square"
    """What is measured: mean_square (‖g‖²/n_u, mean over the round) or squared_mean_norm (mean of ‖g‖, unscaled)."""
    score_normalisation: str = "relative"
    """relative divides G_u by the mean of G, so that η means the same for every model; none does not."""
    ema: str = "corrected_on_read"
    """corrected_on_read (true bias correction), plain (Eq. 4), or official (corrected value fed back)."""
    exponent_cap: float = math.inf
    """Upper bound of the exponent η·G_u (official: of η·G_u²)."""
    probability_floor: float = 0.5
    """Share of P that is uniform: no unit's probability falls below this share of 1/B, nor P's normalised entropy
    below this. 0 lets P follow the scores alone (Eq. 5), 1 is uniform."""
    cold_start: str = "probe"
    """probe: one-step rounds until every unit was seen once; official: the same, divided by T; none."""
    cold_start_share: float = 0.1
    """Most of the run (see ``run_steps``) that the cold start's one-step rounds may take; what was not seen by then
    counts as average. 1 is no limit."""
    revisit: str = "keep_adjacent"
    """Moments of a unit: keep_adjacent (while it stays active), clear (every round), keep or offload (for ever, on the
    host: keep as they are, offload in 8 bits)."""
    bias_correction: bool = True
    """Adam's bias correction, counted from the unit's fresh moments."""
    closing_momentum: bool = False
    """Line 16 of Algorithm 1: one more step along the first moment when a round ends."""
    sample_last: int = 0
    """This many least recently used units are forced into each draw."""
    leave_rounding: str = "stochastic"
    """The extra 16 master bits of a unit that leaves: rounded away (stochastic or nearest), or keep (2 bytes a weight
    on the host: an exact float32 master over the whole run)."""
    fill: str = "carry"
    """What happens when a drawn unit does not fit: carry (it opens the next round), stop, or skip (draw on)."""
    rest: str = "row_norm"
    """How matrices outside the draw move, without state, as their gradients appear in backward: not at all (none), by
    sign, row_norm (each output unit's gradient divided by its rms), sinkhorn (rows and columns in turn), or sgd."""
    rest_lr: float | None = None
    """Their learning rate as a multiple of lr; None is the rule's own (see ``REST_RATES``)."""
    rest_scope: str = "all"
    """Which of them: all, or those above the lowest trained matrix, to which the backward pass goes anyway."""
    rest_every: int = 1
    """k: they move at every k-th step, k times as far."""
    rest_outside: bool = False
    """Embeddings and head, which otherwise stay frozen, move by the rest rule too."""
    rest_scores: bool = False
    """Their gradients enter the scores: every unit is measured in every round, and none needs a cold start."""


#: Rules for the matrices outside the draw -> their learning rate as a multiple of lr, where ``rest_lr`` is None.
REST_RATES = {"sign": 0.3, "row_norm": 0.3, "sinkhorn": 0.3, "sgd": 5.0}
#: What the options of the rest rule are without one.
NO_REST: dict[str, Any] = {
    "rest_lr": None,
    "rest_scope": "all",
    "rest_every": 1,
    "rest_outside": False,
    "rest_scores": False,
}

#: Names of the options that a preset fills in.
PRESET_OPTIONS = tuple(entry.name for entry in fields(Preset))

#: Sources: arXiv 2511.00056, Algorithm 1 ("paper"); github.com/pkumelon/MISA ("official").
PRESETS: dict[str, Preset] = {
    "engine": Preset(),
    "paper": Preset(
        score_normalisation="none",
        ema="plain",
        probability_floor=0.0,
        cold_start="none",
        revisit="clear",
        bias_correction=False,
        closing_momentum=True,
        leave_rounding="nearest",
        fill="stop",
        rest="none",
    ),
    "official": Preset(
        score="squared_mean_norm",
        score_normalisation="none",
        ema="official",
        exponent_cap=5.0,
        probability_floor=0.0,
        cold_start="official",
        cold_start_share=1.0,
        revisit="keep",
        sample_last=2,
        leave_rounding="nearest",
        fill="skip",
        rest="none",
    ),
}

#: Permitted values of the options that name an alternative.
CHOICES: dict[str, tuple[str, ...]] = {
    "preset": tuple(PRESETS),
    "rule": tuple(RULES),
    "granularity": ("module", "block", "layer"),
    "score": ("mean_square", "squared_mean_norm"),
    "score_normalisation": ("relative", "none"),
    "ema": ("corrected_on_read", "plain", "official"),
    "cold_start": ("probe", "none", "official"),
    "revisit": ("keep_adjacent", "clear", "keep", "offload"),
    "leave_rounding": ("stochastic", "nearest", "keep"),
    "fill": ("carry", "stop", "skip"),
    "rest": ("none", *REST_RATES),
    "rest_scope": ("all", "above"),
    "master": ("split", "none"),
    "state_dtype": ("float32", "int8"),
    "grad_dtype": ("weight", "float32"),
    "update_in": ("step", "backward"),
    "backend": ("auto", "reference", "triton"),
}

#: Options that may change between saving and loading: the learning rate and its companions travel in the parameter
#: groups, as for every torch optimizer, and the rest does not touch the trajectory's meaning.
FREE_ON_LOAD = (
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "max_grad_norm",
    "backend",
    "parameter_groups",
    "grad_dtype",
    "gemm_gradients",
    "update_in",
    "shard_state",
    "rest_lr",
    "run_steps",
    "cold_start_share",
)

#: Options of former versions and the only value that they may still have, in the state of an older run for instance.
RETIRED: dict[str, Any] = {"skip_nonfinite": True, "stale_after": 0}
#: Options that the state of an older run does not name, and what it ran with.
YOUNGER: dict[str, Any] = {"rest": "none", **NO_REST, "probability_floor": 0.0}


def check_choice(option: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError, naming the closest permitted value, unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"unknown {option} {value!r}: choose one of {', '.join(choices)}.{hint}")


@dataclass(frozen=True, kw_only=True)
class MisaConfig(Preset):
    """All options of MISA, by keyword. Immutable; invalid values raise ValueError at construction.

    The options of ``Preset`` come from the preset of that name where they are not given (or given as None).
    """

    lr: float = 1e-5
    """Learning rate α. The parameter groups carry it afterwards, so any scheduler can move it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's first and second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled decay of active matrices. Norms, biases and embeddings are never decayed."""
    delta: float = 0.03
    """Budget δ: the active units together hold at most ``floor(delta * N)`` of the model's N parameters."""
    inner_steps: int = 50
    """T: optimizer steps between two draws."""
    run_steps: int | None = None
    """Optimizer steps of the whole run, for ``cold_start_share``; None is unknown. The Trainer fills it in."""
    eta: float = 1.0
    """η in P_u ∝ exp(η·G_u); 0 is uniform, larger is greedier. Scale depends on ``score_normalisation``."""
    score_beta: float = 0.8
    """β of the score's exponential moving average (Eq. 4)."""
    preset: str = "engine"
    """Which bundle fills the options left at None: engine, paper or official."""
    rule: str = "importance"
    """How units are drawn; the names of ``misa_engine.method.sampling.RULES``."""
    granularity: str = "module"
    """What a unit is: one weight matrix, one attention or MLP block, or one whole layer."""
    always_train: tuple[str, ...] = ()
    """Patterns (shell style, matched against full parameter names) of parameters trained in every step, outside δ."""
    frozen: tuple[str, ...] = ()
    """Patterns of parameters that are never trained although they lie inside the layers."""
    include_outside: bool = False
    """Also make units of the matrices outside the layers (embeddings, head), as pre-training needs."""
    family: str | None = None
    """Name of a row of ``misa_engine.method.families.FAMILIES``; None recognises the family from the model."""
    parameter_groups: tuple[Mapping[str, Any], ...] = ()
    """Overrides by pattern: ``{"pattern": "*.mlp.*", "lr": 1e-5, "weight_decay": 0.1}``; first match wins."""
    static_weights: Mapping[str, float] = field(default_factory=dict)
    """Pattern -> positive relative weight, for ``rule="static"``; unmatched units weigh 1."""
    epsilon: float = 0.1
    """Share of uniform draws of ``rule="epsilon_greedy"``."""
    max_grad_norm: float | None = None
    """Clip the global gradient norm inside the update; None leaves clipping to the caller."""
    master: str = "split"
    """bf16 models: "split" keeps 16 more bits per active weight (an exact fp32 master); "none" rounds at each step."""
    state_dtype: str = "float32"
    """Dtype of the moments: float32, or int8 (8-bit codes with a scale each 64): 2.1 instead of 8 bytes a weight."""
    grad_dtype: str = "weight"
    """Dtype of the gradient slots: that of the weights, or float32 (2 bytes more, micro-batches add up exactly)."""
    gemm_gradients: bool = True
    """Let the GEMM of an active linear layer write its weight gradient into its slot: no temporary, no copy."""
    update_in: str = "step"
    """When weights are updated: in "step", or in "backward" as each gradient arrives (no slots, no clipping)."""
    shard_state: bool = False
    """Several processes with a whole model each: every one keeps moments and master bits of its part of each matrix
    (ZeRO-1), and they send each other the updated weights. Same results; does nothing in one process."""
    backend: str = "auto"
    """"triton" on a GPU and "reference" (plain PyTorch) elsewhere, or either by force."""
    seed: int = 0
    """Seed of the optimizer's own generator; the global generators are never touched."""

    def __new__(cls, **options: Any) -> MisaConfig:
        """Remember which options were given, which a dataclass does not."""
        config = super().__new__(cls)
        given = (name for name, value in options.items() if value is not None or name not in PRESET_OPTIONS)
        object.__setattr__(config, "_given", frozenset(given))
        return config

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that the caller named, whether or not with their default. Not part of equality.

        A copy made by ``dataclasses.replace`` was given all of them.
        """
        given: frozenset[str] = self.__dict__["_given"]
        return given

    def __post_init__(self) -> None:
        """Fill in the preset's values, normalise containers, check every range."""
        check_choice("preset", self.preset, PRESETS)
        for option in PRESET_OPTIONS:
            if option not in self.given:
                object.__setattr__(self, option, getattr(PRESETS[self.preset], option))
        if self.rest == "none":  # a preset's companions of a rest rule that the user has switched off
            for option in NO_REST.keys() - self.given:
                object.__setattr__(self, option, NO_REST[option])
        for option in ("always_train", "frozen"):
            value = getattr(self, option)
            object.__setattr__(self, option, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "parameter_groups", tuple(dict(group) for group in self.parameter_groups))
        for option, choices in CHOICES.items():
            check_choice(option, getattr(self, option), choices)
        self._check_ranges()
        for group in self.parameter_groups:
            unknown = set(group) - {"pattern", "lr", "weight_decay", "betas", "eps"}
            if "pattern" not in group or unknown:
                raise ValueError(
                    f"parameter_groups needs 'pattern' and any of lr, weight_decay, betas, eps in each entry; "
                    f"got {dict(group)!r}"
                )

    def _check_ranges(self) -> None:
        if not 0 < self.delta <= 1:
            raise ValueError(
                f"delta is the share of the model that trains at a time and must lie in (0, 1]; got {self.delta}. "
                "0.03 is the published setting for 7-8B models."
            )
        if not isinstance(self.inner_steps, int) or self.inner_steps < 1:
            raise ValueError(
                f"inner_steps (T) is the number of optimizer steps between two draws, an integer of at least 1; "
                f"got {self.inner_steps!r}. 50 is the published setting."
            )
        if self.run_steps is not None and (not isinstance(self.run_steps, int) or self.run_steps < 1):
            raise ValueError(
                f"run_steps is the number of optimizer steps of the whole run, an integer of at least 1, or None where "
                f"that is unknown; got {self.run_steps!r}"
            )
        ranges: tuple[tuple[str, float, bool, str], ...] = (
            ("lr", self.lr, self.lr >= 0, "at least 0"),
            ("eps", self.eps, self.eps > 0, "larger than 0"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0"),
            ("eta", self.eta, self.eta >= 0, "at least 0"),
            ("score_beta", self.score_beta, 0 <= self.score_beta < 1, "in [0, 1)"),
            ("epsilon", self.epsilon, 0 <= self.epsilon <= 1, "in [0, 1]"),
            (
                "cold_start_share",
                self.cold_start_share,
                0 < self.cold_start_share <= 1,
                "in (0, 1] (cold_start='none')",
            ),
            ("probability_floor", self.probability_floor, 0 <= self.probability_floor <= 1, "in [0, 1]"),
            ("exponent_cap", self.exponent_cap, self.exponent_cap > 0, "larger than 0"),
            ("sample_last", self.sample_last, self.sample_last >= 0, "at least 0"),
            ("max_grad_norm", self.max_grad_norm or 1.0, self.max_grad_norm is None or self.max_grad_norm > 0, "> 0"),
        )
        for name, value, fine, needed in ranges:
            if not fine or not (math.isfinite(value) or name == "exponent_cap"):
                raise ValueError(f"{name} must be {needed}; got {value}")
        if self.update_in == "backward" and self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} needs the norm of all gradients before the first update, but "
                "update_in='backward' updates each matrix as its gradient arrives. Leave max_grad_norm at None "
                "(misa train: --max_grad_norm 0), or use update_in='step'."
            )
        if self.update_in == "backward" and self.grad_dtype != "weight":
            raise ValueError(
                f"grad_dtype={self.grad_dtype!r} is the dtype of gradient slots, which update_in='backward' has none of"
            )
        self._check_rest()
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1); got {self.betas}")
        if not all(0 < weight < math.inf for weight in self.static_weights.values()):
            raise ValueError(
                f"static_weights must be positive and finite; got {dict(self.static_weights)}. What is never to train "
                "belongs into frozen."
            )

    def _check_rest(self) -> None:
        if self.rest == "none":
            without = [option for option, neutral in NO_REST.items() if getattr(self, option) != neutral]
            if without:
                raise ValueError(
                    f"{without[0]}={getattr(self, without[0])!r} says how matrices outside the draw move, but rest is "
                    f"'none', so they do not. Set rest to one of {', '.join(REST_RATES)}, or leave it out."
                )
            return
        if self.rest_lr is not None and not 0 < self.rest_lr < math.inf:
            raise ValueError(
                f"rest_lr is a multiple of lr, positive and finite; got {self.rest_lr}. To move nothing: rest='none'."
            )
        if not isinstance(self.rest_every, int) or self.rest_every < 1:
            raise ValueError(f"rest_every is a number of steps, an integer of at least 1; got {self.rest_every!r}")
        if self.rest_scores and self.score != "mean_square":
            raise ValueError(
                f"rest_scores needs score='mean_square'; score={self.score!r} is of norms after clipping, which what "
                "rests does not have."
            )
        if self.leave_rounding == "keep":
            raise ValueError(
                "leave_rounding='keep' keeps on the host 16 more bits of weights that do not change while they are not "
                f"drawn, but rest={self.rest!r} moves them. Use leave_rounding='stochastic', or rest='none'."
            )

    def altered(self, **changes: Any) -> MisaConfig:
        """This config with ``changes``, which still knows what the caller gave and what the preset filled in."""
        return MisaConfig.from_dict({**{name: getattr(self, name) for name in self.given}, **changes})

    def without_own_rest(self) -> MisaConfig:
        """This config where the preset's rest rule cannot work: that one is off; a rule the caller gave stays."""
        if self.rest == "none" or {"rest", *NO_REST} & self.given:
            return self
        return self.altered(rest="none")

    @property
    def rest_rate(self) -> float:
        """What the rest rule multiplies lr with: ``rest_lr`` or the rule's own; 0 without a rule."""
        own = REST_RATES.get(self.rest, 0.0)
        return own if self.rest_lr is None else self.rest_lr

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> MisaConfig:
        """Build a config from plain options (YAML, command line, a checkpoint).

        Raises:
            ValueError: an option is unknown (the closest known one is named) or has an invalid value.
        """
        for option, only in RETIRED.items():
            if options.get(option, only) != only:
                raise ValueError(f"{option} is no longer an option; it is always {only}, got {options[option]!r}")
        options = {option: value for option, value in options.items() if option not in RETIRED}
        known = {entry.name for entry in fields(cls)}
        for option in options:
            check_choice("option", option, known)
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python containers only, so that it survives JSON and ``torch.load(weights_only=True)``."""
        plain = asdict(self)
        plain.update(
            betas=list(self.betas),
            always_train=list(self.always_train),
            frozen=list(self.frozen),
            parameter_groups=[dict(group) for group in self.parameter_groups],
            static_weights=dict(self.static_weights),
        )
        return plain
