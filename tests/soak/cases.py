"""What a fuzz case is: a tiny model, the engine's options and what a user does around a step, drawn from one seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import TINY, VOCABULARY


class Block(nn.Module):
    """A residual block with a bias, a layer that is used twice, and an input that the loss may not depend on."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, width + 8)
        self.twice = nn.Linear(width + 8, width + 8, bias=False)
        self.down = nn.Linear(width + 8, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(self.up(x)))))
        return x + self.down(hidden)


class Blocks(nn.Module):
    """``plain``: what someone writes without transformers; takes ids or embeddings, checkpoints by torch's function."""

    def __init__(self, width: int = 16, tied: bool = False, checkpointing: bool = False):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.checkpointing = checkpointing
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing and self.training else layer(x)
        return self.head(x)


class Experts(nn.Module):
    """Three experts of separate Linear layers and a router of fixed hard choices: some get no token."""

    def __init__(self, width: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=index == 0) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        choice = (flat[:, 0] * 7).floor().long().remainder(5)  # 3 and 4: nobody
        out = flat
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, torch.tanh(expert(flat[rows])))
        return out.view_as(x)


def sequential(width: int) -> nn.Sequential:
    """``sequential``: numbered children and nothing else; the two experts' layers may get no token at all."""
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width, bias=False)) for _ in range(2)]
    return nn.Sequential(nn.Embedding(VOCABULARY, width), *blocks, Experts(width), nn.Linear(width, VOCABULARY))


#: Attention whose second derivative exists, in half of the cases.
EAGER = {"attn_implementation": ("eager", "sdpa")}
#: family -> options that a case may put over its configuration
FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "llama": {
        "num_hidden_layers": (2, 3),
        "tie_word_embeddings": (False, True),
        "attention_bias": (False, True),
        **EAGER,
    },
    "qwen2": {"num_hidden_layers": (2,), "tie_word_embeddings": (False, True), **EAGER},
    "gpt2": {"num_hidden_layers": (2,), "resid_pdrop": (0.0, 0.2), **EAGER},
    "opt": {"num_hidden_layers": (2, 3), "layerdrop": (0.0, 0.5, 0.9), **EAGER},
    "mixtral": {"num_hidden_layers": (2,)},
    "qwen2_moe": {"num_hidden_layers": (2,)},
    "plain": {"tied": (False, True), "checkpointing": (False, True)},
    "sequential": {},
}


