"""Memory steps that must not happen: at load, at evaluation, at save, at a switch, and slowly over a long run."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ByT5Tokenizer
from trl import SFTConfig

import host_growth
from command import make_workplace, words
from misa_engine import MISA
from misa_engine.cli.arguments import ALLOCATOR_VARIABLES, parse_train
from misa_engine.cli.main import main
from misa_engine.trainer import MisaTrainer, checkpoints
from misa_engine.trainer.log_writer import RunLogWriter
from models import TINY


@pytest.fixture(scope="module", autouse=True)
def quiet():
    for name in ("transformers", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("surprises"), tmp_path_factory.mktemp("cache"))


def make_trainer(out: Path, **options: Any) -> MisaTrainer:
    letters = torch.randint(97, 123, (24, 40), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"text": ["".join(map(chr, row)) for row in letters]})
    common = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    args = SFTConfig(str(out), **{**common, "max_steps": 2, "save_strategy": "no", "max_length": 64, **options})
    return MisaTrainer(
        TINY["llama"](vocab_size=384, num_hidden_layers=4),
        args=args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=ByT5Tokenizer(),
        misa={"delta": 0.3},
    )


# ---- load and save ----

#: Prints the growth of anonymous memory over each action, its peak sampled every half millisecond; file pages that the
#: system may drop are not part of it. The writer of safetensors is made to copy, as it does for tensors on a GPU.
LOAD_AND_SAVE = """
import ctypes, gc, json, sys
from pathlib import Path
import safetensors.torch as writer
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig
from trl import SFTConfig
import host_growth
from misa_engine.trainer import checkpoints
from misa_engine.cli import loading
from misa_engine.cli.arguments import ModelArguments
from misa_engine.trainer import MisaTrainer

def growth_of(action):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return host_growth.growth_of(action)

def load(name, **options):
    arguments = ModelArguments(model_name_or_path=str(place / name), dtype="bfloat16", **options)
    return loading.load_model(arguments, torch.device("cpu"))

def trainer_of(model):
    args = SFTConfig(str(place / "out"), use_cpu=True, bf16=False, report_to="none")
    data = Dataset.from_dict({"input_ids": [[1, 2, 3]]})
    return MisaTrainer(model, args=args, train_dataset=data, processing_class=ByT5Tokenizer(), misa={"delta": 0.1})

place, sizes = Path(sys.argv[1]), {"num_attention_heads": 8, "num_key_value_heads": 8}
small = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=384, **sizes)
large = LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=14, vocab_size=4096, **sizes)
AutoModelForCausalLM.from_config(small).save_pretrained(place / "small")
load("small", from_scratch=True)
trainer_of(load("small")).save_model(str(place / "first"))  # what is imported and allocated once
model = AutoModelForCausalLM.from_config(large)
model.save_pretrained(place / "float32")
found = {"largest": max(p.numel() for p in model.parameters()) * 4}
model.bfloat16().save_pretrained(place / "bfloat16")
found["weights"] = sum(p.nbytes for p in model.parameters())
del model
for name in ("bfloat16", "float32"):
    model, found[name] = growth_of(lambda: load(name))
    assert model.dtype == torch.bfloat16
    del model
model, found["from_scratch"] = growth_of(lambda: load("bfloat16", from_scratch=True))
assert model.dtype == torch.bfloat16

