import numpy as np
import pytest
import torch

from misa_engine.kernels.split_float import join, join_into, round_stochastic_, split, split_into

CHUNK = 1 << 24


def as_float(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int32).view(torch.float32)


def boundary_patterns() -> torch.Tensor:
    """Every upper half with the lower halves around zero, the tie and the ends."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    lower = torch.tensor([0x0, 0x1, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], dtype=torch.int32)
    return (upper[:, None] | lower[None, :]).reshape(-1)


def check_round_trip(bits: torch.Tensor) -> None:
    hi, lo = split(as_float(bits))
    assert hi.dtype == torch.bfloat16 and lo.dtype == torch.int16
    assert torch.equal(join(hi, lo).view(torch.int32), bits)


def test_boundary_patterns_round_trip():
    check_round_trip(boundary_patterns())


def test_random_patterns_round_trip():
    generator = torch.Generator().manual_seed(0)
    check_round_trip(torch.randint(-(1 << 31), 1 << 31, (1 << 20,), generator=generator).to(torch.int32))


@pytest.mark.exhaustive
def test_all_patterns_round_trip_and_131070_nans_lose_their_upper_half():
    lost = 0
    for start in range(-(1 << 31), 1 << 31, CHUNK):
        bits = torch.arange(start, start + CHUNK, dtype=torch.int64).to(torch.int32)
        check_round_trip(bits)
        x = as_float(bits)
        lost += int((x.isnan() & ~split(x)[0].isnan()).sum())
    assert lost == 131_070


def test_upper_half_is_rounded_half_away_from_zero():
    bits = boundary_patterns()
    x = as_float(bits)
    finite = x.isfinite()
    expected = (((bits.long() & 0xFFFFFFFF) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(split(x)[0][finite], expected[finite])
    tie = torch.tensor([1 + 2**-8, -1 - 2**-8])
    assert split(tie)[0].tolist() == [1 + 2**-7, -1 - 2**-7]
    assert tie.bfloat16().tolist() == [1.0, -1.0]  # round to nearest even, which the split cannot use


def test_upper_half_differs_from_nearest_even_only_at_ties():
    x = as_float(boundary_patterns())
    x = x[x.isfinite()]
    hi, lo = split(x)
    differs = hi != x.bfloat16()
    assert differs.any() and (lo[differs] == -(1 << 15)).all()


def test_bfloat16_values_have_no_lower_half():
    x = torch.randn(1000).bfloat16()
    hi, lo = split(x.float())
    assert torch.equal(hi, x) and not lo.any()


def test_in_place_forms_equal_the_allocating_ones():
    x = torch.randn(3, 50)
    hi, lo = split(x)
    hi_, lo_, out = torch.empty_like(hi), torch.empty_like(lo), torch.empty_like(x)
    split_into(x.clone(), hi_, lo_)
    join_into(hi_, lo_, out)
    assert torch.equal(hi, hi_) and torch.equal(lo, lo_) and torch.equal(out, x)


# ------------------------------------------------------------------------------------------------ stochastic rounding


def rounded(master: torch.Tensor, seed: int, **options: int) -> torch.Tensor:
    hi, lo = split(master)
    round_stochastic_(hi, lo, seed, backend="reference", **options)
    assert not lo.any()
    return hi


@pytest.mark.parametrize("share", [1 / 65536, 0.1, 0.5, 0.75, 65535 / 65536])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_stochastic_rounding_is_unbiased(share: float, sign: float):
    n = 1 << 20
    step = 2.0**-7  # between two bfloat16 neighbours of 1
    offset = round(share * 65536) / 65536
    up = (rounded(torch.full((n,), sign * (1 + offset * step)), seed=7).abs() > 1).double().mean().item()
    # 5 standard errors of a binomial share; the seed is fixed, so this never flickers.
    assert abs(up - offset) < 5 * (offset * (1 - offset) / n) ** 0.5


def test_stochastic_rounding_of_random_weights_keeps_their_mean():
    generator = torch.Generator().manual_seed(1)
    master = torch.randn(1 << 20, generator=generator) * 0.02
    errors = (rounded(master, seed=3).double() - master.double()) / master.abs().double()
    assert abs(errors.mean().item()) < 5 * errors.std().item() / 2**10
    assert errors.abs().max() <= 2**-7  # never further than the neighbour


def test_stochastic_rounding_bits_are_independent_between_elements_and_seeds():
    master = torch.full((1 << 18,), 1 + 2.0**-8)  # a tie: one fair coin an element
    coins = torch.stack([(rounded(master, seed) > 1).double() for seed in (0, 1, 2, 1 << 31, 1 << 62)]) - 0.5
    correlation = torch.corrcoef(coins) - torch.eye(5)
    assert correlation.abs().max() < 5 / 2**9
    for lag in (1, 2, 32, 1024, 65536):
        assert abs((coins[0, lag:] * coins[0, :-lag]).mean().item() * 4) < 5 / 2**9


def test_stochastic_rounding_depends_on_seed_and_index_in_the_unit_alone():
    generator = torch.Generator().manual_seed(2)
    master = torch.randn(5000, generator=generator)
    whole = rounded(master, seed=11)
    assert torch.equal(whole, rounded(master, seed=11))
    assert not torch.equal(whole, rounded(master, seed=12))
    assert torch.equal(whole[1777:], rounded(master[1777:].clone(), seed=11, first_index=1777))
    arena_lo = torch.zeros(9000, dtype=torch.int16)  # wherever the slot lies
    hi, lo = split(master)
    arena_lo[2048:7048] = lo
    round_stochastic_(hi, arena_lo[2048:7048], 11, backend="reference")
    assert torch.equal(hi, whole)


def test_stochastic_rounding_leaves_bfloat16_values_and_the_edge_of_the_range_alone():
    values = torch.randn(1000).bfloat16()
    assert torch.equal(rounded(values.float(), seed=0), values)
    largest = torch.full((1000,), float(np.finfo(np.float32).max) * 0.997)  # above the largest bfloat16, below its tie
    assert rounded(largest, seed=0).isfinite().all()


def test_without_stochastic_rounding_small_drift_is_lost():
    """What the rounding is for: 40 switches, each after a drift of a tenth of a bfloat16 step."""
    drift, switches = 2.0**-7 / 10, 40
    kept = torch.ones(4096, dtype=torch.bfloat16)
    dropped = kept.clone()
    for switch in range(switches):
        dropped = (dropped.float() + drift).bfloat16()
        kept = rounded(kept.float() + drift, seed=switch)
    assert dropped.eq(1).all()
    assert abs(kept.double().mean().item() - (1 + switches * drift)) < 1e-3  # 2x the standard error


def test_stochastic_rounding_refuses_bad_seeds():
    hi, lo = split(torch.ones(4))
    for seed, first in ((-1, 0), (1 << 63, 0), (0, -1)):
        with pytest.raises(ValueError, match="seed must be in"):
            round_stochastic_(hi, lo, seed, backend="reference", first_index=first)
