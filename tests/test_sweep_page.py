"""The page of ``misa sweep``: whole without another file."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="misa sweep needs optuna: pip install 'misa_engine[sweep]'")

from misa_engine.sweep.command import sweep
from pages import Page
from sweep_studies import LAUNCH, results, settings

pytest_plugins = ["sweep_studies"]


def test_the_page_needs_no_other_file_and_shows_every_trial(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    about = settings(base={"seed": 3, "dataset": ["<data>&.jsonl"]})
    sweep(settings(), tmp_path / "a", 6, launch=LAUNCH, typed="misa sweep --output 'a b'")
    page = (tmp_path / "a" / "index.html").read_text()
    read = Page(page)
    assert read.open == [] and [load.partition(",")[0] for load in read.loads] == 4 * ["data:image/svg+xml;base64"]
    document = results(tmp_path / "a")
    assert len(read.tables["trials"]) == 1 + 6 and page.count('<tr class="best">') == 1
    assert {"best", "importance", "trials", "searched", "environment"} == set(read.tables)
    assert f"{document['best']['value']:.4f}" in page and "misa sweep --output &#x27;a b&#x27;" in page
    for name in ("torch", "optuna"):
        assert document["environment"][name] in page
    table = (tmp_path / "a" / "results.md").read_text()
    assert all(f"| {row['trial']} | " in table for row in document["trials"])

    sweep(about, tmp_path / "b", 1, launch=LAUNCH)
    page = (tmp_path / "b" / "index.html").read_text()
    assert "&lt;data&gt;&amp;.jsonl" in page and "no trial is complete" in page
    assert not (tmp_path / "b" / "best.yaml").exists()
