"""``misa bench learning``: what is run, what a run's file holds, what the matrix says, what is refused."""

import json
import math

import pytest
import torch

from in_process import Here, run_here
from misa_engine.bench import bases, learning, learning_results, matrix, presets, tasks
from misa_engine.bench.learners import LEARNERS, learner_of
from misa_engine.bench.tasks import IGNORED
from misa_engine.bench.words import Bytes
from misa_engine.cli.main import main
from misa_engine.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")

#: A base made in a second, and runs of a few steps.
QUICK = (
    "--preset", "quick", "--base", "tiny", "--steps", "4", "--batch", "2", "--length", "64", "--rows", "4",
    "--points", "2", "--delta", "0.2",
)  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    run_here(monkeypatch)
    monkeypatch.setitem(presets.RECIPES, "tiny", {**presets.RECIPES["tiny"], "steps": 3, "batch": 2})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Bases and text are made once for all tests here."""
    return tmp_path_factory.mktemp("work")


def bench(out, work, *words):
    return main(["bench", "learning", "--output", str(out), "--work", str(work), *QUICK, *words])


# ---- runs ----


def test_a_run_is_a_file_in_the_shape_of_pefts_comparison_and_ours(here, tmp_path, work, capsys):
    assert bench(tmp_path, work, "--methods", "adamw,misa") == 0
    runs = {row["settings"]["learner"]: row for row in matrix.read_rows(tmp_path)}
    assert set(runs) == {"base", "adamw", "misa"} and {row["status"] for row in runs.values()} == {"ok"}
    row = runs["misa"]
    assert {"created_at", "total_time", "experiment_name", "train_config", "peft_config", "error_msg"} <= set(
        row["run_info"]
    )
    names = {"train_time", "file_size", "num_trainable_params", "num_total_params", "status", "metrics"}
    memory = {"accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"}
    assert names | memory <= set(row["train_info"])
    assert {"model_info", "dataset_info", "package_info", "system_info"} == set(row["meta_info"])
    assert row["train_info"]["metrics"][-1]["valid loss"] == row["learning"]["heldout_loss"]
    ours = row["learning"]
    assert [point["step"] for point in ours["curve"]] == [2, 4] and len(ours["train_loss"]) == 4
    assert {"visits", "entropy_median", "expected_visits"} <= set(ours) and "visits" not in runs["adamw"]["learning"]
    assert ours["expected_visits"] == pytest.approx(0.2 * 4 / 2)
    assert runs["base"]["learning"]["heldout_loss"] != ours["heldout_loss"]
    assert len({run["learning"]["base_digest"] + run["learning"]["task_digest"] for run in runs.values()}) == 1
    assert row["settings"]["work"] == work.name  # no folder of this machine
    page = (tmp_path / "results.md").read_text()
    assert "| misa |" in page and "gap closed" in page
    for name in ("learning_text.png", "memory_text.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG") and name in page


def test_loras_rank_is_chosen_so_that_it_has_no_less_memory_than_misa(here, tmp_path, work):
    pytest.importorskip("peft", reason="LoRA's row needs peft: pip install -c constraints.txt -e '.[bench]'")
    assert bench(tmp_path, work, "--methods", "adamw,misa,lora") == 0
    runs = {row["settings"]["learner"]: row["learning"] for row in matrix.read_rows(tmp_path)}
    held, misa = {name: run.get("total_held_bytes") for name, run in runs.items()}, runs["misa"]["held_bytes"]
    assert misa["gradients"] + misa["first_moment"] + misa["second_moment"] <= held["lora"] < held["adamw"]


def test_every_method_gets_as_many_rates_and_seeds_and_sees_the_same_text(here, tmp_path, work):
    settings = presets.Learning(base="tiny", seeds=(0, 7), factors=(0.5, 2.0))
    cases = [case for case in matrix.cases_of(settings, str(work)) if case.kind == "learning" and case.steps]
    trials = {}
    for case in cases:
        trials.setdefault(case.learner, []).append((case.lr / LEARNERS[case.learner].rate, case.seed))
    assert set(trials) == set(LEARNERS) - {"base"} and len({case.name for case in cases}) == len(cases)
    assert {len(own) for own in trials.values()} == {4}
    for own in trials.values():
        rates, seeds = zip(*own, strict=True)
        assert rates == pytest.approx([5e-4, 2e-3, 5e-4, 2e-3]) and seeds == (0, 0, 7, 7)
    given = presets.Learning(base="tiny", methods=("adamw", "lora"), lrs=(1e-4,))
    cases = [case for case in matrix.cases_of(given, str(work)) if case.kind == "learning" and case.steps]
    assert [(case.learner, case.lr) for case in cases] == [("adamw", 1e-4), ("lora", 1e-4)]


def test_a_killed_matrix_goes_on_and_more_methods_extend_it(here, tmp_path, work, monkeypatch):
    monkeypatch.setattr(Here, "most", 2)
    assert bench(tmp_path, work, "--methods", "adamw,misa") == 130
    assert Here.ran == ["text base", "text adamw lr 0.001 seed 0"]
    assert len(matrix.read_rows(tmp_path)) == 2 and "| adamw |" in (tmp_path / "results.md").read_text()
    kept = (tmp_path / "runs" / "text_adamw_lr_0.001_seed_0.json").read_bytes()
    monkeypatch.setattr(Here, "most", math.inf)
    assert bench(tmp_path, work, "--methods", "adamw,misa") == 0
    assert bench(tmp_path, work, "--methods", "uniform", "--seeds", "0,1") == 0
    assert Here.ran[2:] == [f"text {run}" for run in ("misa lr 0.003 seed 0", "uniform lr 0.003 seed 0",
                                                      "uniform lr 0.003 seed 1")]  # fmt: skip
    assert (tmp_path / "runs" / "text_adamw_lr_0.001_seed_0.json").read_bytes() == kept
    document = json.loads((tmp_path / "results.json").read_text())
    assert {one["method"]: one["seeds"] for one in document["results"]} == {"adamw": 1, "misa": 1, "uniform": 2}


def test_the_same_run_ends_at_the_same_loss(here, tmp_path, work):
    for folder in ("a", "b"):
        assert bench(tmp_path / folder, work, "--methods", "misa:rest=sign:rest_lr=0.2") == 0
    first, second = (matrix.read_rows(tmp_path / folder)[1]["learning"] for folder in ("a", "b"))
    assert first["heldout_loss"] == second["heldout_loss"] and first["train_loss"] == second["train_loss"]


def test_a_missing_package_and_a_failing_method_are_rows(here, tmp_path, work, monkeypatch):
    monkeypatch.setattr("misa_engine.bench.baselines.installed", lambda package: package != "badam")
    assert bench(tmp_path, work, "--methods", "badam,misa:delta=0.0001,adamw") == 0
    page = (tmp_path / "results.md").read_text()
    assert "badam: missing: pip install badam" in page and "delta=0.0001" in page and "| adamw |" in page


# ---- what the runs say ----


def run_of(learner, lr, seed, loss, *, seconds=10.0, held=100, own=2.0, status="ok"):
    curve = [{"step": n, "tokens": 10 * n, "seconds": seconds * n / 2, "heldout_loss": loss + 2 - n} for n in (1, 2)]
    ours = {
        "heldout_loss": loss, "own_kind_loss": own, "curve": curve, "total_held_bytes": held, "train_seconds": seconds,
        "step_time_s": {"median": 1.0}, "total_parameters": 5,
    }  # fmt: skip
    settings = {"learner": learner, "lr": lr, "seed": seed, "task": "text"}
    return {"case": f"{learner} {lr} {seed}", "status": status, "settings": settings, "learning": ours}


def test_methods_count_with_their_best_rate_and_compare_by_seed():
    rows = [run_of("base", 0, 0, 4.0, own=1.5)]
    rows += [run_of("adamw", lr, seed, loss + 0.1 * seed, held=900) for lr, loss in ((1e-3, 2.0), (1e-2, math.nan))
             for seed in (0, 1)]  # fmt: skip
    rows += [run_of("misa", 1e-3, seed, 3.0 + 0.1 * seed, seconds=5.0) for seed in (0, 1)]
    rows += [run_of("misa", 3e-3, 0, 1.0)]  # half done: no candidate
    rows += [run_of("lora", 1e-3, seed, 2.5 + 0.1 * seed, held=150, own=1.7) for seed in (0, 1)]
    rows += [run_of("broken", 1e-3, 0, 0.0, status="failed: no")]
    found = {one["method"]: one for one in learning_results.summarise(rows)}
    assert list(found) == ["adamw", "lora", "misa", "broken"]  # by loss, without a result last
    adamw, lora, misa = found["adamw"], found["lora"], found["misa"]
    assert adamw["lr"] == 1e-3 and adamw["at_edge"] and adamw["loss"] == pytest.approx(2.05)
    assert misa["lr"] == 1e-3 and not lora["at_edge"]
    assert lora["to_adamw"]["median"] == pytest.approx(0.5) and lora["to_none"]["range"] == pytest.approx([-0.5, -0.5])
    assert [found[name]["gap_closed"] for name in ("misa", "lora", "adamw")] == pytest.approx([0, 0.5, 1])
    reversed_once = [*rows, run_of("adamw", 1e-3, 2, 3.4), run_of("misa", 1e-3, 2, 3.2), run_of("lora", 1e-3, 2, 2.7)]
    assert {one["gap_closed"] for one in learning_results.summarise(reversed_once)[:3]} == {None}  # no gap to close
    assert (misa["fits_lora"], lora["fits_lora"], adamw["fits_lora"]) == (True, True, False)
    assert lora["forgetting"] == pytest.approx(0.2) and found["broken"]["loss"] is None
    # misa needs 5 s; after these the others stand at their first point, a whole nat above their ends
    assert misa["loss_at_time"] == pytest.approx(3.05) and adamw["loss_at_time"] == pytest.approx(3.05)
    first, second = learning_results.tables(list(found.values()))
    assert [row[0] for row in first.rows] == ["adamw", "lora", "misa"] and [row[0] for row in second.rows] == [
        "lora", "misa",
    ]  # fmt: skip


# ---- tasks ----


def test_answers_alone_are_labelled_and_what_is_too_long_is_left_out():
    words = Bytes()
    found = tasks.answers([("2 + 2?", "4"), ("why?", "x" * 100)], words, 32)
    assert found.shape == (1, 2, 32)
    ids, labels = found[0]
    assert words.decode(ids.tolist()) == "Question: 2 + 2?\nAnswer: 4"
    assert labels[labels != IGNORED].tolist() == [*words.encode("4"), words.end]


def test_padding_changes_no_loss():
    model = bases.new_model("tiny").eval()
    short = tasks.answers([("2 + 2?", "4")], Bytes(), 32)
    long = tasks.answers([("2 + 2?", "4")], Bytes(), 64)
    with torch.no_grad():
        assert torch.equal(learning.labelled_loss(model, short), learning.labelled_loss(model, long))


def test_what_is_held_out_depends_on_neither_order_nor_seed():
    items = [f"piece {n}" for n in range(500)]
    train, held_out = tasks.split(items)
    again = tasks.split(items[::-1])
    assert set(held_out) == set(again[1]) and not set(train) & set(held_out)
    assert 20 <= len(held_out) <= 90 and len(train) + len(held_out) == 500


def test_documentation_is_prose_and_kept_as_it_was_first_made(tmp_path, monkeypatch):
    text = "This is a sentence about nothing in particular, long enough to be kept as a paragraph of prose.\n\n"
    assert (
        len(list(tasks.prose(text + ">>> f(x[0]) == {'a': [1, 2, 3]} and g(y, z=5) != (1, 2); h[3] = f(x[0])\n"))) == 1
    )
    monkeypatch.setattr(tasks, "documentation", lambda: ["first"])
    assert tasks.documentation_file(tmp_path) == ["first"]
    monkeypatch.setattr(tasks, "documentation", lambda: ["another package was installed"])
    assert tasks.documentation_file(tmp_path) == ["first"]


def test_instructions_are_about_the_standard_library_and_modules_are_held_out_whole():
    pairs = list(tasks.instructions())
    assert len(pairs) > 300 and any("shutil.copytree" in question for question, _ in pairs)
    train, held_out = tasks.split(pairs, by=tasks._module)
    assert not {tasks._module(pair) for pair in train} & {tasks._module(pair) for pair in held_out}


def test_solving_reads_greedy_answers_whatever_the_prompts_lengths(monkeypatch):
    words = Bytes()
    questions = [(words.prompt("a?"), "1"), (words.prompt("a longer question than that?"), "2")]

    class Fake:
        eval = train = staticmethod(lambda: None)

        @staticmethod
        def generate(input_ids, attention_mask, **options):
            assert attention_mask.sum(1).tolist() == [len(prompt) for prompt, _ in questions]
            said = torch.tensor([words.encode("#### 1"), words.encode("#### 3")])
            return torch.cat((input_ids, said), dim=1)

    assert learning.solved(Fake, words, questions) == [True, False]


# ---- who learns ----


def test_options_make_a_learner_and_are_checked():
    learner = learner_of("misa:rest=sign:rest_lr=0.3:delta=0.1:inner_steps=7:rest_outside=true")
    assert learner.misa == {"cold_start": None, "rest": "sign", "rest_lr": 0.3, "rest_outside": True}
    assert learner.settings == {"delta": 0.1, "inner_steps": 7}
    for text, said in (
        ("lorra", "Did you mean lora?"),
        ("misa:rest_l=0.3", "Did you mean rest_lr?"),
        ("misa:rest=sing", "sing"),
        ("adamw:rest=sign", "options are MISA's"),
        ("misa-none:rest_lr=0.3", "rest"),
    ):
        with pytest.raises(UserError, match=said.replace("?", r"\?")):
            learner_of(text)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--methods", "misa,lorra"), "Did you mean lora?"),
        (("--preset", "smal"), "Did you mean small?"),
        (("--tasks", "maths"), "Did you mean math?"),
        (("--base", "/nowhere"), "misa fetch"),
        (("--dtype", "float16"), "float32 or bfloat16"),
        (("--steps", "0"), "at least 1"),
    ],
    ids=str,
)
def test_bad_input_gets_one_line_before_anything_runs(here, tmp_path, work, capsys, words, text):
    assert bench(tmp_path / "out", work, *words) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_runs_of_other_settings_do_not_mix(here, tmp_path, work, capsys):
    assert bench(tmp_path, work, "--methods", "adamw") == 0
    assert bench(tmp_path, work, "--methods", "adamw", "--batch", "3") == 2
    assert "other settings (batch 2)" in capsys.readouterr().err
