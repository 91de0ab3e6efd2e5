"""The check of the loss on data whose gradients are rounding: right runs are not stopped, wrong ones still are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from command import make_workplace, words
from misa_engine.cli.main import main
from misa_engine.trainer import lean

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = make_workplace(tmp_path_factory.mktemp("same"), tmp_path_factory.mktemp("cache"), torch.bfloat16)
    (place / "same.jsonl").write_text((json.dumps({"text": "a" * 40}) + "\n") * 4)
    return place


def test_one_repeated_token_is_no_reason_to_stop(place, tmp_path, capsys):
    assert main(words(place, tmp_path / "out", dataset=place / "same.jsonl", max_steps=1)) == 0


class Stub:
    """A check whose gradients are given."""

    def __init__(self, largest: float, weight: torch.Tensor):
        self._largest, self._probe = largest, ("k", torch.nn.Parameter(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_floor_follows_the_largest_gradient_and_the_weights(dtype):
    weight = torch.full((4, 4), 0.5, dtype=dtype)
    assert lean.LossCheck._floor(Stub(8.0, weight), dtype) == 8.0 * lean.ROUNDING[dtype]
    assert lean.LossCheck._floor(Stub(0.0, weight), dtype) == lean.VANISHED / 2.0
    assert lean.LossCheck._floor(Stub(0.0, weight * 0), dtype) == 0.0


def test_a_gradient_that_is_not_rounding_is_far_above_the_floor():
    assert all(share < 0.02 for share in lean.ROUNDING.values())
