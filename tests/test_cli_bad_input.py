"""``misa``: what the user got wrong is one line, exit 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_place import weights
from misa_engine.cli.main import main

pytest_plugins = ["cli_place"]


def bad(expected: str, *words: str, **options: Any) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    return expected, words, options


BAD = {
    "no model": bad("needs --model_name_or_path", model_name_or_path=None),
    "no data": bad("needs --dataset", dataset=None),
    "no output": bad("needs --output_dir", output_dir=None),
    "model directory missing": bad("model directory ./no/model does not exist", model_name_or_path="./no/model"),
    "not a model directory": bad("config.json is missing", model_name_or_path="{place}"),
    "an encoder": bad("'bert' is an encoder", model_name_or_path="{place}/encoder"),
    "model is a file": bad("is a file", model_name_or_path="{place}/data.jsonl"),
    "data missing": bad("does not exist", dataset="no.jsonl"),
    "messages without template": bad("no chat template", dataset="{place}/chat.jsonl"),
    "template missing": bad("x.jinja does not exist", "--chat_template_path", "x.jinja", dataset="{place}/chat.jsonl"),
    "budget too small": bad("delta", delta=0.001),
    "pattern that matches nothing": bad("lm_haed", "--always_train", "lm_haed"),
    "unknown family": bad("lama", "--family", "lama"),
    "too long for the model": bad("--max_length 4096 is more than the model's 128 positions", max_length=4096),
    "nothing left": bad("no sample of the training data is left: with max_length=5", max_length=5),
    "float16": bad("Use --dtype bfloat16", dtype="float16"),
    "odd dtype": bad("--dtype must be bfloat16, float32 or auto", dtype="int8"),
    "completions of a book": bad("needs prompts and completions", "--completion_only_loss", dataset="{place}/book.txt"),
    "nothing to resume": bad("no complete checkpoint", "--resume_from_checkpoint"),
    "checkpoint missing": bad("no such folder", resume_from_checkpoint="nowhere/checkpoint-2"),
    "assistant loss on prompts": bad("not conversational", "--assistant_only_loss"),
    "unknown reporter": bad("nonsense", report_to="nonsense"),
    "output is a file": bad("is a file", output_dir="{place}/data.jsonl"),
    "output is the model": bad("is also the input", output_dir="{place}/model"),
    "streaming a file": bad("is on this machine already", "--dataset_streaming"),
    "dtype by another way": bad("leave out 'dtype'", model_init_kwargs='{{"dtype": "float16"}}'),
    "broken template": bad(
        "the chat template cannot write the data: no hello",
        dataset="{place}/chat.jsonl",
        chat_template_path="{place}/broken.jinja",
    ),
    "split of a file": bad("has no split 'test'", eval_split="test"),
    "eos token": bad("eos_token", eos_token="<nothing>"),
    "no accumulation": bad("--gradient_accumulation_steps must be at least 1; got 0", gradient_accumulation_steps=0),
    "no batch": bad("--per_device_train_batch_size must be at least 1", per_device_train_batch_size=-1),
    "deep options": bad("--config_overrides needs JSON", config_overrides="[" * 100_000),
    "output is a link to nothing": bad("is a link to /no/such/place, which is gone", output_dir="{place}/gone"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_exit_2_and_nothing_written(
    name: str, flags: Callable[..., list[str]], workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, words, options = BAD[name]
    options = {
        key: value.format(place=workplace) if isinstance(value, str) else value for key, value in options.items()
    }
    before = sorted(workplace.rglob("*"))
    capsys.readouterr()
    assert main(flags(*words, **options)) == 2
    shown = capsys.readouterr()
    assert expected in shown.err and shown.err.startswith("misa: error: ")
    assert "Traceback" not in shown.err and len(shown.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert sorted(workplace.rglob("*")) == before


def test_float16_checkpoint_damaged_or_partial_weights_are_refused(
    flags: Callable[..., list[str]], workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    copy = tmp_path / "copy"
    shutil.copytree(workplace / "model", copy)

    def message() -> str:
        assert main(flags(model_name_or_path=copy)) == 2
        return capsys.readouterr().err

    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    assert "stored in float16" in message() and not (tmp_path / "out").exists()
    (copy / "config.json").write_text(json.dumps(config))
    tensors = weights(copy)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the tensors" in message()
    whole = (workplace / "model" / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in message()
    (copy / "model.safetensors").unlink()
    assert "holds no weights" in message()
    (copy / "config.json").write_text("{")
    assert "not valid JSON" in message() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        "[]",
        "3",
        "[" * 100_000,
        '{"model_type": 7}',
        {"model_type": "no_such_model"},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"vocab_size": None},
        {"rope_parameters": [1, 2]},
    ],
    ids=lambda change: str(change)[:24],
)
def test_a_nonsense_configuration_is_one_line_that_names_the_model(
    flags: Callable[..., list[str]], workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    copy = Path(shutil.copytree(workplace / "model", tmp_path / "copy"))
    if isinstance(change, dict):
        change = json.dumps({**json.loads((copy / "config.json").read_text()), **change})
    (copy / "config.json").write_text(change)
    capsys.readouterr()
    assert main(flags(model=copy, model_name_or_path=None)) == 2
    shown = capsys.readouterr().err
    assert str(copy) in shown and len(shown.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_and_pickles_are_refused_without_bad_advice(
    flags: Callable[..., list[str]], workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    copy = Path(shutil.copytree(workplace / "model", tmp_path / "copy"))
    tensors = weights(copy)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 2] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert main(flags(model_name_or_path=copy)) == 2
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinite numbers" in capsys.readouterr().err
    (copy / "model.safetensors").unlink()
    torch.save({"weights": Path("anything")}, copy / "pytorch_model.bin")  # a class that only unsafe loading reads
    assert main(flags(model_name_or_path=copy)) == 2
    shown = capsys.readouterr().err
    assert "pytorch_model" in shown and "weights_only" not in shown and len(shown.strip().splitlines()) == 1


def test_subprocess_exits_2_without_a_traceback(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "misa_engine", *flags(delta=1.5)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "delta is the share" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_command_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "Did you mean train?" in capsys.readouterr().err
    assert main([]) == 2
    assert "usage: misa" in capsys.readouterr().out


def test_other_failures_exit_1_in_one_line_unless_debug(
    flags: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def boom(*args: Any, **kwargs: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("misa_engine.cli.train.train", boom)
    assert main(flags()) == 1
    shown = capsys.readouterr().err
    assert shown == "misa: failed: TypeError: a bug\n(--debug shows where)\n"
    assert main(flags("--debug")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_demo_takes_an_output_directory_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import types

    calls: list[dict] = []

    def run_demo(**options: Any) -> int:
        calls.append(options)
        return 0

    monkeypatch.setitem(sys.modules, "misa_engine.cli.demo", types.SimpleNamespace(run_demo=run_demo))
    assert main(["train", "--demo"]) == main(["train", "--demo", "--output_dir", "x"]) == 0
    assert calls[0] == {} and str(calls[1]["output_dir"]) == "x"
    assert main(["train", "--demo", "--delta", "0.1"]) == 2
    assert "takes --output_dir" in capsys.readouterr().err
