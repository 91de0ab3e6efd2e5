import io
import json
import math
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from misa_engine.report.digest import Digest
from misa_engine.report.log import LOG_NAME, RunLog
from misa_engine.report.pictures import make_report
from misa_engine.report.summary import summary_table

KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def write_run(directory, layers=3, rounds=6, outside=(), steps_per_round=10, end=True, seed=0):
    """A log as the trainer writes it: round 0 at step 0, and one draw more than there are trained rounds."""
    generator = np.random.default_rng(seed)
    units = [
        {"name": f"model.layers.{layer}.{kind}_proj.weight", "numel": 64, "layer": layer, "kind": kind}
        for layer in range(layers)
        for kind in KINDS
    ]
    units += [{"name": f"{kind}.weight", "numel": 128, "layer": None, "kind": kind} for kind in outside]
    names = [unit["name"] for unit in units]
    log = RunLog(directory)
    config = {"inner_steps": steps_per_round, "eta": 1.0}
    log.append("run", 0, units=units, total_parameters=10_000, delta=0.1, config=config, model="dir/llama")
    visits = dict.fromkeys(names, 0)
    for number in range(rounds + 1):
        step = number * steps_per_round
        active = sorted(generator.choice(names, min(4, len(names)), replace=False))
        for name in active:
            visits[name] += 1
        weights = generator.random(len(names))
        log.append(
            "switch",
            step,
            round=number,
            active=active,
            probabilities=dict(zip(names, weights / weights.sum(), strict=True)),
            scores=dict(zip(names, weights * 1e-7, strict=True)),
            visits=visits,
        )
        if number < rounds:
            log.append("metrics", step + 5, loss=5 - 0.1 * number, learning_rate=1e-3)
            log.append("metrics", step + 5, eval_loss=5.5 - 0.1 * number)
    if end:
        changes = {name: 0.01 * visits[name] for name in names} | {"model.norm.weight": 0.0, "embed.weight": 0.5}
        log.append(
            "end", rounds * steps_per_round, visits=visits, relative_change=changes, frozen=1, unchanged_frozen=1
        )
    return log


def shown(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


# ---- the log ----


def test_log_reads_back_what_was_written(tmp_path):
    log = RunLog(tmp_path)
    log.append("run", 0, units=[], nested={"a": (1, 2)})
    log.append("metrics", 5, loss=torch.tensor(1.5), norm=np.float32(2.0), series=np.arange(2))
    first, second = RunLog.read(tmp_path)
    assert first["type"] == "run" and first["nested"] == {"a": [1, 2]}
    assert (second["step"], second["loss"], second["norm"], second["series"]) == (5, 1.5, 2.0, [0, 1])
    assert 0 <= first["time_s"] <= second["time_s"]


def test_log_is_strict_json_also_for_a_loss_that_is_not_finite(tmp_path):
    RunLog(tmp_path).append("metrics", 1, loss=math.nan, norm=torch.tensor([math.inf, 1.0]))

    def refuse(constant):
        raise AssertionError(constant)

    entry = json.loads((tmp_path / LOG_NAME).read_text(), parse_constant=refuse)
    assert entry["loss"] is None and entry["norm"] == [None, 1.0]


@pytest.mark.parametrize("half", ['{"type": "metr', "\x00\x00\x00", '"text"', "[1]"])
def test_half_written_last_line_is_dropped_and_appending_goes_on(tmp_path, half):
    log = write_run(tmp_path, rounds=1)
    whole = RunLog.read(tmp_path)
    with open(log.path, "a") as file:
        file.write(half)
    assert RunLog.read(tmp_path) == whole
    RunLog(tmp_path).append("metrics", 99, loss=1.0)
    assert RunLog.read(tmp_path)[:-1] == whole
    assert RunLog.read(tmp_path)[-1]["step"] == 99


def test_log_that_is_only_a_half_written_line_is_empty(tmp_path):
    (tmp_path / LOG_NAME).write_text('{"type": "ru')
    assert RunLog.read(tmp_path) == []
    RunLog(tmp_path).append("run", 0)
    assert [entry["type"] for entry in RunLog.read(tmp_path)] == ["run"]


def test_broken_line_in_the_middle_is_an_error_that_names_file_and_line(tmp_path):
    log = write_run(tmp_path)
    lines = log.path.read_text().splitlines()
    lines[2] = lines[2][:30]
    log.path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=rf"{LOG_NAME}, line 3 "):
        RunLog.read(tmp_path)


