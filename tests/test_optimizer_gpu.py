"""The whole optimizer on a real device, in one call; test_device_cases.py runs the same cases on a CPU."""

import pytest

from optimizer_cases import CASES

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES)
def test_optimizer_on_the_device(case):
    CASES[case]("cuda", "triton")
