"""``misa plan --gpus``: what the solver chooses for several cards, and what is refused."""

from __future__ import annotations

import json

import pytest

from misa_engine.cli.main import main


def test_what_is_chosen_for_several_cards_fits_with_the_exchanged_gradient(capsys):
    words = ["plan", "--model", "tinyllama", "--delta", "0.03", "--json"]

    def told(*more: str) -> dict:
        assert main([*words, *more]) == 0
        return json.loads(capsys.readouterr().out)

    one = told("--state_dtype", "float32", "--length", "512", "--batch", "1", "--residents", "none")
    limit = ("--max_vram_gb", f"{one['total_bytes'] / 2**30 + 1e-4:.5f}", "--length", "512", "--batch", "1")
    assert told(*limit)["state_dtype"] == "float32"
    several = told(*limit, "--gpus", "2")
    assert several["fits"] and several["state_dtype"] == "int8", "with float32 moments one gradient more has no room"
    assert "residents" not in several or several["residents"] is None
    assert several["command"].startswith("torchrun --nproc_per_node 2 -m misa_engine train ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "1"], "at least 2; for one leave it out"),
        (["--gpus", "2", "--sharded", "--residents", "fp8"], "--residents fp8 with --sharded: masters on the host"),
        (["--shard_state"], "--shard_state is of --gpus with a whole model on each card"),
        (["--gpus", "2", "--sharded", "--shard_state"], "with --sharded they are divided anyway"),
    ],
    ids=str,
)
def test_what_does_not_train_on_several_cards_is_not_planned(words, said, capsys):
    assert main(["plan", "--model", "tinyllama", *words]) == 2
    assert said in capsys.readouterr().err


def test_cards_that_share_the_state_hold_a_part_of_it_and_send_the_weights(capsys):
    words = ["plan", "--model", "tinyllama", "--length", "512", "--rest", "none", "--gpus", "4"]
    assert main([*words, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main([*words, "--json", "--shard_state"]) == 0
    parts = json.loads(capsys.readouterr().out)
    for category in ("first_moment", "second_moment", "residual_bits"):
        quarter = whole["bytes"][category] / 4
        assert quarter <= parts["bytes"][category] <= 1.01 * quarter
    assert parts["bytes"]["gradients"] == whole["bytes"]["gradients"]
    sent, weights = whole["replicas"]["sent_bytes"], parts["replicas"]["weight_bytes"]
    assert weights == parts["replicas"]["step_bytes"] == whole["replicas"]["step_bytes"]
    assert parts["replicas"]["sent_bytes"] == sent + weights * 3 // 4
    assert main([*words, "--shard_state", "--max_vram_gb", "6"]) == 0
    said = capsys.readouterr().out
    assert "each keeps 1/4 of moments and residual bits" in said and "--shard_state true" in said
