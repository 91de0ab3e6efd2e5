"""``misa bench``: what is run, what the results hold, what is refused. Cases run in this process, on tiny shapes."""

import json
from pathlib import Path

import pytest
import torch

from in_process import Here, run_here
from misa_engine.bench import runner, suites
from misa_engine.bench.ledger import StepTimes
from misa_engine.bench.presets import PRESETS, Bench
from misa_engine.bench.training import by_phase
from misa_engine.bench.workload import rows
from misa_engine.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")

OWN_AND_ANY = ("misa bench out", "misa bench")
FIELDS = ("method", "step_time_s", "tokens_per_s", "peak_bytes", "trainable_parameters", "status")


@pytest.fixture
def here(monkeypatch):
    run_here(monkeypatch, "misa_engine.bench.runner")


@pytest.fixture
def results(here, tmp_path, capsys):
    def get(*words):
        code = main(["bench", *words, "--preset", "quick", "--output", str(tmp_path / "out")])
        return code, json.loads((tmp_path / "out" / "results.json").read_text()), capsys.readouterr().out

    return get


def test_throughput_gives_one_complete_result_a_method_with_page_and_pictures(results, tmp_path):
    code, document, printed = results("throughput", "--methods", "adamw,misa,misa-int8")
    assert code == 0
    assert [row["method"] for row in document["results"]] == ["adamw", "misa", "misa-int8"]
    for row in document["results"]:
        assert set(FIELDS) <= set(row) and row["status"] == "ok"
        assert set(row["step_time_s"]) == {"median", "p20", "p80"} and row["tokens_per_s"] > 0
        assert row["timed_steps"] == 8 and row["peak_bytes"] > 0
        assert {"forward", "backward", "step", "switch"} <= set(row["phases_s"])
    adamw, misa, eight = document["results"]
    assert misa["trainable_parameters"] < adamw["trainable_parameters"]  # embeddings and head are frozen
    assert misa["timed_switches"] >= 1 and "overhead" in misa and "overhead" not in adamw
    assert eight["optimizer_bytes"]["first_moment"] * 4 == misa["optimizer_bytes"]["first_moment"]
    assert {"hardware", "versions", "commit", "command", "date"} <= set(document["environment"])
    page = (tmp_path / "out" / "results.md").read_text()
    for name in ("time_and_memory.png", "phases.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") and name in page
    assert "misa-int8" in page and "misa-int8" in printed
    before = page
    readme = tmp_path / "README.md"
    readme.write_text("top\n<!-- misa bench: begin -->\nold\n<!-- misa bench: end -->\nbottom\n")
    assert main(["bench", "--render", str(tmp_path / "out" / "results.json"), "--into", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("top\n") and text.endswith("\nbottom\n") and "old" not in text
    assert "out/phases.png" in text and "| misa-int8 |" in text
    stored = str(tmp_path / "out" / "results.json")
    readme.write_text("".join(f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in OWN_AND_ANY))
    assert main(["bench", "--render", stored, "--into", str(readme)]) == 0  # markers of its folder come first
    own, anyone = readme.read_text().split("<!-- misa bench: begin -->")
    assert "| misa-int8 |" in own and anyone == "\nold\n<!-- misa bench: end -->\n"
    assert main(["bench", "--render", stored, "--into", str(tmp_path / "out" / "results.md")]) == 2
    assert main(["bench", "--render", str(tmp_path / "out" / "results.json")]) == 0
    assert (tmp_path / "out" / "results.md").read_text() == before


def test_a_method_with_options_is_a_row_of_its_own(results, tmp_path):
    named = ["misa", "misa:rest=sign:delta=0.2", "misa:state_dtype=int8", "misa-none:residents=int8", "lisa:lr=1e-3"]
    code, document, printed = results("throughput", "--methods", ",".join(named))
    assert code == 0 and [(row["method"], row["status"]) for row in document["results"]] == [(m, "ok") for m in named]
    misa, sign, eight, resting, _ = document["results"]
    assert sign["settings"]["misa"] == {"rest": "sign"} and sign["settings"]["delta"] == 0.2
    assert misa["settings"]["misa"] == {} and misa["settings"]["delta"] == 0.1
    assert sign["optimizer_bytes"]["first_moment"] > misa["optimizer_bytes"]["first_moment"]
    assert eight["optimizer_bytes"]["first_moment"] * 4 == misa["optimizer_bytes"]["first_moment"]
    assert resting["settings"]["residents"] == "int8" and "overhead" not in resting  # no copy without an optimizer
    page = (tmp_path / "out" / "results.md").read_text()
    assert "| misa:rest=sign:delta=0.2 |" in page and "held MiB" in page


def test_what_updates_inside_the_backward_pass_does_not_clip_with_options_either(results):
    code, document, printed = results("throughput", "--methods", "misa-backward:delta=0.2")
    assert code == 0 and document["results"][0]["status"] == "ok" and "without clipping" in printed


def test_a_profile_of_a_method_with_options_has_files_that_every_system_takes(here, tmp_path):
    words = ["--model", "tiny", "--length", "16", "--delta", "0.1", "--output", str(tmp_path / "out")]
    assert main(["profile", "--method", "misa:rest=sign", "--device", "cpu", *words]) == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"trace_misa_rest=sign.json.gz", "timeline_tiny_misa_rest=sign.png"} <= files


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("misa:rest=sing", "Did you mean 'sign'?"),
        ("misa:rezt=sign", "no option=value of MisaConfig. Did you mean rest?"),
        ("misa:rest", "no option=value of MisaConfig"),
        ("misa:rest_lr=-1", "rest_lr is a multiple of lr"),
        ("misa-none:rest_lr=0.5", "rest_lr"),
        ("misa:residents=int8:rest=sign", "leave out residents, or use rest='none'"),
        ("adamw:rest=sign", "options are MISA's, and adamw is none of its rules"),
        ("mesa:rest=sign", "unknown method 'mesa'. Did you mean"),
    ],
)
def test_options_of_a_method_are_checked_before_anything_runs(method, said, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["bench", "throughput", "--preset", "quick", "--methods", method, "--output", str(out)]) == 2
    assert said in capsys.readouterr().err and not out.exists()


