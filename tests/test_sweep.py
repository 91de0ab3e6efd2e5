"""``misa sweep``: what a study does with its trials, which are stand-ins for misa train here."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

pytest.importorskip("optuna", reason="misa sweep needs optuna: pip install 'misa_engine[sweep]'")

from misa_engine.errors import UserError
from misa_engine.sweep import study as studies
from misa_engine.sweep.command import sweep
from misa_engine.sweep.space import Dimension
from sweep_studies import LAUNCH, results, settings, states

pytest_plugins = ["sweep_studies"]
pytestmark = pytest.mark.usefixtures("quick")


def test_a_study_finds_the_best_settings_and_goes_on_where_it_ended(tmp_path: Path, capsys) -> None:
    out = tmp_path / "study"
    about = settings(start={"learning_rate": 1e-4, "eta": 1.0})
    assert sweep(about, out, 4, launch=LAUNCH, typed="misa sweep --trials 5") == 0
    first = results(out)
    assert states(out) == ["complete"] * 4
    assert first["trials"][0]["values"] == {"learning_rate": 1e-4, "eta": 1.0}, "the configuration as it is comes first"
    assert first["importance"] == {} and "4 complete trials" in first["importance_remark"]
    assert sweep(about, out, 11, launch=LAUNCH) == 0
    assert "goes on: 4 of 11 trials are there" in capsys.readouterr().out
    document = results(out)
    assert document["trials"][:4] == first["trials"] and len(document["trials"]) == 11
    values = [row["value"] for row in document["trials"]]
    best = document["best"]
    assert best["value"] == min(values) and document["trials"][best["trial"]]["value"] == best["value"]
    assert set(document["importance"]) == {"learning_rate", "eta"}
    assert sum(document["importance"].values()) == pytest.approx(1, abs=1e-3)
    assert document["importance"]["learning_rate"] > document["importance"]["eta"], "one moves the loss 20 times more"
    assert document["trials"][0]["peak_memory_bytes"] == 2**30 and document["trials"][0]["losses"][-1][0] == 30

    weights = sorted(path.parts[-3] for path in (out / "trials").rglob("model.safetensors"))
    assert weights == [f"{best['trial']:04}"], "only the best trial keeps its weights"

    settled = yaml.safe_load((out / "best.yaml").read_text())
    assert settled["learning_rate"] == best["values"]["learning_rate"] and settled["eta"] == best["values"]["eta"]
    assert settled["dataset"] == ["d.jsonl"] and settled["output_dir"] == str(out / "best")
    assert sweep(about, out, 11, launch=LAUNCH) == 0 and len(results(out)["trials"]) == 11


FAILURES = {
    1: "exit code 2: misa: error: delta is too small",
    2: "out of memory: misa: failed: the GPU is out of memory",
    3: "diverged: the held-out loss at step 18 is not a number",
    4: "killed by SIGKILL (the system may have run out of memory)",
}


def test_a_trial_that_fails_is_recorded_with_its_reason_and_the_study_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "s"
    out.mkdir()
    about = settings(Dimension("seed", choices=(0, *FAILURES)), base={"learning_rate": 1e-4})
    found = studies.Sweep(out, about, launch=LAUNCH)
    for seed in (*FAILURES, 0):
        found.study.enqueue_trial({"seed": seed})
    found.work(5)
    *failed, last = found.study.trials
    assert [trial.state.name for trial in failed] == ["FAIL"] * 4 and last.state.name == "COMPLETE"
    for trial, reason in zip(failed, FAILURES.values(), strict=True):
        assert trial.user_attrs["reason"].startswith(reason)
        assert not list((out / "trials" / f"{trial.number:04}").rglob("*.safetensors"))


def test_a_study_whose_trials_are_all_refused_stops_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="first 3 trials were all refused by misa train; the last: exit code 2: .*too small"
    ):
        sweep(settings(base={"seed": 1}), tmp_path / "s", 20, launch=LAUNCH)
    assert states(tmp_path / "s") == ["failed"] * 3


def test_runs_that_fall_behind_are_ended_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWEEP_PAUSE", "0.06")
    rates = tuple(1e-4 * 10**-power for power in (0, 0.1, 0.2, 0.3))
    good = Dimension("learning_rate", choices=(*rates, 1e-9))
    about = settings(good, pruner="median")
    out = tmp_path / "s"
    out.mkdir()
    found = studies.Sweep(out, about, launch=LAUNCH)
    for rate in (*rates, 1e-9):  # the worst comes when four are there to compare it with
        found.study.enqueue_trial({"learning_rate": rate})
    found.work(5)
    last = found.study.trials[4]
    assert last.state.name == "PRUNED" and last.user_attrs["reason"].startswith("fell behind: held-out loss")
    assert 2 <= len(last.user_attrs["losses"]) < 10
    assert [trial.state.name for trial in found.study.trials[:4]] == ["COMPLETE"] * 4


def test_a_damaged_study_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "s"
    sweep(settings(), out, 1, launch=LAUNCH)
    database = (out / "study.db").read_bytes()
    (out / "study.db").write_bytes(b"x" * 4096)
    with pytest.raises(UserError, match="study.db cannot be read"):
        sweep(settings(), out, 2, launch=LAUNCH)
    (out / "study.db").write_bytes(database)
    (out / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="sweep.json is damaged"):
        sweep(settings(), out, 2, launch=LAUNCH)
    (out / "sweep.json").unlink()
    with pytest.raises(UserError, match=r"sweep.json is missing beside study.db"):
        sweep(settings(), out, 2, launch=LAUNCH)
