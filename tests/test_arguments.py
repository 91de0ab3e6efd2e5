"""What ``misa train`` understands: help, flags, YAML, recipes, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from misa_engine.cli import arguments as arguments_module
from misa_engine.cli.arguments import parse_train, recipe_names
from misa_engine.cli.help import MAIN_MISA_OPTIONS, MAIN_SFT_OPTIONS, help_text
from misa_engine.cli.main import main
from misa_engine.errors import UserError
from misa_engine.method.config import MisaConfig
from misa_engine.trainer.compat import FROM_ARGUMENTS


def test_help_answers_without_importing_transformers_or_trl() -> None:
    code = (
        "import sys; from misa_engine.cli.main import main\n"
        "assert main(['--help']) == main(['train', '--help']) == main(['--version']) == 0\n"
        "print(sorted({'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "[]"
    assert shown.index("--model_name_or_path") < shown.index("--delta") < shown.index("--learning_rate")
    assert "--inner_steps  T: optimizer steps between two draws. (default: 50)" in shown
    assert "--ddp_timeout" not in shown


def test_help_all_has_every_option_of_sftconfig(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help_all"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("--delta") < shown.index("--ddp_timeout")


def test_main_options_in_the_help_exist_and_state_their_true_defaults() -> None:
    sft = parse_train(["--output_dir", "x"]).sft
    for name, text in MAIN_SFT_OPTIONS.items():
        value = getattr(sft, name)
        stated = text.rpartition("(default: ")[2].rstrip(")") if "(default: " in text else None
        if name == "completion_only_loss" or stated is None:
            continue
        stated = stated.split(",")[0]
        value = getattr(value, "value", value)
        value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if name == "eval_strategy":
            continue  # depends on whether there is evaluation data
        assert stated in (
            str(value),
            f"{value:g}" if isinstance(value, float) else "",
            "none" if value == [] else "",
        ), name


def test_every_misa_option_has_exactly_one_flag() -> None:
    from trl import SFTConfig

    ours = {entry.name for entry in fields(arguments_module.MisaArguments)}
    assert ours | set(FROM_ARGUMENTS) == {entry.name for entry in fields(MisaConfig)}
    assert not ours & set(FROM_ARGUMENTS)
    names = [entry.name for cls in (*arguments_module.OURS, SFTConfig) for entry in fields(cls) if entry.init]
    assert len(names) == len(set(names))
    assert all(entry.metadata["help"] for cls in arguments_module.OURS for entry in fields(cls))


def test_without_options_the_config_is_the_engines_own() -> None:
    parsed = parse_train([])
    assert parsed.misa == MisaConfig(seed=42, max_grad_norm=1.0)
    assert parsed.sft.report_to == [] and parsed.sft.bf16 is False
    assert parsed.sft.gradient_checkpointing is True
    assert parsed.sft.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert parsed.given == set()


FLAGS = """--preset paper --delta 0.1 --inner_steps 7 --always_train norm --always_train lm_head embed_tokens
 --exponent_cap inf --closing_momentum false --sample_last 3 --no_gemm_gradients --include_outside
 --parameter_groups [{"pattern":"*.mlp.*","lr":0.5}] --static_weights {"*.q_proj.*":2.0}
 --learning_rate 5e-5 --adam_beta1 0.8 --weight_decay 0.1 --seed 7 --bf16 --packing --max_length none
 --lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycles":2} --report_to tensorboard trackio
 --gradient_checkpointing_kwargs {"every_n_layers":2} --model_name_or_path m --dataset d --eval_fraction 0.1
 --config_overrides {"hidden_size":8} --from_scratch --resume_from_checkpoint --warmup_steps 0.1 --output_dir o"""

YAML = """
preset: paper
delta: 0.1
inner-steps: 7
always_train: [norm, lm_head, embed_tokens]
exponent_cap: .inf
closing_momentum: false
sample_last: 3
gemm_gradients: no
include_outside: true
parameter_groups:
  - {pattern: "*.mlp.*", lr: 0.5}
static_weights:
  "*.q_proj.*": 2.0