@dataclass(frozen=True)
class Case:
    """One case. Fields with a default are what ``--plain`` puts back to it, one by one, to shrink a finding."""

    seed: int
    family: str
    model: dict[str, Any] = field(default_factory=dict)
    bf16: bool = False
    steps: int = 10
    options: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    autocast: bool = False
    accumulation: int = 1
    clip: str = "none"
    hooks: str = "none"
    edit: str = "none"
    entries: tuple[str, ...] = ()
    zero: str = "none"
    nonfinite: str = "none"
    closure: bool = False
    reload: bool = False
    schedule: bool = False
    walk_old_graph: bool = False

    @property
    def backward(self) -> bool:
        """Whether updates run inside the backward pass, where no gradient can be seen or edited."""
        return self.options.get("update_in") == "backward"

    def plain(self, *names: str) -> Case:
        """This case with some fields at their defaults; ``options.x`` takes one option away."""
        case = self
        for name in names:
            if name.startswith("options."):
                options = {key: value for key, value in case.options.items() if key != name.removeprefix("options.")}
                case = replace(case, options=options)
                continue
            known = {f.name: f for f in fields(Case)}[name]
            default = known.default_factory() if callable(known.default_factory) else known.default  # type: ignore[misc]
            case = replace(case, **{name: default})
        return case

    def build(self) -> nn.Module:
        """The model, in training mode; its own generator, so that the caller's stays as it is."""
        if self.family in ("plain", "sequential"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model: nn.Module = Blocks(**self.model) if self.family == "plain" else sequential(16)
        else:
            model = TINY[self.family](**self.model)
        if self.checkpointing and self.family not in ("plain", "sequential"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.to(torch.bfloat16 if self.bf16 else torch.float32).train()


ENTRIES = (
    *("grad_inputs", "backward_inputs", "grad_weights", "functional_call", "func_grad", "vmap", "jvp", "jacrev"),
    *("hessian_vector", "penalty", "twice", "evaluate", "copied", "partial_backward", "regulariser", "layer_alone"),
)

#: Those that add to p.grad, in plain torch as here.
ACCUMULATING = ("penalty", "twice", "partial_backward", "regulariser")
#: Those that call the model with weights that are not its own.
FUNCTIONAL = ("functional_call", "func_grad", "vmap", "jvp", "jacrev")


def draw(seed: int) -> Case:
    """Case number ``seed``."""
    dice = random.Random(f"misa fuzz {seed}")

    def often(p: float) -> bool:
        return dice.random() < p

    family = dice.choice(tuple(FAMILIES))
    model = {name: dice.choice(values) for name, values in FAMILIES[family].items()}
    options: dict[str, Any] = {
        "delta": dice.choice((0.35, 0.5, 0.8, 1.0)),
        "inner_steps": dice.choice((1, 2, 3, 5)),
        "lr": dice.choice((1e-3, 1e-2)),
        "seed": dice.randrange(1000),
        "rest": "none",  # the twin in plain torch leaves alone what is not drawn
    }
    optional: dict[str, tuple[float, tuple[Any, ...]]] = {
        "preset": (0.4, ("paper", "official")),
        "granularity": (0.4, ("block", "layer")),
        "rule": (0.5, ("uniform", "cyclic", "shuffle", "static", "top_k", "epsilon_greedy")),
        "state_dtype": (0.2, ("int8",)),
        "grad_dtype": (0.25, ("float32",)),
        "leave_rounding": (0.4, ("nearest", "keep", "stochastic")),
        "revisit": (0.5, ("clear", "keep", "offload", "keep_adjacent")),
        "weight_decay": (0.4, (0.1,)),
        "always_train": (0.3, (("norm",), ("bias",), ("embedding", "head"))),
        "include_outside": (0.15, (True,)),
        "gemm_gradients": (0.15, (False,)),
        "update_in": (0.2, ("backward",)),
        "max_grad_norm": (0.25, (0.5, 1e-3)),
        "master": (0.15, ("none",)),
        "bias_correction": (0.1, (False, True)),
        "closing_momentum": (0.1, (True,)),
        "cold_start": (0.3, ("none",)),
    }
    for name, (p, values) in optional.items():
        if often(p):
            options[name] = dice.choice(values)
    if options.get("update_in") == "backward":
        options.pop("max_grad_norm", None)
        options.pop("grad_dtype", None)
    if options.get("include_outside"):
        options.pop("always_train", None)
    case = Case(
        seed=seed,
        family=family,
        model=model,
        bf16=often(0.4),
        options=options,
        checkpointing=often(0.3),
        autocast=often(0.1),
        accumulation=dice.choice((1, 1, 2, 3)),
        clip=dice.choice(("none", "none", "ours", "torch", "value", "scaler", "scaler_torch")),
        hooks=dice.choice(("none", "none", "mask", "module", "activation", "accumulated")),
        edit=dice.choice(("none", "none", "data", "in_place", "replaced", "dropped")),
        entries=tuple(sorted(dice.sample(ENTRIES, dice.choice((0, 0, 1, 2, 3))))),
        zero=dice.choice(("none", "zero", "model", "by_hand", "never")),
        nonfinite=dice.choice(("none", "none", "data", "in_place", "loss")),
        closure=often(0.15),
        reload=often(0.25),
        schedule=often(0.3),
        walk_old_graph=often(0.15),
    )
    return sensible(case)


def sensible(case: Case) -> Case:
    """Take away what the engine refuses by name, or what no oracle could judge."""
    if case.bf16 or case.clip.startswith("scaler"):
        case = replace(case, autocast=False)
    if case.backward:  # no gradient is held: nothing to clip, edit or inject, and one accumulating backward only
        entries = tuple(entry for entry in case.entries if entry not in ACCUMULATING)
        clip = "none"
        nonfinite = case.nonfinite if case.nonfinite in ("none", "loss") else "none"
        case = replace(case, clip=clip, edit="none", nonfinite=nonfinite, entries=entries, zero="none", closure=False)
        if case.hooks == "accumulated":
            case = replace(case, hooks="none")
    if case.closure:
        case = replace(case, clip="none", edit="none", nonfinite="none")
    if case.reload or case.closure:  # a fresh model has no gradients of zero; a closure clears its own
        case = replace(case, zero="none")
    if case.zero == "never":  # what was edited would stay in the sum, on one side only
        case = replace(case, edit="none", nonfinite="none", clip="none")
    if case.clip.startswith("scaler"):  # edited before or after unscale_: what is raw then nobody can say
        case = replace(case, edit="none")
    if case.checkpointing or case.model.get("checkpointing"):
        # recomputed in the backward pass with the model's own weights: in plain torch, too, the numbers are wrong
        case = replace(case, entries=tuple(entry for entry in case.entries if entry not in FUNCTIONAL))
    if case.clip == "ours" and "max_grad_norm" in case.options:
        case = case.plain("options.max_grad_norm")
    return case
