"""The budget: floor(δ·N), and what is said of a unit that exceeds it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from misa_engine.method.partition import Partition, Unit, check_budget, partition
from models import TINY

# Budget


def sized(*sizes: int, rest: int = 0, granularity: str = "module") -> Partition:
    units = tuple(Unit(f"u{i}", size, 0, "q", (f"u{i}",)) for i, size in enumerate(sizes))
    numels = {unit.name: unit.numel for unit in units}
    return Partition(units, (), (), "inferred", True, sum(sizes) + rest, granularity, numels=numels)


@pytest.mark.parametrize(
    ("total", "delta", "budget"),
    [(100, 0.03, 3), (1000, 0.03, 30), (100, 0.07, 7), (10, 0.3, 3), (7, 1.0, 7), (99, 0.05, 4)],
)
def test_the_budget_is_the_floor_of_delta_times_n(total, delta, budget):
    assert check_budget(sized(1, rest=total - 1), delta) == budget


@settings(deadline=None)  # other processes share the cores
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=8), st.integers(0, 10**11), st.floats(1e-6, 1.0))
def test_a_budget_holds_and_the_delta_that_an_error_names_works(sizes, rest, delta):
    example = sized(*sizes, rest=rest)
    try:
        budget = check_budget(example, delta)
    except ValueError as error:
        named = float(str(error).rpartition("delta=")[2].split()[0])
        assert delta < named <= 1
        assert check_budget(example, named) >= max(sizes)
        assert named <= max(sizes) / example.total * 1.002  # "smallest": four digits, rounded up
    else:
        assert max(sizes) <= budget <= delta * example.total
        assert budget == math.floor(delta * example.total)


def test_a_unit_over_the_budget_is_named_with_its_share_and_the_remedies():
    models = {"llama": TINY["llama"]()}
    with pytest.raises(ValueError) as error:
        check_budget(partition(models["llama"], "layer"), 0.03)
    for part in ("delta=0.03", "588", "'model.layers.0'", "7,744", "39.478%", "delta=0.3948", "'module' needs 0.07831"):
        assert part in str(error.value)
    assert check_budget(partition(models["llama"], "layer"), 0.3948) >= 7744
    assert check_budget(partition(models["llama"]), 0.07831) >= 1536
    with pytest.raises(ValueError, match=r"embed_tokens.*always_train or frozen"):
        check_budget(partition(models["llama"], include_outside=True), 0.08)