def test_a_method_that_cannot_run_is_a_row_and_the_others_still_run(results, monkeypatch):
    monkeypatch.setattr("misa_engine.bench.baselines.installed", lambda package: package != "badam")
    code, document, printed = results("throughput", "--methods", "badam,misa")
    assert code == 0
    status = {row["method"]: row["status"] for row in document["results"]}
    assert status == {"badam": "missing: pip install badam", "misa": "ok"}
    assert "missing: pip install badam" in printed


def test_out_of_memory_is_a_row(results, monkeypatch):
    from misa_engine.bench.baselines import Method

    whole = Method.step

    def step(self, *args, **kwargs):
        if self.name == "adamw":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(Method, "step", step)
    _, document, _ = results("throughput", "--methods", "adamw,misa")
    assert [row["status"] for row in document["results"]] == ["out of memory", "ok"]


def test_every_method_sees_the_same_tokens_in_the_same_order(here, monkeypatch):
    from misa_engine.bench.baselines import Method

    seen = {}
    whole = Method.step

    def step(self, micro_batches, *args):
        seen.setdefault(self.name, []).extend(micro_batches)
        return whole(self, micro_batches, *args)

    monkeypatch.setattr(Method, "step", step)
    bench = Bench(**{**PRESETS["quick"], "methods": ("adamw", "misa"), "suite": "throughput", "steps": 3})
    for case in suites.step_cases(bench, bench.methods):
        Here("cpu").run(case, 60)
    n = min(map(len, seen.values()))
    assert n >= bench.warm_up + bench.steps
    assert all(torch.equal(a, b) for a, b in zip(seen["adamw"][:n], seen["misa"][:n], strict=True))


# ---- parts ----