def test_truncate_after_keeps_what_the_checkpoint_knows_and_drops_the_end(tmp_path):
    log = write_run(tmp_path, rounds=4)
    before = RunLog.read(tmp_path)
    log.truncate_after(20)
    assert RunLog.read(tmp_path) == [entry for entry in before if entry["step"] <= 20]
    log.truncate_after(1000)
    assert not any(entry["type"] == "end" for entry in RunLog.read(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [LOG_NAME]


def test_truncate_before_the_beginning_empties_even_a_damaged_log(tmp_path):
    (tmp_path / LOG_NAME).write_text("rubbish\nmore\n")
    RunLog(tmp_path).truncate_after(-1)
    assert RunLog.read(tmp_path) == []


def test_interrupted_truncation_leaves_the_old_log(tmp_path, monkeypatch):
    log = write_run(tmp_path)
    before = log.path.read_bytes()

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("misa_engine.report.log.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.truncate_after(10)
    assert log.path.read_bytes() == before


def test_time_goes_on_from_the_last_entry_after_a_restart(tmp_path):
    log = RunLog(tmp_path)
    log.append("run", 0)
    text = log.path.read_text().replace('"time_s": 0.0', '"time_s": 500.0')
    log.path.write_text(text)
    RunLog(tmp_path).append("metrics", 1)
    assert 500 <= RunLog.read(tmp_path)[-1]["time_s"] < 560


# ---- what is made of it ----


def test_draw_that_no_step_followed_is_not_counted_as_a_visit(tmp_path):
    write_run(tmp_path, rounds=6)
    found = Digest.of(RunLog.read(tmp_path))
    assert found.active.shape == (6, 21) and list(found.round_steps) == [0, 10, 20, 30, 40, 50]
    np.testing.assert_array_equal(found.visits, found.active.sum(axis=0))


def test_running_log_counts_the_round_in_progress(tmp_path):
    write_run(tmp_path, rounds=6, end=False)
    found = Digest.of(RunLog.read(tmp_path))
    assert len(found.rounds) == 7
    np.testing.assert_array_equal(found.visits, found.active.sum(axis=0))


def test_covered_at_is_the_first_round_by_which_all_have_trained(tmp_path):
    write_run(tmp_path, layers=1, rounds=12)
    found = Digest.of(RunLog.read(tmp_path))
    assert found.covered_at is not None
    upto = int(np.flatnonzero(found.rounds == found.covered_at)[0])
    assert found.active[: upto + 1].any(axis=0).all() and not found.active[:upto].any(axis=0).all()


@pytest.mark.parametrize(
    "shape",
    [{}, {"outside": ("embedding", "head")}, {"layers": 0, "outside": ("head",)}, {"layers": 30, "rounds": 4}],
    ids=["layers", "layers and outside", "only outside", "many layers"],
)
def test_report_draws_three_readable_pictures(tmp_path, shape, monkeypatch):
    from misa_engine.report import figures

    monkeypatch.setattr(figures, "DPI", 40)
    write_run(tmp_path, **shape)
    files = make_report(tmp_path)
    assert [path.name for path in files] == ["importance_map.png", "loss.png", "visits.png"]
    for path in files:
        assert path.parent == tmp_path and path.read_bytes().startswith(b"\x89PNG")


def test_map_has_a_panel_for_each_kind_and_one_for_what_is_outside(tmp_path):
    from misa_engine.report.importance_map import importance_map

    write_run(tmp_path, outside=("embedding",))
    titles = [axes.get_title(loc="left") for axes in importance_map(Digest.of(RunLog.read(tmp_path))).axes]
    assert len([title for title in titles if title]) == 8
    assert "outside the layers" in titles and "MLP: down" in titles


def test_one_step_rounds_of_a_cold_start_are_narrow_in_the_map(tmp_path):
    from misa_engine.report.importance_map import importance_map

    write_run(tmp_path, rounds=6)
    lines = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    begins = {0: 0, 10: 1, 20: 2, 30: 3}  # three rounds of one step, then of ten or more
    for entry in lines:
        if entry["type"] == "switch":
            entry["step"] = begins.get(entry["step"], entry["step"])
    lines.sort(key=lambda entry: entry["step"])
    (tmp_path / LOG_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    panel = importance_map(Digest.of(RunLog.read(tmp_path))).axes[0]
    edges = panel.collections[0].get_coordinates()[0, :, 0]
    np.testing.assert_array_equal(edges, [0, 1, 2, 3, 40, 50, 60])
    assert panel.get_xlim() == (0, 60)


def test_long_run_keeps_a_mark_for_every_visit_when_rounds_share_a_column(tmp_path):
    from misa_engine.report.figures import binned

    trained = np.zeros((1, 1000))
    trained[0, [0, 499, 999]] = 1
    binned = binned(trained, 4)
    assert binned.shape == (1, 250) and (binned > 0).sum() == 3


def test_visit_counts_are_written_in_their_cells(tmp_path):
    from misa_engine.report.pictures import visit_counts

    write_run(tmp_path)
    found = Digest.of(RunLog.read(tmp_path))
    axes = visit_counts(found).axes[0]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    for unit, visits in zip(found.units, found.visits, strict=True):
        assert written[(KINDS.index(unit.kind), unit.layer)] == str(visits)


def test_loss_picture_has_the_baseline_of_the_log(tmp_path):
    from misa_engine.report.pictures import loss_curves

    log = write_run(tmp_path)
    log.append("baseline", 60, name="AdamW", loss=[[5, 4.0], [15, 3.0]], eval_loss=[[0, 5.5], [60, 2.5]])
    legend = loss_curves(Digest.of(RunLog.read(tmp_path))).axes[0].get_legend()
    words = " ".join(text.get_text() for text in legend.get_texts())
    assert "AdamW, held out: 5.500 → 2.500" in words and "MISA, held out: 5.500 → 5.000" in words


def test_report_of_a_run_without_draws_is_the_loss_alone(tmp_path):
    log = RunLog(tmp_path)
    log.append("run", 0, optimizer="adamw", units=[])
    log.append("metrics", 5, loss=2.0)
    assert [path.name for path in make_report(tmp_path)] == ["loss.png"]


def test_report_survives_losses_that_are_not_finite(tmp_path):
    log = write_run(tmp_path, rounds=2)
    for step in range(21, 60):
        log.append("metrics", step, loss=math.nan if step % 2 else 2.0)
    assert len(make_report(tmp_path)) == 3


def test_report_without_a_log_or_without_content_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no run log .*--output_dir"):
        make_report(tmp_path)
    RunLog(tmp_path).append("run", 0, units=[])
    with pytest.raises(ValueError, match="nothing to draw"):
        make_report(tmp_path)


def test_pictures_without_matplotlib_name_the_extra(tmp_path, monkeypatch):
    write_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'misa_engine\[train\]'"):
        make_report(tmp_path)


def test_table_shows_visits_score_change_and_the_unchanged_frozen(tmp_path):
    write_run(tmp_path)
    text = shown(summary_table(RunLog.read(tmp_path)))
    assert "…" not in text  # nothing is cut off at 80 columns
    rows = [line.split() for line in text.splitlines()]
    found = Digest.of(RunLog.read(tmp_path))
    row = next(row for row in rows if row[:2] == ["v", "1"])
    unit = next(i for i, unit in enumerate(found.units) if (unit.kind, unit.layer) == ("v", 1))
    assert row[3] == str(found.visits[unit]) and row[5] == f"{found.scores[unit]:.2e}"
    assert any(row[:2] == ["always", "on"] and row[-1] == "50.00%" for row in rows)
    assert any(row[0] == "frozen" and "1" in row for row in rows if row)


def test_table_of_a_deep_model_groups_the_layers(tmp_path):
    write_run(tmp_path, layers=32)
    text = shown(summary_table(RunLog.read(tmp_path)))
    assert "…" not in text and "0–10" in text and "22–31" in text
    assert sum(line.split()[:1] == ["down"] for line in text.splitlines()) == 3


def test_table_reports_frozen_parameters_that_changed(tmp_path):
    log = write_run(tmp_path, end=False)
    log.append("end", 60, relative_change={"model.norm.weight": 0.1}, frozen=3, unchanged_frozen=2)
    assert "1 CHANGED" in shown(summary_table(RunLog.read(tmp_path)))


def test_unit_of_many_parameters_gathers_their_changes(tmp_path):
    log = RunLog(tmp_path)
    units = [{"name": f"model.layers.{i}", "numel": 9, "layer": i, "kind": "layer"} for i in range(2)]
    log.append("run", 0, units=units)
    names = [unit["name"] for unit in units]
    log.append("switch", 0, round=0, active=names[:1], visits={names[0]: 1}, probabilities={}, scores={})
    changes = {"model.layers.0.a.weight": 0.2, "model.layers.0.b.bias": 0.4, "model.layers.1.a.weight": 0.0}
    log.append("end", 5, relative_change=changes)
    text = shown(summary_table(RunLog.read(tmp_path)))
    assert "30.00%" in text and "0.00%" in text
