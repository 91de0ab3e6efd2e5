"""``misa sweep``: what is searched, the paper's ranges and the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="misa sweep needs optuna: pip install 'misa_engine[sweep]'")

from misa_engine.sweep.space import PAPER, Dimension, parse_space
from sweep_studies import settings

pytest_plugins = ["sweep_studies"]


def test_the_papers_ranges_are_its_search_ranges_and_settings() -> None:
    """Learning rate and η are its search ranges; the others are ours and hold its δ, its T and the code's batch."""
    assert (PAPER["learning_rate"].low, PAPER["learning_rate"].high, PAPER["learning_rate"].log) == (1e-6, 2e-4, True)
    assert PAPER["eta"].choices == (0.1, 0.5, 1.0)
    for name, setting in (("delta", 0.03), ("inner_steps", 50), ("batch", 16)):
        assert PAPER[name].contains(setting) and PAPER[name].source.startswith("ours")
    assert all("paper" in PAPER[name].source for name in ("learning_rate", "eta"))
    found = parse_space([], ("learning_rate", "eta", "delta", "inner_steps"), 8)
    assert [space.name for space in found] == ["learning_rate", "eta", "delta", "inner_steps", "batch"]


def test_ranges_are_read_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text("learning_rate: 1e-5..1e-4\nrest: [none, sign]\neta:\n")
    known = ("learning_rate", "eta", "delta", "inner_steps", "rest", "weight_decay", "bf16")
    texts = [
        str(tmp_path / "space.yaml"),
        "delta=0.01..0.03",
        "inner_steps=10..200:linear",
        "bf16=true,false",
        "batch=4,8",
    ]
    spaces = {space.name: space for space in parse_space(texts, known, 4)}
    assert spaces["learning_rate"].log and spaces["learning_rate"].high == 1e-4
    assert not spaces["delta"].log and not spaces["delta"].whole, "a factor of 3 is not searched in logarithms"
    assert spaces["inner_steps"].whole and not spaces["inner_steps"].log
    assert spaces["rest"].choices == ("none", "sign") and spaces["bf16"].choices == (True, False)
    assert spaces["eta"] is PAPER["eta"] and spaces["batch"].choices == (4, 8)
    assert [parse_space([space.describe()], known, 4)[0].to_dict() for space in spaces.values()] == [
        space.to_dict() for space in spaces.values()
    ]


def test_batch_is_micro_batch_times_accumulation() -> None:
    about = settings(Dimension("batch", choices=(8, 16)))
    assert about.options({"batch": 16, "eta": 0.5})["gradient_accumulation_steps"] == 2
    assert "batch" not in about.options({"batch": 16})
    assert parse_space(["batch"], (), 16)[0].choices == (16, 32)
    assert parse_space(["batch"], (), 6)[0].choices == (6, 12, 24), "none of the paper's is a multiple of 6"
