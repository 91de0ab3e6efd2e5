"""A checkpoint proves itself: every file, every kind of damage."""

import json

import pytest

from checkpoint_files import write_checkpoint
from misa_engine.trainer import completeness, manifest
from misa_engine.trainer.manifest import MANIFEST

FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-1")
    manifest.write_manifest(tmp_path / "checkpoint-1", 1)
    folder = write_checkpoint(tmp_path / "checkpoint-2")
    (folder / "sub").mkdir()
    (folder / "sub" / "extra.txt").write_text("nested")
    manifest.write_manifest(folder, 2)
    return folder


def test_a_whole_checkpoint_is_whole_and_lists_everything_but_the_manifest(checkpoint):
    assert manifest.why_damaged(checkpoint) is None and completeness.why_incomplete(checkpoint) is None
    listed = json.loads((checkpoint / MANIFEST).read_text())
    assert set(listed["files"]) == {*FILES, "sub/extra.txt"} and listed["step"] == 2


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_found_and_the_last_good_one_is_taken(checkpoint, name):
    file = checkpoint / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert name in str(manifest.why_damaged(checkpoint))
    found, lines = completeness.find_resume_point(checkpoint.parent)
    assert found == checkpoint.with_name("checkpoint-1")
    assert len(lines) == 1 and lines[0].startswith(f"checkpoint-2 is passed over: {name}")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_without_reading_the_others(checkpoint, name):
    (checkpoint / name).unlink()
    (checkpoint / "training_args.bin").write_bytes(b"no weights")
    assert completeness.why_incomplete(checkpoint) == f"{name} is missing"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"files": {}}', '{"files": {"a": 1}}', '{"files": {"../../x": {"bytes": 1, "sha256": ""}}}'],
)
def test_a_manifest_that_is_none_is_damage(checkpoint, content):
    (checkpoint / MANIFEST).write_text(content)
    assert completeness.why_incomplete(checkpoint) == f"{MANIFEST} is damaged"


def test_a_deeply_nested_manifest_or_state_is_damage_too(checkpoint):
    (checkpoint / MANIFEST).write_text('{"files":' * 100_000)
    assert completeness.why_incomplete(checkpoint) == f"{MANIFEST} is damaged"
    (checkpoint / "trainer_state.json").write_text("[" * 100_000)
    assert completeness.why_incomplete(checkpoint) == "trainer_state.json is damaged"


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "{}", '{"global_step": "4"}', '{"global_step": -1}'])
def test_a_state_that_says_no_step_is_damage(checkpoint, content):
    (checkpoint / MANIFEST).unlink()
    (checkpoint / "trainer_state.json").write_text(content)
    assert "trainer_state.json is damaged" in str(completeness.why_incomplete(checkpoint))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b"}}'])
def test_an_index_that_is_none_is_damage(checkpoint, content):
    (checkpoint / MANIFEST).unlink()
    (checkpoint.parent / "checkpoint-1" / MANIFEST).unlink()
    (checkpoint / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is damaged" in str(completeness.why_incomplete(checkpoint))


def test_without_any_manifest_older_checkpoints_are_judged_by_their_files(checkpoint):
    (checkpoint / MANIFEST).unlink()
    assert completeness.why_incomplete(checkpoint) == f"{MANIFEST} is missing, which is written last"
    (checkpoint.parent / "checkpoint-1" / MANIFEST).unlink()
    assert completeness.why_incomplete(checkpoint) is None
    (checkpoint / "scheduler.pt").unlink()
    assert completeness.why_incomplete(checkpoint) == "scheduler.pt is missing"
