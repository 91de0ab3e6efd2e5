"""``misa train --residents``: from the early checks to the saved model, on a CPU with a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from command import make_workplace, words
from misa_engine import MISA
from misa_engine.cli.main import main
from misa_engine.cli.preview import memory_table, preview
from misa_engine.engine.residents import residents_of
from misa_engine.engine.residents.exact import exact_weights
from misa_engine.engine.residents.lookup import HostLookup
from misa_engine.errors import UserError
from misa_engine.method.config import MisaConfig
from misa_engine.report.log import RunLog
from misa_engine.trainer.loading import load_model, load_weights
from misa_engine.trainer.resident_check import TOLERANCE, ResidentLosses
from models import TINY
from resident_models import of, resting
from training import batches, loss_of

pytestmark = pytest.mark.filterwarnings("ignore")

EVALUATED: dict[str, Any] = {"eval_fraction": 0.2, "cold_start": "none"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("place"), tmp_path_factory.mktemp("cache"), torch.bfloat16)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def run(place: Path, out: Path, *more: str, **options: Any) -> int:
    return main(words(place, out, *more, **{"residents": "int8", "inner_steps": 2, "learning_rate": 1e-2, **options}))


# ---- a run ----


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> Path:
    """Eight steps with a checkpoint in the midst of a round, evaluation and all."""
    out = tmp_path_factory.mktemp("whole") / "out"
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 5, **EVALUATED}
    assert run(place, out, **options) == 0
    return out


def test_what_was_never_drawn_has_the_bits_of_the_input_file(place, whole):
    start, end = weights(place / "model"), weights(whole)
    log = RunLog.read(whole)
    drawn = {name for entry in log if entry["type"] == "switch" for name in entry["active"]}
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and changed <= drawn and changed != set(start)
    end_entry = log[-1]
    assert end_entry["type"] == "end" and end_entry["frozen"] == end_entry["unchanged_frozen"] > 0


def test_the_run_log_and_the_report_name_the_residents(whole, capsys):
    log = RunLog.read(whole)
    entry = next(entry for entry in log if entry["type"] == "run")
    assert entry["residents"]["format"] == "int8" and entry["residents"]["matrices"] == 14
    assert (
        abs(entry["residents"]["loss"] - entry["residents"]["exact_loss"]) < 0.02 and entry["residents"]["tokens"] > 50
    )
    sizes = next(entry["bytes"] for entry in log if entry["type"] == "memory")
    assert sizes["resident_codes"] * 2 == sizes["host_masters"] and sizes["resident_workspace"] > 0
    assert main(["report", str(whole)]) == 0
    assert "int8 residents" in capsys.readouterr().out


def test_the_saved_model_is_an_ordinary_one(whole):
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert model.dtype == torch.bfloat16 and residents_of(model) is None
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape[1] <= 6


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_makes_the_same_weights(place, whole, tmp_path, step):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for checkpoint in out.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    for file in (*out.glob("*.safetensors"),):
        file.unlink()
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 5, **EVALUATED}
    assert run(place, out, "--resume_from_checkpoint", "true", residents=None, **options) == 0  # as it was started
    one, other = weights(whole), weights(out)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_format_on_resume_is_named_and_takes_effect(place, whole, tmp_path, caplog):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "model.safetensors").unlink()
    options = {"max_steps": 9, "save_strategy": "no", **EVALUATED}
    assert run(place, out, "--resume_from_checkpoint", "true", residents="none", **options) == 0
    assert "residents: int8 then, none now" in caplog.text


def test_a_dry_run_says_what_rests_and_what_the_loss_is(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", "--dry_run", residents="int8_row") == 0
    shown = capsys.readouterr().out
    for said in (
        "14 matrices rest as int8_row",
        "outside the layers: lm_head.weight",
        "residents int8_row: loss",
        "with the exact weights",
        "the preset's rest rule row_norm is off",
        "rows are looked up on the host",
    ):
        assert said in shown
    assert not (tmp_path / "out").exists()


def test_max_vram_gb_counts_with_residents(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", max_vram_gb=2, max_length=64) == 0
    shown = capsys.readouterr().out
    assert "residents int8: 0.00 GiB of exact weights in host memory" in shown


def test_from_scratch_and_checkpointing(place, tmp_path):
    assert run(place, tmp_path / "out", "--from_scratch", residents="fp8", gradient_checkpointing="true") == 0


# ---- refused ----


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"residents": "int4"}, "--residents must be one of int8, fp8, int8_row or none"),
        ({"rest": "sign"}, "--residents int8 with --rest sign: the rule moves weights in place on the card"),
        ({"optimizer": "adamw"}, "AdamW trains all weights at once"),
        ({"resize_embeddings": "true"}, "--residents with --resize_embeddings"),
        ({"fsdp": "full_shard"}, "--residents with --fsdp"),
        ({"model_init_kwargs": '{"revision": "main"}'}, "--residents with --model_init_kwargs revision"),
    ],
)
def test_what_cannot_work_is_refused_by_name(place, tmp_path, capsys, options, said):
    assert run(place, tmp_path / "out", **options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_too_little_host_memory_is_one_line_before_anything_is_written(place, tmp_path, capsys, monkeypatch):
    from misa_engine.planner import host_memory

    monkeypatch.setattr(host_memory, "available_bytes", lambda: 1 << 20)
    assert run(place, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "keeps its exact weights in host memory" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- parts ----


def test_the_bound_on_the_loss_names_both_numbers():
    ResidentLosses("int8", 2.01, 2.0, 100).check()
    ResidentLosses("fp8", 2.08, 2.0, 100).check()
    with pytest.raises(UserError, match=r"from 2\.0000 to 2\.0500 on 100 tokens, by more than the 0\.0400"):
        ResidentLosses("int8", 2.05, 2.0, 100).check()
    with pytest.raises(UserError, match="nan"):
        ResidentLosses("int8_row", float("nan"), 2.0, 100).check()
    assert TOLERANCE.keys() == {"int8", "int8_row", "fp8"}


def test_a_model_that_8_bits_do_not_suit_stops_the_run(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(TOLERANCE, "int8", 0.0)
    assert run(place, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "this model does not bear 8 bits" in error and error.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_weights_are_streamed_through_the_workspace(dtype):
    model, plain = resting("int8", dtype), TINY["llama"]().to(dtype)
    plain.load_state_dict(model.state_dict())
    ids = next(batches())
    with torch.no_grad():
        rested = loss_of(model, ids)
        with exact_weights(of(model)):
            exact = loss_of(model, ids)
        again = loss_of(model, ids)
        assert torch.equal(exact, loss_of(plain, ids)) and torch.equal(rested, again) and not torch.equal(rested, exact)


def test_the_preview_counts_what_the_optimizer_holds():
    model = resting("int8", torch.bfloat16)
    config = MisaConfig(delta=0.3, rest="none", always_train=("model.layers.0.mlp.*", "*layers.1.*norm*"))
    shown = preview(model, config)
    plain = resting("int8", torch.bfloat16)
    optimizer = MISA(plain, config.altered(always_train=()))
    assert preview(resting("int8", torch.bfloat16), optimizer.config).endswith(memory_table(optimizer.memory()))
    assert "resident codes" in shown


def test_only_what_differs_is_written_when_weights_are_loaded(tmp_path):
    TINY["llama"]().bfloat16().save_pretrained(tmp_path)
    model = load_model(tmp_path, residents="int8", masters="mapped")
    other = TINY["llama"]().bfloat16()
    other.load_state_dict(model.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    with torch.no_grad():
        other.get_parameter(name).mul_(2)
        other.model.norm.weight.mul_(3)
    other.save_pretrained(tmp_path / "other")
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    ids = next(batches())
    before = of(model).expanded(name)
    load_weights(model, [tmp_path / "other/model.safetensors"])
    written = {name for name, parameter in model.named_parameters() if parameter._version != versions[name]}
    assert written == {name, "model.norm.weight"}
    assert torch.equal(of(model).expanded(name), 2 * before)
    assert torch.isfinite(loss_of(model, ids))


def test_the_embedding_is_looked_up_on_the_host_and_comes_back_when_it_trains():
    model = resting("int8")
    assert "model.embed_tokens.weight" in of(model).on_host
    sizes = of(model).bytes()
    assert sizes["host_embedding"] == model.model.embed_tokens.weight.nbytes
    optimizer = MISA(model, delta=0.3, rest="none", always_train=("*embed_tokens*",))
    assert "model.embed_tokens.weight" not in of(model).on_host and "host_embedding" not in optimizer.memory()
    tied = resting("int8", tie_word_embeddings=True)
    assert set(of(tied).on_host) == set(of(tied).names)


def test_rows_go_to_the_card_and_the_model_says_that_it_is_there():
    model, card = TINY["llama"](), torch.device("meta")
    HostLookup(model, "model.embed_tokens.weight", model.model.embed_tokens, card)
    assert model.device == card and type(model).__name__ == "LlamaForCausalLM"
    assert model.model.embed_tokens(torch.zeros(1, 3, dtype=torch.long)).device == card
    model.model.embed_tokens.to("meta")
    assert model.model.embed_tokens.weight.device.type == "cpu"


def test_every_option_of_residents_is_in_the_options_of_the_checkpoint(whole):
    stored = json.loads((whole / "checkpoint-3" / "misa_options.json").read_text())
    assert stored["free"]["residents"] == "int8"
