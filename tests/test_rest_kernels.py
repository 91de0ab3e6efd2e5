"""kernels/rest: the four rules against float64, stochastic rounding, and what moves nothing."""

import math

import pytest
import torch

from kernel_rest import RATE, SHAPES, case, run
from misa_engine.kernels.rest import RULES, SINKHORN_PASSES, RestScratch, rest_step


def direction(grad, rule, transposed):
    """u(G) in float64, written as the formulas are."""
    g = grad.double().T if transposed else grad.double()
    if rule == "sign":
        g = g.sign()
    elif rule == "row_norm":
        g = g / g.square().mean(1, keepdim=True).sqrt()
    elif rule == "sinkhorn":
        for index in range(SINKHORN_PASSES):
            g = g / g.square().mean(1 - index % 2, keepdim=True).sqrt()
    return g.T if transposed else g


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_the_formula(shape, rule, transposed):
    weight, grad = case(shape, torch.float32)
    moved, sumsq = run(weight, grad, rule, transposed=transposed)
    expected = weight.double() - RATE * direction(grad, rule, transposed)
    # a few roundings of float32, relative to the largest element of a step
    bound = 1e-6 * (RATE * direction(grad, rule, transposed).abs().max() + weight.abs().max())
    assert (moved.double() - expected).abs().max() <= bound
    assert sumsq == pytest.approx(grad.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_rounding_to_bfloat16_is_unbiased_and_repeats(rule):
    weight, grad = case((8, 64), torch.bfloat16)
    rate = RATE / 100
    exact, _ = run(weight.float(), grad.float(), rule, rate=rate)
    total, trials = torch.zeros(8, 64, dtype=torch.float64), 400
    for seed in range(trials):
        total += run(weight, grad, rule, rate=rate, seed=seed)[0].double()
    ulp = 2.0 ** (torch.frexp(exact.double()).exponent - 8)
    # the mean of n roundings has a standard deviation of at most ulp/(2·√n); 5 of them for 512 elements
    assert ((total / trials - exact.double()).abs() <= 5 * ulp / 2 / math.sqrt(trials)).all()
    first, again = (run(weight, grad, rule, rate=rate, seed=3)[0] for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, run(weight, grad, rule, rate=rate, seed=4)[0])
    # each is one of the two neighbours of the exact value
    assert ((first.double() - exact.double()).abs() < ulp).all()


def test_steps_far_below_half_an_ulp_arrive():
    weight, grad = torch.full((64, 64), 0.02, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    scratch, sumsq = RestScratch.allocate(64, 64, "cpu"), torch.zeros(1)
    moved = weight.clone()
    for step in range(200):
        rest_step(moved, grad, sumsq, scratch, rule="sign", rate=1e-6, seed=step, backend="reference")
    # 4,096 elements: the mean's noise is √(path·ulp)/√4096 = √(2e-4·1.2e-4)/64 = 2.4e-6
    assert (weight.double() - moved.double()).mean().item() == pytest.approx(2e-4, abs=1e-5)
    assert torch.equal(weight - 1e-6, weight)  # what rounding to nearest would have done


@pytest.mark.parametrize("every", [1, 32, 64, 128])
def test_the_noise_of_rounding_falls_only_when_a_step_nears_an_ulp(every):
    """Of n steps s, made every k: √(n·s·ulp·(1 - k·s/ulp)); the mean is n·s whatever k (docs/algorithm.md)."""
    step, steps, ulp = 1e-6, 2048, 2.0**-13  # of weights between 1/64 and 1/32
    weight, grad = torch.full((64, 256), 0.02, dtype=torch.bfloat16), torch.ones(64, 256, dtype=torch.bfloat16)
    scratch, sumsq, before = RestScratch.allocate(64, 256, "cpu"), torch.zeros(1), weight.double()
    moved = weight.clone()
    for index in range(steps // every):
        rest_step(moved, grad, sumsq, scratch, rule="sign", rate=step * every, seed=index, backend="reference")
    drift = before - moved.double()
    noise = math.sqrt(steps * step * max(0.0, ulp - every * step))
    # 16,384 weights: the mean is known to noise/128, the noise itself to 1 in 180; twice 3 of these
    assert drift.mean().item() == pytest.approx(steps * step, abs=6 * ulp / 128 + 6 * noise / 128)
    if every < 128:
        assert drift.std().item() == pytest.approx(noise, rel=0.04)
    else:  # steps above an ulp
        assert drift.std().item() < ulp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_what_moves_nothing(rule, dtype):
    weight, grad = case((6, 32), dtype)
    for bad in (math.nan, math.inf, -math.inf):
        broken = grad.clone()
        broken[3, 5] = bad
        moved, sumsq = run(weight, broken, rule)
        assert torch.equal(moved, weight) and not math.isfinite(sumsq)
    assert torch.equal(run(weight, torch.zeros_like(grad), rule)[0], weight)
    half = grad.clone()
    half[2] = 0  # an output unit without gradient, as a token's embedding that is not in the batch
    moved, _ = run(weight, half, rule)
    assert torch.equal(moved[2], weight[2]) and not torch.equal(moved[1], weight[1])


@pytest.mark.parametrize("rule", ["sign", "row_norm", "sinkhorn"])
def test_the_scale_of_the_gradient_does_not_matter(rule):
    weight, grad = case((16, 48), torch.float32)
    moved = [run(weight, grad * scale, rule)[0] for scale in (1.0, 2.0**-20, 2.0**12)]
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2])


def test_the_largest_weight_does_not_become_infinite():
    edge = torch.full((2, 16), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    grad = -torch.ones(2, 16, dtype=torch.bfloat16)
    for seed in range(20):
        assert run(edge, grad, "sign", rate=1e36, seed=seed)[0].isfinite().all()


@pytest.mark.parametrize(
    ("weight", "grad", "rule"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "sign"),
        (torch.zeros(6), torch.zeros(6), "sign"),
        (torch.zeros(3, 2).T, torch.zeros(2, 3), "sign"),
        (torch.zeros(2, 3), torch.zeros(2, 3), "adam"),
    ],
)
def test_bad_arguments_are_named(weight, grad, rule):
    scratch = RestScratch.allocate(8, 8, "cpu")
    with pytest.raises(ValueError, match=r"contiguous matrices of one shape|one of sign, row_norm"):
        rest_step(weight, grad, torch.zeros(1), scratch, rule=rule, rate=1e-3, seed=0, backend="reference")
