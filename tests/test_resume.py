"""``misa train`` goes on from a checkpoint: the right one, on one timeline, with the options that were asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from command import make_workplace, words
from misa_engine.cli.main import main
from misa_engine.report.log import RunLog
from misa_engine.trainer import checkpoints, completeness
from misa_engine.trainer.manifest import MANIFEST
from misa_engine.trainer.resume_options import OPTIONS_NAME

OPTIONS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 10}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("workplace")
    return make_workplace(place, place / "cache")


@pytest.fixture(scope="module")
def whole(workplace) -> Path:
    """A run of six steps, with checkpoints of steps 2, 4 and 6. To be copied, not touched."""
    assert main(words(workplace, workplace / "whole", **OPTIONS)) == 0
    return workplace / "whole"


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def go_on(workplace, run):
    """Resume the run; keyword arguments replace options."""

    def resume(wanted: object = "true", *more: str, **options) -> int:
        return main(words(workplace, run, "--resume_from_checkpoint", str(wanted), *more, **{**OPTIONS, **options}))

    return resume


def unfinish(run: Path, *steps: int) -> None:
    """As if the run had been killed before its end: no model, no end in the log, no checkpoints of these steps."""
    for step in steps:
        shutil.rmtree(run / f"checkpoint-{step}")
    (run / "model.safetensors").unlink()
    RunLog(run).truncate_after(max((4, *(s for s in (2, 4) if s not in steps))))


def snapshot(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def same_model(a: Path, b: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    return all(torch.equal(first[name], second[name]) for name in first)


# ---- which checkpoint ----


def test_a_finished_run_says_so_and_nothing_changes(go_on, run, capsys):
    before = snapshot(run)
    assert go_on() == 0
    assert "is finished: 6 of 6 steps" in capsys.readouterr().out
    assert snapshot(run) == before


def test_a_run_killed_before_its_model_was_saved_saves_it_without_another_step(go_on, run, whole, capsys):
    unfinish(run)
    assert go_on() == 0
    assert same_model(run, whole)
    assert json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
    assert [path.name for path in completeness.list_checkpoints(run)] == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]


def test_a_run_whose_model_could_not_be_saved_has_one_end_in_its_log(go_on, run, whole):
    (run / "model.safetensors").unlink()  # trained to the end and logged, then the disk was full
    assert go_on() == 0
    assert same_model(run, whole)
    assert [entry["type"] for entry in RunLog.read(run)].count("end") == 1


def test_a_damaged_checkpoint_is_passed_over_with_a_line_and_refused_by_name(go_on, run, whole, capsys):
    unfinish(run)
    damaged = run / "checkpoint-6" / "optimizer.pt"
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 4
    damaged.write_bytes(content)
    assert go_on(run / "checkpoint-6") == 2
    error = capsys.readouterr().err
    assert "optimizer.pt is damaged" in error and "The last whole one is" in error and "checkpoint-4" in error
    assert go_on() == 0
    shown = capsys.readouterr().out
    assert "checkpoint-6 is passed over: optimizer.pt is damaged" in shown and "goes on from step 4" in shown
    assert "first draw" not in shown
    assert same_model(run, whole)
    assert (run / "abandoned-1" / "checkpoint-6").is_dir()


def test_no_whole_checkpoint_at_all_is_refused_and_nothing_is_deleted(go_on, run, capsys):
    for step in (2, 4, 6):
        (run / f"checkpoint-{step}" / "model.safetensors").unlink()
    before = snapshot(run)
    assert go_on() == 2
    assert "model.safetensors is missing" in capsys.readouterr().err
    assert snapshot(run) == before


def test_resuming_from_an_older_checkpoint_leaves_one_timeline(go_on, run, whole, capsys):
    assert go_on(run / "checkpoint-2", learning_rate=2e-3) == 0
    assert "goes on from step 2" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "abandoned-1").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert not same_model(run, whole)
    second = load_file(run / "checkpoint-6" / "model.safetensors")
    first = load_file(run / "abandoned-1" / "checkpoint-6" / "model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert go_on(learning_rate=2e-3) == 0
    assert "is finished" in capsys.readouterr().out


def test_checkpoints_without_a_manifest_still_load_and_are_called_unverified(go_on, run, whole, capsys):
    unfinish(run, 6)
    for step in (2, 4):
        for name in (MANIFEST, OPTIONS_NAME):
            (run / f"checkpoint-{step}" / name).unlink()
    assert go_on() == 0
    assert f"checkpoint-4 has no {MANIFEST}" in capsys.readouterr().out
    assert same_model(run, whole)


@pytest.mark.parametrize("moment", ["between the renames", "before the first"])
def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(go_on, run, whole, workplace, moment, capsys):
    unfinish(run, 2, 6)
    staging = run / checkpoints.STAGING
    staging.mkdir()
    if moment == "between the renames":
        os.replace(run / "checkpoint-4", staging / "replaced-checkpoint-4")
    else:
        os.replace(run / "checkpoint-4", staging / "checkpoint-4")  # whole and listed, not yet named
    command = words(workplace, run, "--overwrite_output_dir", **OPTIONS)
    assert main(command) == 2
    assert "has now been restored" in capsys.readouterr().err
    assert completeness.why_incomplete(run / "checkpoint-4") is None and not staging.exists()
    assert go_on() == 0
    assert same_model(run, whole)


# ---- with which options ----


def test_what_is_given_again_takes_effect_and_is_named(go_on, run, caplog):
    unfinish(run, 6)
    with caplog.at_level("WARNING"):
        assert go_on(learning_rate=5e-4, lr_scheduler_type="constant", weight_decay=0.1, max_steps=5) == 0
    said = "\n".join(record.getMessage() for record in caplog.records)
    for line in ("learning_rate: 0.001 then, 0.0005 now", "lr_scheduler_type: linear then, constant now",
                 "weight_decay: 0.0 then, 0.1 now", "max_steps: 6 then, 5 now"):  # fmt: skip
        assert f"from step 4 on: {line}" in said
    rates = {entry["step"]: entry["learning_rate"] for entry in RunLog.read(run) if "learning_rate" in entry}
    assert rates[5] == 5e-4 and rates[4] < 1e-3
    state = torch.load(run / "checkpoint-5" / "optimizer.pt", weights_only=True)
    assert state["param_groups"][0]["lr"] == 5e-4 and max(g["weight_decay"] for g in state["param_groups"]) == 0.1


def test_what_is_not_given_is_as_the_run_was_started(workplace, run, whole, capsys):
    unfinish(run, 6)
    options = dict.fromkeys(("delta", "inner_steps", "max_steps", "learning_rate", "per_device_train_batch_size"))
    resume = ("--resume_from_checkpoint", "true")
    assert main(words(workplace, run, *resume, **{**OPTIONS, **options})) == 0
    assert same_model(run, whole)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"per_device_train_batch_size": 1}, "sequences of a step: 2 then, 1 now"),
        ({"gradient_accumulation_steps": 2}, "sequences of a step: 2 then, 4 now"),
        ({"seed": 5}, "seed: 42 then, 5 now"),
        ({"max_length": 16}, "max_length: 128 then, 16 now"),
        ({"optimizer": "adamw"}, "optimizer: misa then, adamw now"),
        ({"dataset": "other"}, "training data: 24 samples"),
        ({"delta": 0.4}, "delta: 0.2 in the checkpoint, 0.4 here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_move_the_data_is_refused_by_name(go_on, run, workplace, options, text, capsys):
    unfinish(run, 6)
    if "dataset" in options:
        other = run.parent / "other.jsonl"
        other.write_text((workplace / "data.jsonl").read_text().replace('"completion": "', '"completion": "x'))
        options = {"dataset": other}
    before = snapshot(run)
    assert go_on(**options) == 2
    assert text in capsys.readouterr().err
    assert snapshot(run) == before


def test_the_same_batch_in_other_pieces_may_go_on(go_on, run):
    unfinish(run, 6)
    assert go_on(per_device_train_batch_size=1, gradient_accumulation_steps=2) == 0


# ---- signals ----


@pytest.fixture
def signal_at(monkeypatch):
    """Raise a signal in this process during the update of a step."""
    from misa_engine.engine.optimizer import MISA

    step = MISA.step

    def at(number: int, signalled: signal.Signals, times: int = 1) -> None:
        def signalling(self, *args, **kwargs):
            if self.total_steps == number - 1:
                for _ in range(times):
                    signal.raise_signal(signalled)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(MISA, "step", signalling)

    return at


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_saves_says_how_far_it_came_and_resumes_exactly(
    workplace, whole, tmp_path, signal_at, monkeypatch, name, code, capsys
):
    before = signal.getsignal(getattr(signal, name))
    signal_at(3, getattr(signal, name))
    command = words(workplace, tmp_path / "out", **{**OPTIONS, "save_strategy": "no"})
    assert main(command) == code
    error = capsys.readouterr().err
    assert "stopped at 3/6, resume with --resume_from_checkpoint true" in error and "checkpoint-3" in error
    assert not (tmp_path / "out" / "model.safetensors").exists()  # nothing that looks like a finished run
    assert signal.getsignal(getattr(signal, name)) is before
    monkeypatch.undo()
    assert main([*command, "--resume_from_checkpoint"]) == 0
    assert same_model(tmp_path / "out", whole)


def test_the_checkpoint_of_transformers_own_signal_handler_is_taken_over(
    workplace, tmp_path, signal_at, monkeypatch, capsys
):
    signal_at(3, signal.SIGTERM)
    command = words(workplace, tmp_path / "out", "--enable_jit_checkpoint", **{**OPTIONS, "save_strategy": "no"})
    assert main(command) == 143
    shown = capsys.readouterr()
    assert "misa train saves a checkpoint at a signal anyway" in shown.out
    assert "stopped at 3/6" in shown.err and not (tmp_path / "out" / "model.safetensors").exists()


def test_asked_twice_it_stops_at_once_and_the_same_command_starts_anew(
    workplace, whole, tmp_path, signal_at, monkeypatch, capsys
):
    signal_at(1, signal.SIGTERM, times=2)
    command = words(workplace, tmp_path / "out", **{**OPTIONS, "save_strategy": "no"})
    assert main(command) == 143
    assert "no checkpoint was saved yet, the same command starts anew" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    monkeypatch.undo()
    assert main(command) == 0
    assert same_model(tmp_path / "out", whole)


# ---- two runs ----


def test_a_second_run_in_the_directory_exits_2_and_touches_nothing(go_on, run, capsys):
    fcntl = pytest.importorskip("fcntl")
    before = snapshot(run)
    with open(run / ".misa_lock", "w") as other:  # another process would hold it in the same way
        other.write('{"pid": 4711, "since": "2026-01-01 00:00:00"}')
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        assert go_on("true", "--overwrite_output_dir") == 2
        assert "in use by another run (process 4711" in capsys.readouterr().err
        assert {**before, ".misa_lock": (run / ".misa_lock").read_bytes()} == snapshot(run)
