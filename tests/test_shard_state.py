"""``shard_state``: replicas that keep parts of the state each, beside replicas that keep all of it."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import test_replicas
from misa_engine import MISA
from ranks import run_ranks
from test_replicas import CASES, _arguments

#: 64 x 64 is 4 tiles; 64 x 80 is 5, of which two processes have 3 and 2, four 2, 2, 1 and none.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 80}
#: 40 x 40 and 40 x 50 are one tile and a part of the second; the head's 2,560 two and a half.
TAILS: dict[str, Any] = {"hidden_size": 40, "intermediate_size": 50}

#: name -> (MISA's options, how the loop goes), beside some of the replicas'
MORE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rest": ({"rest": "row_norm", "rest_every": 2, "rest_scores": True}, {"micro_batches": 2, "told": True}),
    "rest, update in backward": ({"rest": "sign", "update_in": "backward"}, {"dtype": torch.bfloat16}),
    "residual bits and moments kept": ({"leave_rounding": "keep", "revisit": "keep"}, {"dtype": torch.bfloat16}),
    "8 bits, offload": ({"state_dtype": "int8", "revisit": "offload"}, {"dtype": torch.bfloat16}),
}
EVERY = {**CASES, **MORE}
ALIKE = [
    *("engine", "paper", "official", "update in backward", "offload", "blocks and always", "accumulation, told"),
    *("max_grad_norm", "clip_grad_norm_", "torch clips", "not finite in backward", "scaler", "bfloat16, float32 slots"),
    *MORE,
]


def trained(case: str, part: slice, shape: dict[str, Any], rank: int = 0, **options: Any) -> dict[str, Any]:
    """What ``test_replicas.run`` gives, and the state at the end."""
    given, how = EVERY[case]
    plain, built = test_replicas.build, []

    def build(model: nn.Module, **given: Any) -> MISA:
        built.append(MISA(model, **{**given, **options}))
        return built[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(test_replicas, "MISA", build)
        patched.setattr(test_replicas, "ROUNDS", 3)
        patched.setattr(test_replicas, "build", lambda dtype, seed: plain(dtype, seed, **shape))
        result = test_replicas.run(given, part, seed=rank, **_arguments(how))
    del result["begun"]
    return {**result, "state": snapshot(built[0].state_dict()["misa"])}


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested results are not the same to the last bit."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: keys"]
        return [text for key in one for text in differences(one[key], other[key], f"{where}.{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [f"{where}: lengths"]
        return [
            text for i, pair in enumerate(zip(one, other, strict=True)) for text in differences(*pair, f"{where}.{i}")
        ]
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    else:
        same = one == other or one != one and other != other
    return [] if same else [where]


def snapshot(value: Any) -> Any:
    """As torch.save and torch.load(weights_only=True) would give it."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def alike(rank: int, shape: dict[str, Any], cases: list[str]) -> dict[str, Any]:
    """The same batch everywhere, so that gradients are those of one process to the last bit."""
    return {case: trained(case, slice(0, 4), shape, rank, shard_state=True) for case in cases}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(alike, tmp_path_factory.mktemp("two"), WIDE, ALIKE)


@pytest.mark.parametrize("case", ALIKE)
def test_parts_of_the_state_in_two_processes_train_bit_for_bit_as_all_of_it_in_one(two, case):
    assert isinstance(two[0], dict), two[0]
    alone = trained(case, slice(0, 4), WIDE)
    for found in two:
        assert differences(alone, found[case]) == []
