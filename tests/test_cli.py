from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from misa_engine.cli.main import main
from misa_engine.report.log import RunLog
from models import TINY

RECORDS = [
    {"instruction": f"Add {i} and 1.", "input": "Be brief." if i % 2 else "", "output": f"It is {i + 1}."}
    for i in range(24)
]


@pytest.fixture(scope="session", autouse=True)
def log_handlers_of_the_session() -> None:
    """Import these before any test captures stderr: their log handlers keep the stream that they find."""
    import transformers.utils.logging
    import trl  # noqa: F401

    transformers.utils.logging.get_logger("transformers")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte tokenizer, data in several shapes, and a cache of its own."""
    import datasets
    from transformers import ByT5Tokenizer

    place, cache = tmp_path_factory.mktemp("cli"), tmp_path_factory.mktemp("cache")
    datasets.config.HF_DATASETS_CACHE = cache
    os.environ["HF_DATASETS_CACHE"] = str(cache)  # of subprocesses
    model: Any = TINY["llama"](vocab_size=384, max_position_embeddings=128)
    model.save_pretrained(place / "model")
    ByT5Tokenizer().save_pretrained(place / "model")
    (place / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    chat = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    (place / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    (place / "template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    (place / "gone").symlink_to("/no/such/place")
    (place / "broken.jinja").write_text("{{ raise_exception('no hello') }}")
    (place / "book.txt").write_text("\n\n".join(f"Paragraph {i}: " + "words and more words. " * 40 for i in range(20)))
    return place


@pytest.fixture
def flags(workplace: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """``misa train`` on the tiny model; keyword arguments replace options, None leaves one out."""

    def make(*more: str, **options: Any) -> list[str]:
        values = {
            "model_name_or_path": workplace / "model",
            "dataset": workplace / "data.jsonl",
            "output_dir": tmp_path / "out",
            "delta": 0.2,
            "inner_steps": 2,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-3,
            "save_steps": 2,
            "logging_steps": 1,
            "gradient_checkpointing": "false",
            **options,
        }
        pairs = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
        return ["train", *pairs, *more]

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# ---- bad input, before anything is written ----


def bad(expected: str, *words: str, **options: Any) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    return expected, words, options


BAD = {
    "no model": bad("needs --model_name_or_path", model_name_or_path=None),
    "no data": bad("needs --dataset", dataset=None),
    "no output": bad("needs --output_dir", output_dir=None),
    "model directory missing": bad("model directory ./no/model does not exist", model_name_or_path="./no/model"),
    "not a model directory": bad("config.json is missing", model_name_or_path="{place}"),
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


# ---- runs ----


def test_dry_run_prints_units_budget_draw_and_memory_and_writes_nothing(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags("--dry_run", output_dir=None, dtype="bfloat16")) == 0
    shown = capsys.readouterr().out
    assert "14 units in 2 layers" in shown and "at most 8,019 of 40,096 parameters train at a time" in shown
    assert "first draw: " in shown and "24 records" in shown and "nothing was written" in shown
    rows = dict(line.strip().rsplit("  ", 1) for line in shown.split("memory, ")[1].splitlines()[1:8] if "iB" in line)
    assert "weights" in " ".join(rows) and "together" in " ".join(rows)
    assert list(tmp_path.iterdir()) == []
    assert main(flags("--dry_run", optimizer="adamw")) == 0
    assert "AdamW on all 40,096 parameters" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_run_trains_saves_evaluates_and_reports(
    flags: Callable[..., list[str]], workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The main job end to end, then what the output directory allows afterwards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("mine too")
    assert main(flags("--gradient_checkpointing", "true", dtype="bfloat16", eval_fraction=0.2)) == 0
    shown = capsys.readouterr().out
    assert "What trained" in shown and "loss on the evaluation data" in shown and "importance_map.png" in shown
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer_config.json", "misa_log.jsonl", "loss.png"} <= names
    assert {"checkpoint-4", "checkpoint-6"} <= names and "checkpoint-2" not in names
    entries = RunLog.read(out)
    losses = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    assert losses[0][0] == 0 and losses[-1][0] == 6 and losses[-1][1] < losses[0][1]
    assert [entry["step"] for entry in entries if entry["type"] == "switch"][0] == 0

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    AutoTokenizer.from_pretrained(out)
    start, end = weights(workplace / "model"), weights(out)
    changed = {name for name in start if not torch.equal(start[name].bfloat16(), end[name])}
    visited = {name for entry in entries if entry["type"] == "end" for name, n in entry["visits"].items() if n}
    assert changed and changed <= visited

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(flags()) == 2
    assert "holds another run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert main(flags("--overwrite_output_dir", delta=0.001)) == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before, "a refused run deletes nothing"
    assert main(flags("--overwrite_output_dir", model_name_or_path=out / "checkpoint-6")) == 2
    assert "would delete" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    (out / "loss.png").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "loss.png").exists() and "What trained" in capsys.readouterr().out

    assert main(flags("--overwrite_output_dir", max_steps=1, save_strategy="no")) == 0
    assert "deleted the run in" in capsys.readouterr().out
    assert not list(out.glob("checkpoint-*"))
    assert (out / "notes.txt").read_text() == "mine" and (out / "README.md").read_text() == "mine too"
    assert max(entry["step"] for entry in RunLog.read(out)) == 1


def test_overwriting_refuses_a_model_that_no_run_of_ours_wrote(
    flags: Callable[..., list[str]], workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(workplace / "model", tmp_path / "out")
    assert main(flags("--overwrite_output_dir")) == 2
    assert "somebody else's" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").exists()


KILLER = """
import os, signal, sys
from misa_engine.engine.optimizer import MISA
whole = MISA.step
def step(self, *args, **kwargs):
    if self.total_steps == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *args, **kwargs)
