"""Plans with residents against models of full size on fake tensors: what is held, and a pass."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from misa_engine import MISA, plan
from misa_engine.engine.residents import Residents, matrix
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.cards import published_config
from misa_engine.planner.plan import OPTIMIZER, WEIGHTS, Plan
from misa_engine.planner.probe import LiveBytes, fake_model, measure

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning"),
]
#: Of the promise.
TOLERANCE = 0.03


def held_bytes(config: Any, kind: str, **options: Any) -> dict[str, int]:
    """What the card holds of a model with residents and of its optimizer, and all that was allocated; fake tensors."""
    mode, model = fake_model(config)
    model.requires_grad_(True)
    tracker = LiveBytes([*model.parameters(), *model.buffers()])
    patches = {"quantise": lambda *a, **k: None, "dequantise": lambda *a, **k: None, "alone": lambda flat: flat}
    with mode, tracker, mock.patch.multiple(matrix, **patches):
        residents = Residents(model, kind)
        for name in residents.names:
            residents.hold(name, residents.matrix(name).parameter.detach())
        optimizer = MISA(model, rest="none", **options)
    found = {name: size for name, size in optimizer.memory().items() if not name.startswith("host_")}
    found["weights"] += sum(buffer.nbytes for buffer in model.buffers())
    elsewhere = set(residents.on_host)
    there = [parameter for name, parameter in model.named_parameters() if name not in elsewhere]
    assert found["weights"] == sum(tensor.nbytes for tensor in (*there, *model.buffers()))
    return {**found, "allocated": tracker.live}


def confirm(name: str, kind: str, length: int = 2048, **options: Any) -> Plan:
    """The plan of a model of full size, after each of its bytes has been looked at."""
    config = published_config(name)
    planned = plan(config, residents=kind, micro_batch=MicroBatch(1, length), **options)
    held = held_bytes(config, kind, **options)
    ours = {key: size for key, size in planned.bytes.items() if key in (*WEIGHTS, *OPTIMIZER)}
    assert {key: held[key] for key in ours} == ours
    allocated = sum(size for key, size in ours.items() if key != "weights")
    assert held["allocated"] == pytest.approx(allocated, rel=1e-3)  # and nothing that the account leaves out
    measured = measure(config, set(planned.worst_draw), length=length, residents=kind)
    passing = sum(planned.bytes.get(key, 0) for key in ("activations", "cross_entropy", "temporaries"))
    assert passing == pytest.approx(measured.peak, rel=TOLERANCE)
    total = planned.total_bytes - planned.bytes["slack"] - planned.bytes["cuda_context"]
    assert total == pytest.approx(held["weights"] + held["allocated"] + measured.peak, rel=TOLERANCE)
    return planned


def test_8b_with_residents_at_full_size_is_what_the_plan_says_and_fits_12_gib():
    assert confirm("llama-3-8b", "int8", state_dtype="int8").total_bytes <= 12 << 30


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["int8", "fp8", "int8_row"])
def test_14b_with_residents_at_full_size_is_what_the_plan_says_and_fits_24_gib(kind):
    assert confirm("qwen2.5-14b", kind, state_dtype="int8").total_bytes <= 24 << 30


@pytest.mark.parametrize("name", ["qwen2.5-14b", "qwen3-8b"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_pass_with_residents_takes_what_one_without_takes(name, checkpointing):
    """Shallow, but each layer at full width."""
    config = published_config(name)
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:3]
    active = {"model.layers.0.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight"}
    how: dict[str, Any] = {"length": 1024, "checkpointing": checkpointing, "dtype": torch.bfloat16}
    plain, rested = measure(config, active, **how), measure(config, active, residents="int8", **how)
    assert rested.peak == pytest.approx(plain.peak, rel=0.001)
    assert rested.saved == pytest.approx(plain.saved, rel=0.001)
