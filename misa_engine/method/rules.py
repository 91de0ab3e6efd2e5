"""How units are drawn: one row of RULES each.

A rule is a pure function of a :class:`DrawContext` and a generator: it orders the units. Rules compute with the float64
tensors they are given, and this file does not import torch: MisaConfig knows the rules' names, and reading the options
of a run must be possible before torch is loaded, which reads its environment once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class DrawContext:
    """All that a rule may look at."""

    scores: Tensor  # (B,) float64, G_u as the preset reads it
    exponents: Tensor  # (B,) float64, η times the normalised score, capped: P_u ∝ exp(exponent)
    log_weights: Tensor  # (B,) float64, logarithms of the static weights
    visits: tuple[int, ...]  # rounds in which the unit was active
    last_visit: tuple[int, ...]  # last such round, -1 for none
    left: tuple[int, ...]  # what is left of the present pass (cyclic, shuffle), in order
    epsilon: float  # share of uniform draws (epsilon_greedy)


@dataclass(frozen=True)
class Draw:
    """Units in the order in which a rule draws them; as many get in as the budget holds."""

    order: Sequence[int]
    then: Sequence[int] = ()  # the next pass; begins only when all of `order` got in


@dataclass(frozen=True)
class Rule:
    """A row of RULES. The distribution of ``draw``'s first unit is ``probabilities``."""

    draw: Callable[[DrawContext, torch.Generator], Draw]
    probabilities: Callable[[DrawContext], Tensor]
    needs_scores: bool = False  # the cold start is for rules that look at scores, or at what follows from them
    carries: bool = False  # fill="carry" is for random draws; a pass keeps a refused unit anyhow, and greedy is greedy


def race(log_weights: Tensor, generator: torch.Generator) -> list[int]:
    """Order all units as sequential weighted draws without replacement would.

    Exponential clocks with rates w_u ring in exactly that order (Efraimidis and Spirakis 2006). In logarithms the
    clock is a Gumbel variable added to log w_u, so a weight that underflows as a number still has its place.
    """
    uniform = log_weights.new_empty(len(log_weights)).uniform_(generator=generator)
    gumbel = -(-(-uniform).log1p()).log()
    # Beyond 1e16 the sum forgets the noise; sorting by noise first still breaks ties between equal weights fairly.
    by_noise = gumbel.argsort(descending=True, stable=True)
    keys = (log_weights - log_weights.max() + gumbel)[by_noise]
    return by_noise[keys.argsort(descending=True, stable=True)].tolist()


def log_gamma_variates(shape: Tensor, generator: torch.Generator) -> Tensor:
    """Logarithms of Gamma(shape, 1) variates for shapes of at least 1 (Marsaglia and Tsang 2000).

    torch.distributions draws from the global generator only, and a Dirichlet vector is normalised Gamma variates.
    """
    result = shape.new_empty(len(shape))
    waiting = (shape > 0).nonzero().flatten()
    while len(waiting):  # accepts over 95% at every shape, so four or five turns for 10,000 units
        d = shape[waiting] - 1 / 3
        x = d.new_empty(len(d)).normal_(generator=generator)
        log_u = d.new_empty(len(d)).uniform_(generator=generator).log()
        v = (1 + x / (9 * d).sqrt()) ** 3
        accepted = (v > 0) & (log_u < x.square() / 2 + d - d * v + d * v.log())
        result[waiting[accepted]] = (d * v)[accepted].log()
        waiting = waiting[~accepted]
    return result


def _one_hot(unit: int, like: Tensor) -> Tensor:
    result = like.new_zeros(len(like))
    result[unit] = 1.0
    return result


def _weighted(log_weights: Callable[[DrawContext], Tensor], needs_scores: bool = False) -> Rule:
    """Rule that draws with weights exp(log_weights), one after the other, without replacement."""
    return Rule(
        draw=lambda context, generator: Draw(race(log_weights(context), generator)),
        probabilities=lambda context: log_weights(context).softmax(dim=0),
        needs_scores=needs_scores,
        carries=True,
    )


def _draw_cyclic(context: DrawContext, generator: torch.Generator) -> Draw:
    return Draw(context.left, range(len(context.scores)))


def _probabilities_cyclic(context: DrawContext) -> Tensor:
    return _one_hot(context.left[0] if context.left else 0, context.scores)


def _draw_shuffle(context: DrawContext, generator: torch.Generator) -> Draw:
    import torch  # has no method of a tensor that draws a permutation

    return Draw(context.left, torch.randperm(len(context.scores), device="cpu", generator=generator).tolist())


def _probabilities_shuffle(context: DrawContext) -> Tensor:
    choices = list(context.left or range(len(context.scores)))
    result = context.scores.new_zeros(len(context.scores))
    result[choices] = 1 / len(choices)
    return result


def _best_first(context: DrawContext) -> list[int]:
    """Highest score first; ties go to the least recent visit, then to the lower index."""
    scores, last_visit = context.scores.tolist(), context.last_visit
    return sorted(range(len(scores)), key=lambda unit: (-scores[unit], last_visit[unit], unit))


def _draw_top_k(context: DrawContext, generator: torch.Generator) -> Draw:
    return Draw(_best_first(context))


def _probabilities_top_k(context: DrawContext) -> Tensor:
    return _one_hot(_best_first(context)[0], context.scores)


def _counts(context: DrawContext) -> Tensor:
    return context.scores.new_tensor(context.visits) + 1


def _draw_epsilon_greedy(context: DrawContext, generator: torch.Generator) -> Draw:
    """With probability ε all of the draw is uniform, else its weights are a Dirichlet(visits + 1) sample.

    The selection step of AdaGradSelect (arXiv 2512.15764) with ε and the exploring distribution held constant: units
    visited often are likely to be visited again, and a fresh Dirichlet sample each round decides how likely. Visits
    carry the information, not gradient norms.
    """
    exploring = context.scores.new_empty(()).uniform_(generator=generator).item() < context.epsilon
    if exploring:
        return Draw(race(context.scores.new_zeros(len(context.scores)), generator))
    return Draw(race(log_gamma_variates(_counts(context), generator), generator))


def _probabilities_epsilon_greedy(context: DrawContext) -> Tensor:
    # The mean of Dirichlet(a) is a / Σa, and that is the distribution of the first unit drawn with such weights.
    counts = _counts(context)
    return context.epsilon / len(counts) + (1 - context.epsilon) * counts / counts.sum()


#: How units are drawn. importance: MISA; uniform: LISA; cyclic and shuffle: BAdam's fixed and random order (every unit
#: once a pass); static: OwLore, OWS; top_k: greedy; epsilon_greedy: AdaGradSelect.
RULES: dict[str, Rule] = {
    "importance": _weighted(lambda context: context.exponents, needs_scores=True),
    "uniform": _weighted(lambda context: context.scores.new_zeros(len(context.scores))),
    "cyclic": Rule(_draw_cyclic, _probabilities_cyclic),
    "shuffle": Rule(_draw_shuffle, _probabilities_shuffle),
    "static": _weighted(lambda context: context.log_weights),
    "top_k": Rule(_draw_top_k, _probabilities_top_k, needs_scores=True),
    "epsilon_greedy": Rule(_draw_epsilon_greedy, _probabilities_epsilon_greedy, needs_scores=True, carries=True),
}