MISA.step = step
from misa_engine.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_run_resumes_to_the_same_bits(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_steps": 9, "save_steps": 3, "inner_steps": 2, "dtype": "bfloat16"}
    assert main(flags(output_dir=tmp_path / "whole", **options)) == 0
    command = flags(output_dir=tmp_path / "killed", **options)
    killed = [sys.executable, "-c", KILLER, *command, "--log_level", "info"]
    done = subprocess.run(killed, capture_output=True, text=True)
    assert done.returncode == -9 and (tmp_path / "killed" / "checkpoint-3").is_dir(), done.stderr
    assert "round 1 at step 1: left " in done.stderr and "of the budget" in done.stderr
    assert main(command) == 2
    assert main([*command, "--resume_from_checkpoint"]) == 0
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    draws = [
        [(entry["step"], entry["active"]) for entry in RunLog.read(tmp_path / run) if entry["type"] == "switch"]
        for run in ("whole", "killed")
    ]
    assert draws[0] == draws[1]

    capsys.readouterr()
    more = flags(output_dir=tmp_path / "killed", **{**options, "max_steps": 12, "delta": 0.4})
    assert main([*more, "--resume_from_checkpoint"]) == 2
    assert "delta" in capsys.readouterr().err
    elsewhere = flags(output_dir=tmp_path / "killed", **options)
    assert main([*elsewhere, "--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-6")]) == 2
    assert "does not belong to the run" in capsys.readouterr().err


def test_full_disk_and_ctrl_c_name_the_last_good_checkpoint(
    flags: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import Trainer

    from misa_engine.engine.optimizer import MISA

    save, step = Trainer._save_optimizer_and_scheduler, MISA.step

    def full(self: Trainer, output_dir: str) -> None:
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    assert main(flags()) == 1
    shown = capsys.readouterr().err
    assert "No space left" in shown and "checkpoint-2" in shown and "Traceback" not in shown
    assert not (tmp_path / "out" / "checkpoint-4").exists()
    monkeypatch.undo()

    def interrupt(self: MISA, *args: Any, **kwargs: Any) -> Any:
        if self.total_steps == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MISA, "step", interrupt)
    assert main(flags("--resume_from_checkpoint")) == 130
    shown = capsys.readouterr().err
    assert "misa: stopped at 5/6, resume with" in shown and "checkpoint-5" in shown and "Traceback" not in shown


def test_plain_text_is_packed_full_and_the_baseline_trains_everything(
    flags: Callable[..., list[str]], workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"dataset": workplace / "book.txt", "max_steps": 3, "save_strategy": "no"}
    assert main(flags(optimizer="adamw", eval_fraction=0.3, **options)) == 0
    assert "loss on the evaluation data" in capsys.readouterr().out
    start, end = weights(workplace / "model"), weights(tmp_path / "out")
    assert all(not torch.equal(start[name], end[name]) for name in start if "embed" not in name)
    run = RunLog.read(tmp_path / "out")
    assert run[0]["optimizer"] == "adamw"
    tokens = [entry["num_tokens"] for entry in run if entry.get("num_tokens")]
    assert tokens[0] == 2 * 128  # two sequences of the model's 128 positions, without padding


def test_chat_from_scratch_compiled_by_layer(flags: Callable[..., list[str]], workplace: Path, tmp_path: Path) -> None:
    """A chat template from a file, random weights of another size, per-layer compilation."""
    words = flags(
        "--from_scratch",
        "--torch_compile",
        dataset=workplace / "chat.jsonl",
        chat_template_path=workplace / "template.jinja",
        config_overrides='{"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 4}',
        torch_compile_backend="eager",
        max_steps=2,
        save_strategy="no",
    )
    assert main(words) == 0
    assert weights(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"].shape == (16, 16)
    assert (tmp_path / "out" / "chat_template.jinja").exists()


def test_report_without_a_run_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert main(["report"]) == 2
    assert main(["report", "--help"]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_yaml_alone_can_start_a_run(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags("--dry_run", output_dir=None)[1:-1]
    values = dict(zip((word.lstrip("-") for word in words[::2]), words[1::2], strict=True))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**values, "dry_run": True}))
    for spelling in (["--config", str(file)], [f"--config={file}"]):
        assert main(["train", *spelling]) == 0
        assert "at most 8,019 of 40,096" in capsys.readouterr().out
