from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from checkpoint_files import write_checkpoint
from misa_engine.trainer import checkpoints, completeness, manifest
from misa_engine.trainer.checkpoints import CheckpointError


def value_of(checkpoint: Path) -> float:
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)["value"]


def test_last_complete_checkpoint_is_the_highest_step_not_the_last_name(tmp_path):
    for step in (900, 1000, 95):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-2000").write_text("a file")
    assert completeness.find_last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"
    assert completeness.find_last_complete_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_with_a_file_cut_short_is_passed_over(tmp_path, file):
    write_checkpoint(tmp_path / "checkpoint-1")
    damaged = write_checkpoint(tmp_path / "checkpoint-2") / file
    damaged.write_bytes(damaged.read_bytes()[:-3])
    assert file in str(completeness.why_incomplete(tmp_path / "checkpoint-2"))
    assert completeness.find_last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_missing_files_shards_and_marks_are_named(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1")
    assert completeness.why_incomplete(checkpoint) is None
    (checkpoint / "checkpoint-is-incomplete.txt").touch()
    assert "checkpoint-is-incomplete" in str(completeness.why_incomplete(checkpoint))
    (checkpoint / "checkpoint-is-incomplete.txt").unlink()
    weights = (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"weight": weights.name, "other": "model-00002-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is missing" in str(completeness.why_incomplete(checkpoint))
    shutil.rmtree(checkpoint)
    assert completeness.why_incomplete(checkpoint) == "no such folder"


def test_a_published_checkpoint_replaces_one_of_the_same_step(tmp_path):
    final = write_checkpoint(tmp_path / "checkpoint-3", 1.0)
    with checkpoints.staging(final, tmp_path) as staged:
        staged.rmdir()
        write_checkpoint(staged, 2.0)
        assert value_of(final) == 1.0
        checkpoints.publish(staged, final)
    assert value_of(final) == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


class Killed(BaseException):
    """SIGKILL leaves no time for finally: the test raises this and looks at the disk before anything is tidied."""


def test_a_kill_at_any_file_system_call_leaves_a_good_checkpoint(tmp_path, monkeypatch):
    """Saves checkpoint 3 over an older 3, rotating 1 away, and dies at the k-th change of the disk for every k."""

    def save(run_dir: Path) -> None:
        final = run_dir / "checkpoint-3"
        staged = run_dir / checkpoints.STAGING / final.name
        write_checkpoint(staged, 30.0)
        checkpoints.publish(staged, final)
        checkpoints.rotate(run_dir, 2, keep=[final])

    real = {name: getattr(os, name) for name in ("replace", "rmdir", "unlink", "fsync", "open", "mkdir")}
    total = 0
    for budget in range(200):
        run_dir = tmp_path / str(budget)
        for step, value in ((1, 1.0), (2, 2.0), (3, 3.0)):
            write_checkpoint(run_dir / f"checkpoint-{step}", value)
        left = [budget]

        def counted(name, left=left):
            def call(*args, **kwargs):
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, counted(name))
            try:
                save(run_dir)
                finished = True
            except Killed:
                finished = False
        checkpoints.recover(run_dir)
        last = completeness.find_last_complete_checkpoint(run_dir)
        assert last is not None and last.name == "checkpoint-3" and value_of(last) in (3.0, 30.0), budget
        for checkpoint in completeness.list_checkpoints(run_dir):
            assert completeness.why_incomplete(checkpoint) is None, (budget, checkpoint)
        assert not (run_dir / checkpoints.STAGING).exists()
        shutil.rmtree(run_dir)
        if finished:
            total = budget
            break
    assert total > 15  # the loop did reach the end of the save


def test_rotation_keeps_the_newest_written_and_the_best_even_when_older_steps_are_higher(tmp_path):
    for step in (10, 20, 30, 40):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    # resumed from 10 after 40 had been written: 20 is the newest
    checkpoints.rotate(tmp_path, 2, keep=[tmp_path / "checkpoint-20", tmp_path / "checkpoint-10"])
    assert [path.name for path in completeness.list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20"]
    checkpoints.rotate(tmp_path, None, keep=[])
    checkpoints.rotate(tmp_path, 1, keep=[tmp_path / "checkpoint-20"])
    assert [path.name for path in completeness.list_checkpoints(tmp_path)] == ["checkpoint-20"]


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError(
        "[enforce fail at inline_container.cc:868] . PytorchStreamWriter failed writing file data/0: file write failed"
    ),
    RuntimeError("basic_ios::clear: iostream error"),
]


@pytest.mark.parametrize("failure", FULL, ids=["oserror", "quota", "safetensors", "torch", "torch-stream"])
def test_a_full_disk_removes_the_part_and_names_the_last_good_checkpoint(tmp_path, failure):
    good = write_checkpoint(tmp_path / "checkpoint-1")
    final = tmp_path / "checkpoint-2"
    with pytest.raises(CheckpointError) as caught, checkpoints.staging(final, tmp_path) as staged:
        (staged / "part").write_bytes(b"x" * 1000)
        try:
            raise failure
        except (OSError, SafetensorError, RuntimeError) as error:
            raise RuntimeError("wrapped by a library") from error
    assert f"--resume_from_checkpoint {good}" in str(caught.value)
    assert str(final) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_other_errors_pass_unchanged_but_leave_nothing_behind(tmp_path):
    with pytest.raises(KeyError), checkpoints.staging(tmp_path / "checkpoint-2", tmp_path) as staged:
        (staged / "part").touch()
        raise KeyError("a bug")
    with pytest.raises(KeyboardInterrupt), checkpoints.staging(tmp_path / "checkpoint-2", tmp_path) as staged:
        (staged / "part").touch()
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())