def test_a_switch_is_what_its_step_takes_longer_than_the_others():
    phases = [{"forward": 1.0, "step": 2.0}, {"forward": 1.2, "step": 2.2}, {"forward": 1.1, "step": 5.1}]
    times = [StepTimes(0, switched, one) for one, switched in zip(phases, (False, False, True), strict=True)]
    found = by_phase(times)
    assert found == {"forward": pytest.approx(1.1), "step": pytest.approx(2.1), "switch": pytest.approx(3.0)}


def test_stored_results_of_the_repository_render_as_they_are(tmp_path, capsys):
    root = Path(__file__).resolve().parents[1]
    for name in ("cpu/results.json", "cpu_rest/results.json", "kernels_cpu.json"):
        (tmp_path / Path(name).name).write_text((root / "bench" / "results" / name).read_text())
        assert main(["bench", "--render", str(tmp_path / Path(name).name)]) == 0
        page = (tmp_path / Path(name).name).with_suffix(".md").read_text()
        assert page == (root / "bench" / "results" / name).with_suffix(".md").read_text()


def test_a_run_without_any_result_has_failed(results):
    code, document, printed = results("throughput", "--methods", "misa", "--delta", "0.01")
    assert code == 1
    assert document["results"][0]["status"].startswith("failed: ValueError: delta=0.01 allows 8,367")


def test_the_default_delta_follows_a_small_models_largest_matrix(here, tmp_path, capsys):
    words = ["bench", "throughput", "--preset", "cpu", "--model", "tiny", "--length", "16", "--steps", "5"]
    assert main([*words, "--methods", "misa", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "tiny: its largest matrix needs --delta 0.05" in printed
    assert "5 timed steps: a switch every 2 of them" in printed
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = document["results"]
    assert (row["timed_steps"], row["settings"]["inner_steps"]) == (5, 2) and row["timed_switches"] >= 2


def test_held_out_text_is_from_other_documents():
    train, held_out = rows("stdlib", 64, seed=1)
    assert train.shape[1] == held_out.shape[1] == 64 and len(train) > 5 * len(held_out) > 0
    assert int(train.min()) >= 3 and int(train.max()) < 259
    again, _ = rows("stdlib", 64, seed=1)
    assert torch.equal(train, again)
    other = rows("stdlib", 64, seed=2)[0][: len(train)]
    assert not torch.equal(other, train[: len(other)])


# ---- what is said and refused ----


@pytest.mark.parametrize("command", ["bench", "profile"])
def test_help_names_every_option(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert not ended.value.code
    assert {"--output", "--delta", "--steps"} <= set(capsys.readouterr().out.replace(",", " ").split())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["thruput", "--output", "x"], "Did you mean throughput?"),
        (["--preset", "quik", "--output", "x"], "Did you mean quick?"),
        (["--methods", "misa,lorra", "--output", "x"], "Did you mean lora?"),
        (["--model", "llama-90", "--output", "x"], "Did you mean llama-90m?"),
        (["--device", "cuda:0", "--output", "x"], "no CUDA device"),
        (["--data", "/nowhere.txt", "--output", "x"], "neither stdlib nor a readable text file"),
        (["--steps", "0", "--output", "x"], "at least 1"),
        (["--stepz", "3", "--output", "x"], "--stepz"),
        (["--preset", "quick"], "--output"),
        (["round", "--methods", "misa", "--output", "x"], "takes no --methods"),
        (["--render", "/nowhere.json"], "nowhere.json"),
    ],
    ids=str,
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device changes what is refused")
def test_bad_input_gets_one_line_before_anything_runs(here, capsys, words, text):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1


def test_the_archive_is_the_runs_own_so_that_it_is_whole_after_each_case(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(runner, "run_bench", lambda *words, **options: given.update(options) or {"cases": []})
    words = ["bench", "throughput", "--preset", "quick", "--output", str(tmp_path / "out")]
    assert main([*words, "--archive", str(tmp_path / "a.tar.gz")]) == 1  # nothing ran
    assert given["archive"] == tmp_path / "a.tar.gz" and (tmp_path / "a.tar.gz").exists()


def test_older_results_are_not_overwritten_in_silence(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    assert main(["bench", "--preset", "quick", "--output", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err and (tmp_path / "results.json").read_text() == "{}"
