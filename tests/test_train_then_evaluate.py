"""``bench/train_then_evaluate.sh`` with a stand-in for ``misa``: what it calls, and that a second call goes on."""

import os
import subprocess
from pathlib import Path

import pytest

from misa_engine.cli.arguments import parse_train
from misa_engine.cli.evaluate import _parser as eval_parser

SCRIPT = Path(__file__).parents[1] / "bench" / "train_then_evaluate.sh"


@pytest.fixture
def call(tmp_path):
    """Runs the script; gives the words of each call of ``misa``, whose stand-in writes what is looked for later."""
    stand_in = tmp_path / "bin/misa"
    stand_in.parent.mkdir()
    stand_in.write_text(
        '#!/bin/bash\necho "$@" >> "$CALLS"\nwhile [ $# -gt 0 ]; do case $1 in\n'
        "  fetch) mkdir -p $3; touch $3/config.json;;\n  --training_problems) touch $2;;\n"
        "  --output_dir) mkdir -p $2; touch $2/model.safetensors;;\nesac; shift; done\n"
    )
    stand_in.chmod(0o755)

    def run(*words):
        calls = tmp_path / "calls"
        calls.write_text("")
        paths = f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(["bash", SCRIPT, *words], env={"PATH": paths, "CALLS": str(calls)}, cwd=tmp_path,
            capture_output=True, text=True)  # fmt: skip
        return done.returncode, [line.split() for line in calls.read_text().splitlines()], done.stdout

    return run


def test_every_method_is_trained_once_and_all_are_evaluated_together(call):
    code, calls, _ = call("out")
    assert code == 0 and [words[0] for words in calls] == ["fetch", "eval", *4 * ["train"], "eval"]
    names = ["misa", "misa-slow", "misa-none", "adamw"]
    assert [words[words.index("--output_dir") + 1] for words in calls[2:6]] == [f"out/{name}" for name in names]
    rates = [parse_train(words[1:]).sft.learning_rate for words in calls[2:6]]  # every option is known
    assert rates == [3e-4, 1e-4, 7.5e-4, 1e-4]
    last = eval_parser().parse_args(calls[-1][1:])
    assert last.models == [f"out/{name}" for name in names] and last.base == "out/smollm2-135m"
    assert "forgetting" in last.tasks and last.limit == 150
    again = call("out")
    assert again[0] == 0 and [words[0] for words in again[1]] == ["eval"]


def test_without_a_folder_it_says_what_it_wants(call):
    code, calls, said = call()
    assert code == 2 and not calls and "OUTPUT" in said