learning_rate: 5e-5  # without a dot this is a string to YAML
adam_beta1: 0.8
weight_decay: 0.1
seed: 7
bf16: true
packing: true
max_length: null
lr_scheduler_type: cosine
lr_scheduler_kwargs: {num_cycles: 2}
report_to: [tensorboard, trackio]
gradient_checkpointing_kwargs: {every_n_layers: 2}
model_name_or_path: m
dataset: d
eval_fraction: 0.1
config_overrides: {hidden_size: 8}
from_scratch: true
resume_from_checkpoint: true
warmup_steps: 0.1
output_dir: o
"""


def test_yaml_and_flags_give_the_same_run(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    by_flags, by_file = parse_train(FLAGS.split()), parse_train([], str(file))
    assert by_flags.misa == by_file.misa
    assert by_flags.sft.to_dict() == by_file.sft.to_dict()
    for part in ("model", "data", "run"):
        assert asdict(getattr(by_flags, part)) == asdict(getattr(by_file, part))
    assert by_flags.given == by_file.given
    misa = by_flags.misa
    assert misa.always_train == ("norm", "lm_head", "embed_tokens") and misa.gemm_gradients is False
    assert (misa.lr, misa.betas, misa.seed, misa.preset) == (5e-5, (0.8, 0.999), 7, "paper")
    assert misa.closing_momentum is False and misa.static_weights == {"*.q_proj.*": 2.0}
    assert by_flags.sft.max_length is None and by_flags.sft.report_to == ["tensorboard", "trackio"]
    assert by_flags.sft.gradient_checkpointing_kwargs == {"use_reentrant": False, "every_n_layers": 2}
    assert by_flags.sft.eval_on_start and by_flags.sft.eval_steps == 0.1


def test_a_flag_replaces_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("delta: 0.1\nalways_train: [norm]\npacking: true\nfrozen: q\n")
    parsed = parse_train(
        "--delta 0.2 --always_train lm_head --no-packing".replace("--no-packing", "--packing no").split(), str(file)
    )
    assert parsed.misa.delta == 0.2 and parsed.misa.always_train == ("lm_head",) and parsed.misa.frozen == ("q",)
    assert parsed.sft.packing is False


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    parsed = parse_train([], name)
    assert parsed.model.model_name_or_path and parsed.data.dataset and parsed.sft.output_dir == f"runs/{name}"
    text = (arguments_module.RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("#") and "delta" in parsed.given
    if name.startswith(("paper", "official")):
        assert parsed.misa.preset == name.partition("-")[0] and parsed.misa.inner_steps == 50


def test_recipe_environment_does_not_override_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISA_TEST_A", "shell")
    monkeypatch.setenv("MISA_TEST_B", "x")
    monkeypatch.delenv("MISA_TEST_B")
    file = tmp_path / "run.yaml"
    file.write_text("env: {MISA_TEST_A: file, MISA_TEST_B: 3}\n")
    parse_train([], str(file))
    assert (os.environ["MISA_TEST_A"], os.environ["MISA_TEST_B"]) == ("shell", "3")


WRONG = {
    "--detla 0.1": "unknown option --detla. Did you mean --delta?",
    "--lr 0.1": "unknown option --lr. Use --learning_rate.",
    "--betas 0.9": "Use --adam_beta1 and --adam_beta2.",
    "--delt 0.1": "unknown option --delt.",
    "--delta=x": "invalid float value: 'x'",
    "--delta 0": "delta is the share of the model",
    "--inner_steps 0": "inner_steps (T) is the number of optimizer steps",
    "--inner_steps 2.5": "invalid int value",
    "--preset papre": "unknown preset 'papre': choose one of engine, paper, official. Did you mean 'paper'?",
    "--rule bandit": "unknown rule 'bandit'",
    "--optimizer sgd": "--optimizer must be misa or adamw",
    "--packing maybe": "Truthy value expected",
    "--save_strategy always": "always",
    "--static_weights {": "--static_weights needs JSON",
    "stray --delta 0.1": "unexpected value 'stray'",
    "--fp16": "use --bf16",
    "--optim adamw_8bit": "--optim chooses another optimizer",
    "--deepspeed x.json": "--deepspeed chooses another optimizer",
    '--gradient_checkpointing_kwargs {"use_reentrant":true}': "use_reentrant=True cannot run backward",
    "--eval_fraction 1.5": "between 0 and 1",
    "--eval_fraction 0.1 --eval_dataset x": "keep one",
    "--eval_strategy steps": "needs evaluation data",
    "--dataset_streaming": "needs --max_steps",
    "--max_eval_samples 0": "at least 1",
    "--max_eval_samples 5": "--max_eval_samples needs evaluation data",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_options_are_refused_with_what_to_do(words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_train(words.split())
    assert WRONG[words] in str(caught.value)


@pytest.mark.parametrize(
    ("torch", "refused"), [("2.9.1", True), ("2.11.0+cu130", True), ("2.13.0", False), ("3.0", False)]
)
def test_torch_compile_needs_a_torch_whose_compiled_layers_follow_the_draw(
    torch: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments_module, "version", lambda package: torch)
    for optimizer in ("misa", "adamw"):
        words = f"--torch_compile --optimizer {optimizer} --model x --dataset y --output_dir z".split()
        if refused and optimizer == "misa":
            with pytest.raises(UserError, match=f"2.13 or newer; this is {torch}".replace("+", r"\+")):
                parse_train(words)
        else:
            arguments_module._check_together({"torch_compile": True, "optimizer": optimizer})


WRONG_FILES = {
    "detla: 0.1": "unknown option detla. Did you mean delta?",
    "lr: 0.1": "unknown option lr. Use learning_rate.",
    "delta: [": "cannot be read: while parsing",
    "- delta": "must hold 'option: value' lines; it holds list",
    "delta: many": "invalid float value: 'many'",
    "delta: [1, 2]": "invalid float value",
    "packing: perhaps": "Truthy value expected",
    "env: 3": "env must map names",
}


@pytest.mark.parametrize("text", WRONG_FILES)
def test_wrong_files_are_refused_by_name(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        parse_train([], str(file))
    assert WRONG_FILES[text] in str(caught.value) and str(file) in str(caught.value)


def test_a_config_that_is_not_there_lists_the_recipes() -> None:
    with pytest.raises(UserError, match="neither a file nor a recipe. Recipes: llama3-8b-24gb, "):
        parse_train([], "nothing.yaml")


def test_help_shows_a_screenful_of_misa_options_and_help_all_the_rest() -> None:
    def options(text: str) -> list[str]:
        section = text.split("\nMISA options:\n")[1].split("\n\n")[0]
        return [
            line.split()[0].removeprefix("--").removeprefix("[no_]")
            for line in section.splitlines()
            if line.startswith("  --")
        ]

    assert options(help_text()) == [name for name in options(help_text(every=True)) if name in MAIN_MISA_OPTIONS]
    assert len(help_text().split("\nMISA options:\n")[1].split("\n\n")[0].splitlines()) <= 24
    assert {*options(help_text(every=True)), *FROM_ARGUMENTS} >= {entry.name for entry in fields(MisaConfig)}


def test_model_is_a_second_name_of_model_name_or_path(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a/b\n")
    assert parse_train(["--model", "a/b"]).model.model_name_or_path == "a/b"
    assert parse_train([], str(file)).model.model_name_or_path == "a/b"
    assert parse_train(["--model", "c"], str(file)).model.model_name_or_path == "c"
