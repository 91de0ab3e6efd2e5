"""The whole command, killed with SIGKILL and started again, against the same command left in peace."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

from misa_engine.report.log import RunLog
from misa_engine.trainer import checkpoints, completeness
from models import TINY

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")

#: Runs the command in a process that kills itself: after logging step 7, or with step 8's checkpoint all but named.
KILLED = """
import os, signal, sys
from misa_engine.trainer import checkpoints
from misa_engine.cli import main as cli
from misa_engine.report import log

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

append, flush = log.RunLog.append, checkpoints.flush_tree

def append_and_die(self, type, step, **fields):
    append(self, type, step, **fields)
    if type == "metrics" and step == 7:
        die()

if sys.argv.pop(1) == "between":
    log.RunLog.append = append_and_die
else:
    checkpoints.flush_tree = lambda folder: die() if folder.name == "checkpoint-8" else flush(folder)
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer, and a few records."""
    folder = tmp_path_factory.mktemp("material")
    TINY["llama"](vocab_size=384).to(torch.bfloat16).save_pretrained(folder / "model")
    ByT5Tokenizer().save_pretrained(folder / "model")
    source = random.Random(0)
    records = [{"text": "".join(source.choice("abcdefgh ") for _ in range(30))} for _ in range(24)]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def command(material: Path, out: Path, *more: str, killed: str = "") -> subprocess.Popen[str]:
    """Start ``misa train``; ``killed`` names the moment at which the process ends itself."""
    start = ["-c", KILLED, killed] if killed else ["-m", "misa_engine"]
    options = {
        "model_name_or_path": material / "model",
        "dataset": material / "data.jsonl",
        "output_dir": out,
        "delta": 0.2,
        "inner_steps": 3,
        "learning_rate": 1e-2,
        "max_steps": 11,
        "save_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_length": 32,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(out.parent / f"cache-{out.name}"),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
    }
    pipe = subprocess.PIPE
    arguments = [sys.executable, *start, "train", *words, *more]
    return subprocess.Popen(arguments, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def test_a_run_killed_twice_ends_with_the_same_weights_and_log_as_one_left_in_peace(material, tmp_path):
    whole = command(material, tmp_path / "whole")  # beside the other run: two cores do
    out = tmp_path / "killed"
    finish(command(material, out, killed="between"), -signal.SIGKILL)
    assert max(entry["step"] for entry in RunLog.read(out)) == 7
    assert completeness.find_last_complete_checkpoint(out) == out / "checkpoint-4"

    finish(command(material, out, "--resume_from_checkpoint", "true", killed="saving"), -signal.SIGKILL)
    assert (out / checkpoints.STAGING / "checkpoint-8" / "optimizer.pt").is_file()
    assert completeness.find_last_complete_checkpoint(out) == out / "checkpoint-4"

    finish(command(material, out, "--resume_from_checkpoint", str(out / "checkpoint-4")), 0)
    finish(whole, 0)
    expected, found = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "killed"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    start = load_file(material / "model" / "model.safetensors")
    assert not all(torch.equal(start[name], found[name]) for name in start)
    assert not (out / checkpoints.STAGING).exists()

    logs = [RunLog.read(tmp_path / run) for run in ("whole", "killed")]
    assert [entry["type"] for entry in logs[1]].count("run") == 1
    for kind, keys in (("switch", ("round", "active", "scores", "visits")), ("end", ("visits", "relative_change"))):
        first, second = ([[e["step"], *(e[k] for k in keys)] for e in log if e["type"] == kind] for log in logs)
        assert first == second
    losses = [[(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 11
