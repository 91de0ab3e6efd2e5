"""What the planner says of a model whose undrawn matrices rest in 8 bits."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig

from misa_engine import MisaConfig, plan
from misa_engine.cli.main import main
from misa_engine.errors import UserError
from misa_engine.planner.activations import MicroBatch
from misa_engine.planner.cards import CARDS, Card, published_config
from misa_engine.planner.plan import WEIGHTS
from misa_engine.planner.replicas import LINKS
from misa_engine.planner.solve import Wishes, solve
from misa_engine.planner.speeds import FORMATS, SPEEDS
from misa_engine.planner.worst_case import MetaModel

GIB = 2**30
LEAN = ("--residents", "int8", "--state_dtype", "int8", "--length", "2048", "--json")


def planned(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- what the issue asks of 12 and 24 GiB ----


@pytest.mark.parametrize(("model", "gpu"), [("llama-3-8b", "12"), ("llama-3-8b", "rtx3060-12"), ("qwen2.5-14b", "24")])
def test_8b_fits_12_gib_and_14b_fits_24_with_the_slack_named(capsys, model, gpu):
    found = planned(capsys, "--model", model, "--gpu", gpu, *LEAN)
    assert found["fits"] and found["delta"] == 0.03 and found["length"] == 2048
    assert found["bytes"]["slack"] >= 0.5 * GIB and found["bytes"]["cuda_context"] > 0
    assert found["unused_bytes"] == found["card"]["total_bytes"] - found["total_bytes"] >= 0
    assert found["residents"]["format"] == "int8" and found["residents"]["matrices"] in (224, 336)
    assert found["residents"]["host_bytes"]["masters"] == 2 * found["bytes"]["resident_codes"]


def test_the_bytes_of_llama_3_8b(capsys):
    found = planned(capsys, "--model", "llama-3-8b", "--gpu", "12", *LEAN)
    layers = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    head, norms = 128256 * 4096, (2 * 32 + 1) * 4096
    sizes = found["bytes"]
    assert sizes["resident_codes"] == layers and sizes["resident_steps"] == layers // 128 * 2
    assert sizes["resident_workspace"] == 2 * 4096 * 14336
    assert 0 <= sizes["active_weights"] - 2 * found["delta_parameters"] <= 2 * 1024
    assert 0 <= sizes["weights"] - 2 * (head + norms) < 1000  # and the frequencies of the positions
    assert found["residents"]["on_host"] == "model.embed_tokens.weight"
    assert found["residents"]["host_bytes"]["embedding"] == 2 * head
    assert found["residents"]["stays"] == ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_differ_in_their_scales_only(kind):
    found = plan(published_config("tinyllama"), residents=kind).bytes
    other = plan(published_config("tinyllama"), residents="int8").bytes
    assert {name: size for name, size in found.items() if name != "resident_steps"} == {
        name: size for name, size in other.items() if name != "resident_steps"
    }
    assert 0 < found["resident_steps"] <= other["resident_steps"]


def test_without_residents_nothing_changes():
    config = published_config("tinyllama")
    plain, named = plan(config, rest="none"), plan(config, rest="none", residents="none")
    assert plain == named and plain.residents is None
    assert not set(WEIGHTS[1:]) & set(plain.bytes)


def test_a_divided_state_beside_residents_is_refused():
    with pytest.raises(UserError, match="residents with shard_state"):
        plan(published_config("tinyllama"), residents="int8", shard_state=True)


def test_a_tied_or_trained_embedding_stays_on_the_card():
    tied = plan(published_config("llama-3.2-1b"), residents="int8")
    assert tied.residents.on_host is None and "embedding" not in tied.residents.host_bytes
    trained = plan(published_config("tinyllama"), residents="int8", always_train=("*embed_tokens*",))
    assert trained.residents.on_host is None
    assert trained.bytes["weights"] > 2 * 2 * 32000 * 2048


def test_what_is_kept_of_inactive_matrices_is_on_the_host():
    config = published_config("tinyllama")
    layers = plan(config, residents="int8").bytes["resident_codes"]
    how = {"rest": "none", "leave_rounding": "keep", "revisit": "offload"}
    kept = plan(config, residents="int8", **how).residents.host_bytes
    assert kept["residual_bits"] == 2 * layers and kept["moments"] == round(2.125 * layers)


def test_each_of_several_processes_holds_its_own_masters(capsys):
    words = ("--model", "llama-3-8b", "--residents", "int8", "--length", "64")
    alone, two = planned(capsys, *words), planned(capsys, *words, "--gpus", "2")
    assert two["bytes"] == alone["bytes"] and two["replicas"]["gpus"] == two["residents"]["processes"] == 2
    assert two["residents"]["host_bytes"] == alone["residents"]["host_bytes"]
    assert two["residents"]["host_total_bytes"] == 2 * alone["residents"]["host_total_bytes"] > 27 * GIB
    assert main(["plan", *words, "--gpus", "2"]) == 0
    assert "27.96 GiB" in (shown := capsys.readouterr().out) and "in each of 2 processes" in shown


# ---- the time of dequantising, and of a switch ----


@pytest.mark.parametrize(
    ("model", "card", "how", "kept", "share"),
    [
        ("llama-3-8b", "rtx3060-12", {}, 0.0, 0.0004),
        ("qwen2.5-14b", "rtx4090", {}, 0.0, 0.002),
        ("qwen2.5-14b", "rtx4090", {"rest": "none", "leave_rounding": "keep", "revisit": "keep"}, 10.0, 0.012),
    ],
)
def test_what_a_switch_copies_is_less_than_a_fiftieth_of_a_round(model, card, how, kept, share):
    """Why the next draw is not known early (docs: residents)."""
    found = plan(published_config(model), residents="int8", card=card, state_dtype="int8", **how)
    switch = found.residents.switch
    assert switch.bytes == round(2 * found.delta_parameters * (2 + kept)) and switch.inner_steps == 50
    assert switch.seconds == switch.bytes / LINKS["PCIe 4 x16"]
    assert switch.round_seconds == pytest.approx(50 * found.residents.dequantisation.gemm_seconds)
    assert 0.5 * share < switch.seconds / switch.round_seconds < share < 0.02
    assert "computed, not measured" in switch.describe() and found.residents.to_dict()["switch"]["bytes"] > 0


def test_dequantising_is_five_bytes_a_weight_and_pass():
    config = published_config("llama-3-8b")
    for checkpointing, passes in ((True, 3), (False, 2)):
        found = plan(config, residents="int8", card="rtx3060-12", micro_batch=MicroBatch(1, 2048, checkpointing))
        cost, resting = found.residents.dequantisation, found.bytes["resident_codes"] - found.delta_parameters
        assert cost.passes == passes
        assert cost.bytes == pytest.approx(passes * resting * (5 + 2 / 128), rel=1e-6)
        assert cost.seconds == pytest.approx(cost.bytes / 360e9)
        assert 0.02 < cost.seconds / cost.gemm_seconds < 0.2
    assert found.residents.dequantisation.card == "rtx3060-12"


def test_the_time_is_labelled_computed_and_needs_a_card_s_name(capsys):
    assert main(["plan", "--model", "tinyllama", "--residents", "int8", "--gpu", "rtx4090"]) == 0
    shown = capsys.readouterr().out
    assert "computed from the published speeds of rtx4090, not measured" in shown and "host memory: " in shown
    assert main(["plan", "--model", "tinyllama", "--residents", "int8", "--gpu", "12"]) == 0
    assert "a card's name adds the time" in capsys.readouterr().out
    found = planned(capsys, "--model", "tinyllama", "--residents", "int8")["residents"]["dequantisation"]
    assert found["basis"] == "computed, not measured" and found["seconds"] > 0


def test_the_command_line_names_the_kernels_formats():
    from misa_engine.kernels import resident8

    assert set(FORMATS) == set(resident8.FORMATS)


def test_speeds_are_of_known_cards():
    assert set(SPEEDS) <= set(CARDS)
    assert all(100 < memory < 10_000 and 10 < arithmetic < 3000 for memory, arithmetic in SPEEDS.values())


# ---- the solver ----


def test_the_solver_proposes_residents_only_where_bfloat16_does_not_fit(capsys):
    fits = planned(capsys, "--model", "llama-3-8b", "--max_vram_gb", "20")
    assert fits["residents"] is None and "--residents" not in fits["command"]
    rests = planned(capsys, "--model", "llama-3-8b", "--max_vram_gb", "12")
    assert rests["residents"]["format"] == "int8" and "--residents int8" in rests["command"]
    assert rests["total_bytes"] <= 12 * GIB and rests["rest"] == "none"


def test_residents_that_were_asked_for_are_kept_and_none_means_none(capsys):
    found = planned(capsys, "--model", "llama-3-8b", "--max_vram_gb", "40", "--residents", "fp8")
    assert found["residents"]["format"] == "fp8" and found["state_dtype"] == "float32"
    assert main(["plan", "--model", "llama-3-8b", "--max_vram_gb", "12", "--residents", "none"]) == 2
    error = capsys.readouterr().err
    assert "does not fit into 12.00 GiB" in error and "With --residents int8 it needs" in error


def test_the_solver_does_not_propose_residents_beside_a_rest_rule():
    meta = MetaModel(published_config("llama-3-8b"))
    with pytest.raises(UserError, match="does not fit"):
        solve(meta, Card.of("12"), MisaConfig(rest="sign"), MicroBatch(), Wishes())
    with pytest.raises(UserError, match="moves every matrix in place"):
        solve(meta, Card.of("12"), MisaConfig(rest="sign"), MicroBatch(), Wishes(residents="int8"))


# ---- what is refused ----


def test_a_rest_rule_and_unknown_formats_are_refused_by_name(capsys):
    assert main(["plan", "--model", "tinyllama", "--residents", "int8", "--rest", "sign"]) == 2
    error = capsys.readouterr().err
    assert "rest='sign' moves every matrix in place" in error and error.count("\n") == 1
    assert main(["plan", "--model", "tinyllama", "--residents", "int4"]) == 2
    assert "int8_row" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown residents 'int4'"):
        plan(published_config("tinyllama"), residents="int4")


def test_a_model_without_linear_layers_has_nothing_that_rests():
    from models import TINY

    with pytest.raises(UserError, match="no matrix of gpt2 can rest"):
        plan(TINY["gpt2"]().config, delta=0.3, residents="int8", micro_batch=MicroBatch(1, 16, False, "plain"))


def test_float32_weights_are_planned_with_masters_of_four_bytes():
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    found = plan(config, dtype=torch.float32, delta=0.3, residents="int8", micro_batch=MicroBatch(1, 16, True, "plain"))
    assert found.residents.host_bytes["masters"] == 4 * found.bytes["resident_codes"]