plain = writer._to_ndarray
writer._to_ndarray = lambda tensor: plain(tensor.clone())
checkpoints.SHARD_BYTES = 20_000_000
trainer = trainer_of(model)
_, found["save"] = growth_of(lambda: trainer.save_model(str(place / "saved")))
found["files"] = [path.stat().st_size for path in (place / "saved").glob("*.safetensors")]
again = load("saved")
found["same"] = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
print(json.dumps(found))
"""

#: Buffers of Python, threads and the allocator that come with any of these; up to 2.6 MB were seen.
SLACK = 8_000_000


@pytest.fixture(scope="module")
def growth(tmp_path_factory) -> dict[str, Any]:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    place = tmp_path_factory.mktemp("growth")
    command = [sys.executable, "-c", LOAD_AND_SAVE, str(place)]
    env = {**os.environ, **host_growth.importable(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_loading_takes_the_weights_and_one_tensor(growth, stored):
    assert growth[stored] <= growth["weights"] + growth["largest"] + SLACK


def test_random_weights_are_made_in_bfloat16(growth):
    """In float32 first they would take three times the weights."""
    assert growth["from_scratch"] <= growth["weights"] + growth["largest"] + SLACK


def test_saving_copies_one_file_at_a_time(growth):
    """Of 104 MB of weights in files of 20 MB, with a writer that copies its tensors as it must on a GPU."""
    assert growth["weights"] > 100_000_000 and growth["same"]
    assert len(growth["files"]) >= 5 and max(growth["files"]) <= 20_100_000  # 20 MB of tensors and a header
    assert growth["save"] <= 20_000_000 + SLACK


def test_checkpoints_are_sharded_too_and_resume(tmp_path, monkeypatch):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 50_000)
    sharded = make_trainer(tmp_path / "sharded", **options)
    sharded.train()
    assert (tmp_path / "sharded" / "checkpoint-2" / checkpoints.SAFE_INDEX).is_file()
    assert "save_pretrained" not in vars(sharded.model)
    resumed = make_trainer(tmp_path / "sharded", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "sharded" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- evaluation ----


class Largest(TorchDispatchMode):
    """The most elements in one tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def test_evaluation_makes_no_tensor_larger_than_training_and_gathers_no_logits(tmp_path, monkeypatch):
    training = make_trainer(tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=4)
    with Largest() as in_training:
        training.train()
    steps: list[tuple[Any, ...]] = []
    whole = MisaTrainer.prediction_step

    def prediction_step(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        steps.append(whole(self, *args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(MisaTrainer, "prediction_step", prediction_step)
    with Largest() as in_evaluation:
        training.evaluate()
    assert len(steps) == 6 and all(step[1] is None and step[2] is None for step in steps)
    assert in_evaluation.numel <= in_training.numel


def test_evaluation_batches_are_as_large_as_training_batches_unless_given():
    def sizes(*options: str) -> tuple[int, int]:
        sft = parse_train(["--output_dir", "x", *options]).sft
        return sft.per_device_train_batch_size, sft.per_device_eval_batch_size

    assert sizes("--per_device_train_batch_size", "2") == (2, 2)
    assert sizes("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "5") == (2, 5)
    assert sizes("--per_device_eval_batch_size", "5") == (8, 5)
    assert sizes() == (8, 8)


# ---- the loop ----


def test_no_step_switch_evaluation_or_save_empties_the_cache(workplace, tmp_path, monkeypatch):
    calls: list[str] = []
    stepped = False
    step = MISA.step

    def first_step(self: MISA, *args: Any, **kwargs: Any) -> Any:
        nonlocal stepped
        stepped = True  # accelerate empties the cache once before training, which costs nothing
        return step(self, *args, **kwargs)

    def note(name: str) -> Any:
        return lambda *args, **kwargs: calls.append(name) if stepped else None

    monkeypatch.setattr(MISA, "step", first_step)
    for name in ("torch.cuda.empty_cache", "torch.accelerator.memory.empty_cache", "torch.accelerator.empty_cache"):
        monkeypatch.setattr(name, note(name))
    for name in ("transformers.trainer.clear_device_cache", "accelerate.utils.memory.clear_device_cache"):
        monkeypatch.setattr(name, note(name))
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "eval_fraction": 0.2}
    assert main(words(workplace, tmp_path / "out", **options)) == 0
    assert stepped and calls == []


class Deep(nn.Module):
    """Four layers of one 8 x 8 matrix: the smallest thing that switches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8, bias=False)}) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer["up"](x))
        return x


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_10_000_steps_and_2_000_switches_leave_nothing_behind(tmp_path):
    """With the run log, the clock and both kinds of state that units leave on the host."""
    torch.manual_seed(0)
    model = Deep().bfloat16()
    options = {"leave_rounding": "keep", "revisit": "offload", "cold_start": "none", "rest": "none"}
    optimizer = MISA(model, delta=0.3, inner_steps=5, lr=1e-3, **options)
    log_writer = RunLogWriter(tmp_path, torch.device("cpu"), writer=True)
    log_writer.arm()
    log_writer.remember(model)
    log_writer.begin(0, model, optimizer, {})
    x = torch.randn(4, 8, dtype=torch.bfloat16)

    def train(steps: int) -> tuple[int, int, int]:
        for _ in range(steps):
            log_writer.clock.begin()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            log_writer.clock.end()
        gc.collect()
        held = sum(optimizer.memory().values())
        return len(gc.get_objects()), host_growth.held(), held

    train(5100)  # 1,000 switches: the list of events is full
    log_writer.clock.seconds.extend([0.0] * 10_000)  # and so is the clock's
    objects, resident, held = train(100)
    later = train(4800)
    assert optimizer.total_steps == 10_000 and optimizer.round == 2_000
    assert len(optimizer.events) == 200 and len(log_writer.clock.seconds) == 10_000
    assert later[2] == held
    assert abs(later[0] - objects) < 50  # caches of the interpreter; one object a switch would be 960
    assert later[1] - resident < 1_000_000  # 100 bytes a step are lost in the allocator's pages; 40,000 seen
    log_writer.end(10_000, model, optimizer)


# ---- the allocator's environment ----

SHOW = """
import json, os, sys
from misa_engine.cli import arguments
from misa_engine.cli import main as cli
def show():
    names = {name: os.environ[name] for name in arguments.ALLOCATOR_VARIABLES if name in os.environ}
    print(json.dumps({"torch": "torch" in sys.modules, **names}))
    raise SystemExit
arguments.build_parser = show
cli.main(["train", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="growing segments exist on Linux only")
def test_misa_train_lets_segments_grow_unless_shell_or_file_say_otherwise(tmp_path):
    def shown(file: str = "", **shell: str) -> dict[str, Any]:
        config = tmp_path / "run.yaml"
        config.write_text(f"delta: 0.1\n{file}")
        clean = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
        command = [sys.executable, "-c", SHOW, "--config", str(config)]
        done = subprocess.run(command, env={**clean, **shell}, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        assert found.pop("torch") is False, "torch reads its environment when it is imported"
        return found

    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    assert shown() == {new: "expandable_segments:True"}
    assert shown(**{new: "max_split_size_mb:64"}) == {new: "max_split_size_mb:64"}
    assert shown(**{old: "max_split_size_mb:64"}) == {old: "max_split_size_mb:64"}  # torch reads the old name first
    assert shown(f"env: {{{new}: 'expandable_segments:False'}}") == {new: "expandable_segments:False"}
    assert shown(f"env: {{{old}: 'expandable_segments:False'}}") == {old: "expandable_segments:False"}