def test_the_real_writers_of_torch_and_safetensors_are_recognised_when_the_disk_refuses(tmp_path):
    """RLIMIT_FSIZE makes write() fail in the kernel, as a full disk does, for whichever library writes."""
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    big = torch.zeros(1 << 20)
    writers = {"torch": lambda path: torch.save(big, path), "safetensors": lambda path: save_file({"a": big}, path)}
    try:
        for name, write in writers.items():
            with pytest.raises(CheckpointError), checkpoints.staging(tmp_path / "checkpoint-2", tmp_path) as staged:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
                try:
                    write(staged / name)
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert not any(tmp_path.iterdir()), name
    finally:
        signal.signal(signal.SIGXFSZ, handler)


def test_a_new_model_replaces_the_files_of_an_old_one_with_another_number_of_shards(tmp_path):
    target, staged = tmp_path / "out", tmp_path / "staged"
    target.mkdir()
    staged.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json", "notes.txt"):
        (target / name).write_text("old")
    (target / "model.safetensors.index.json").write_text("old")
    (target / "checkpoint-5").mkdir()
    (staged / "model.safetensors").write_text("new")
    (staged / "config.json").write_text("new")
    checkpoints.install_files(staged, target)
    found = {path.name for path in target.iterdir()}
    assert found == {"model.safetensors", "config.json", "notes.txt", "checkpoint-5"}
    assert (target / "config.json").read_text() == "new"


def test_a_complete_checkpoint_that_was_not_yet_named_is_finished_and_a_damaged_one_is_not(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-1", 1.0)
    for step in (2, 3):
        staged = write_checkpoint(tmp_path / checkpoints.STAGING / f"checkpoint-{step}")
        manifest.write_manifest(staged, step)
    damaged = tmp_path / checkpoints.STAGING / "checkpoint-3" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert checkpoints.recover(tmp_path) == [tmp_path / "checkpoint-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert checkpoints.recover(tmp_path) == []


def test_later_checkpoints_are_set_aside_and_never_overwrite_earlier_ones_there(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"checkpoint-{step}", 1.0)
    assert checkpoints.set_aside_after(tmp_path, 3) is None
    assert checkpoints.set_aside_after(tmp_path, 1) == tmp_path / "abandoned-1"
    write_checkpoint(tmp_path / "checkpoint-2", 2.0)
    assert checkpoints.set_aside_after(tmp_path, 1) == tmp_path / "abandoned-2"
    assert [value_of(tmp_path / f"abandoned-{n}" / "checkpoint-2") for n in (1, 2)] == [1.0, 2.0]
    assert completeness.find_last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
