import json

import pytest

from golden_trajectories import CASES, FILE, environment, trajectory

KEPT = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.skipif(KEPT["environment"] != environment(), reason=f"bits were recorded on {KEPT['environment']}")
@pytest.mark.parametrize("case", CASES, ids="/".join)
def test_weights_scores_and_draws_are_the_recorded_ones(case):
    assert trajectory(*case) == KEPT["cases"]["/".join(case)]
