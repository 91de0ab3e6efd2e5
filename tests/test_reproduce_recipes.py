"""The packaged recipes of the paper's experiments, row by row against the table of settings with their sources."""

import pytest

from misa_engine.bench.reproduce.experiments import EXPERIMENTS, recipe_of
from misa_engine.bench.reproduce.hyperparameters import CODE, HYPERPARAMETERS, OURS, PAPER, SCRIPTS, VARIANTS
from misa_engine.cli.arguments import recipe_names

ROWS = [(recipe, row) for recipe, rows in HYPERPARAMETERS.items() for row in rows]
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS)
#: Lines that are no setting of the experiment.
NOT_A_SETTING = {"output_dir", "preset"}


@EACH_VARIANT
@pytest.mark.parametrize(("recipe", "row"), ROWS, ids=lambda one: one if isinstance(one, str) else one.option)
def test_each_row_of_the_table_is_what_the_recipe_says(recipe, row, variant):
    given = recipe_of(recipe, variant)
    assert given[row.option] == row.value and type(given[row.option]) is type(row.value)
    assert row.source.startswith((CODE, SCRIPTS, PAPER, OURS))


@EACH_VARIANT
@pytest.mark.parametrize("recipe", HYPERPARAMETERS)
def test_each_line_of_a_recipe_is_a_row_of_the_table(recipe, variant):
    rows = [row.option for row in HYPERPARAMETERS[recipe]]
    assert sorted(set(recipe_of(recipe, variant)) - NOT_A_SETTING) == sorted(rows)


@pytest.mark.parametrize("recipe", HYPERPARAMETERS)
def test_where_paper_and_published_code_differ_both_recipes_exist(recipe):
    paper, official = dict(recipe_of(recipe, "paper")), dict(recipe_of(recipe, "official"))
    assert (paper.pop("preset"), official.pop("preset")) == ("paper", "official")
    assert (paper.pop("output_dir"), official.pop("output_dir")) == (f"runs/paper-{recipe}", f"runs/official-{recipe}")
    assert paper == official  # all else is the same experiment


def test_the_tables_published_numbers_are_those_of_the_method():
    """The settings that paper and code state, once more and by hand: a recipe cannot drift together with its table."""
    tuning = {"delta": 0.03, "inner_steps": 50, "eta": 1.0}
    for recipe in ("llama2-7b-alpaca", "llama3-8b-commonsense", "llama3-8b-math"):
        assert tuning.items() <= recipe_of(recipe).items()
    alpaca = recipe_of("llama2-7b-alpaca")
    assert (alpaca["learning_rate"], alpaca["lr_scheduler_type"], alpaca["num_train_epochs"]) == (5e-5, "cosine", 3)
    assert (alpaca["per_device_train_batch_size"], alpaca["gradient_accumulation_steps"]) == (2, 8)
    assert alpaca["max_length"] == 512
    math = recipe_of("llama3-8b-math")
    assert (math["learning_rate"], math["num_train_epochs"], math["max_length"]) == (5e-5, 3, 512)
    assert (math["per_device_train_batch_size"], math["gradient_accumulation_steps"]) == (2, 4)
    large = recipe_of("llama-350m-c4")
    assert (large["learning_rate"], large["delta"], large["eta"], large["inner_steps"]) == (1e-3, 0.25, 500, 50)
    assert large["max_steps"] == 55_000 and large["always_train"] == ["embed_tokens", "lm_head"]
    for size, sizes in {"130m": (768, 2048, 12), "350m": (1024, 2736, 24)}.items():
        recipe = recipe_of(f"llama-{size}-c4")
        shape = recipe["config_overrides"]
        assert (shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]) == sizes
        assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 256
        assert recipe["max_length"] == 256


def test_every_recipe_of_the_paper_is_in_the_table_and_every_experiment_uses_one():
    named = {name.partition("-")[2] for name in recipe_names() if name.startswith(("paper-", "official-"))}
    assert named == set(HYPERPARAMETERS)
    assert {experiment.recipe for experiment in EXPERIMENTS.values()} <= named
