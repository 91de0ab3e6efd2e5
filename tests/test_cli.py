"""``misa train`` and ``misa report`` from the command line to what lies in the output directory."""

from __future__ import annotations

import errno
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

from cli_place import weights
from misa_engine.cli.main import main
from misa_engine.report.log import RunLog

pytest_plugins = ["cli_place"]


def test_dry_run_prints_units_budget_draw_and_memory_and_writes_nothing(
    flags: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags("--dry_run", output_dir=None, dtype="bfloat16")) == 0
    shown = capsys.readouterr().out
    assert "14 units in 2 layers" in shown and "at most 8,019 of 40,096 parameters train at a time" in shown
    assert "first draw: " in shown and "24 records" in shown and "nothing was written" in shown
    rows = dict(line.strip().rsplit("  ", 1) for line in shown.split("memory, ")[1].splitlines()[1:10] if "iB" in line)
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
    # without a rest rule, which moves what was never drawn, too
    assert main(flags("--gradient_checkpointing", "true", dtype="bfloat16", eval_fraction=0.2, rest="none")) == 0
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


def test_chat_from_scratch_compiled_by_layer(
    flags: Callable[..., list[str]], workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A chat template from a file, random weights of another size, per-layer compilation that says what it costs."""
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
    (line,) = [told for record in caplog.records if (told := record.getMessage()).startswith("--torch_compile: after")]
    assert "compiled anew (at most 64 graphs each)" in line and "copied into their slots" in line


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
