"""MisaMixin goes on from checkpoints and saves them, whatever the disk does."""

from __future__ import annotations

import errno
import json
import logging

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from misa_engine.report.log import RunLog
from misa_engine.trainer import checkpoints, completeness
from misa_engine.trainer.checkpoints import CheckpointError
from misa_engine.trainer.mixin import MisaMixin
from trainer_cases import COMMON, MISA_OPTIONS, log_of, plain_trainer, timeless, tiny
from training import changed, weights

pytest_plugins = ["trainer_cases"]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    for name in ("transformers", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


# ---- resuming ----


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    assert changed(weights(a), b) == set()


@pytest.mark.parametrize("preset", ["engine", "paper", "official"])
def test_a_plain_trainer_resumes_bitwise_in_the_middle_of_a_round(tmp_path, tokens, preset):
    options = {"misa": {"preset": preset}, "save_strategy": "steps", "save_steps": 7, "max_steps": 20}
    whole = plain_trainer(tmp_path / "a", tokens, **options)
    whole.train()
    resumed = plain_trainer(tmp_path / "b", tokens, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-7"))
    assert_same_weights(whole.model, resumed.model)
    assert whole.optimizer.optimizer.scores == resumed.optimizer.optimizer.scores
    assert whole.optimizer.optimizer.active == resumed.optimizer.optimizer.active


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"gradient_checkpointing": True, "gradient_accumulation_steps": 2}, torch.bfloat16),
        ({"optimizer": "adamw"}, torch.float32),
        ({"misa": {**MISA_OPTIONS, "rest": "sign"}, "gradient_accumulation_steps": 2}, torch.bfloat16),
    ],
    ids=["fp32", "bf16-accumulated", "adamw", "bf16-rest-accumulated"],
)
def test_misa_trainer_resumes_bitwise_and_its_log_reads_like_one_run(misa_trainer, tmp_path, options, dtype):
    """Run a is not interrupted; run b stops at step 13, after its checkpoint of step 10, and goes on from there."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 13:
                raise KeyboardInterrupt

    options = {**options, "save_strategy": "steps", "save_steps": 5, "save_total_limit": 1, "max_steps": 17}
    whole = misa_trainer("a", model=tiny().to(dtype), **options)
    whole.train()
    interrupted = misa_trainer("b", model=tiny().to(dtype), callbacks=[Stop()], **options)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert log_of(interrupted)[-1]["step"] > 10
    resumed = misa_trainer("b", model=tiny().to(dtype), **options)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(whole.model, resumed.model)
    first, second = ([timeless(entry) for entry in log_of(run)] for run in (whole, resumed))
    for kept in ("switch", "metrics", "end", "run"):
        ours = [entry for entry in first if entry["type"] == kept and "train_loss" not in entry]
        assert ours == [entry for entry in second if entry["type"] == kept and "train_loss" not in entry]
    assert [path.name for path in completeness.list_checkpoints(tmp_path / "b")] == ["checkpoint-17"]


def test_families_that_transformers_saves_under_other_names_resume_exactly(tmp_path, tokens):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "logging_steps": 100}
    for family in ("mixtral", "gpt_neox"):
        runs = []
        for part in ("whole", "resumed"):
            out = tmp_path / family

            class MisaPlainTrainer(MisaMixin, Trainer):
                pass

            training = MisaPlainTrainer(
                tiny(family),
                args=TrainingArguments(str(out), **{**COMMON, **options}),
                train_dataset=tokens,
                misa=MISA_OPTIONS,
            )
            training.train(resume_from_checkpoint=str(out / "checkpoint-3") if part == "resumed" else None)
            runs.append(training)
        assert_same_weights(runs[0].model, runs[1].model)


def test_a_checkpoint_of_another_run_is_refused_and_nothing_on_disk_changes(misa_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    misa_trainer(**options).train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    attempts = (
        ({"misa": {**MISA_OPTIONS, "delta": 0.3}}, "delta: 0.2 in the checkpoint, 0.3 here"),
        ({"misa": {**MISA_OPTIONS, "preset": "paper"}}, "preset: 'engine' in the checkpoint, 'paper' here"),
        ({"misa": {**MISA_OPTIONS, "granularity": "layer", "delta": 0.5}}, "granularity"),
        ({"model": tiny(num_hidden_layers=3)}, "another model"),
        ({"model": tiny(hidden_size=48)}, "another model"),
    )
    for changes, word in attempts:
        with pytest.raises(ValueError, match=word):
            misa_trainer(**{**options, **changes}).train(resume_from_checkpoint=True)
        assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_resuming_from_what_is_no_checkpoint_says_what_is_missing(misa_trainer, tmp_path):
    training = misa_trainer(save_strategy="steps", save_steps=2, max_steps=4)
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        training.train(resume_from_checkpoint=True)
    training.train()
    damaged = tmp_path / "run" / "checkpoint-4" / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(ValueError, match="optimizer.pt is damaged.*last complete checkpoint there is.*checkpoint-2"):
        misa_trainer().train(resume_from_checkpoint=str(damaged.parent))
    damaged.unlink()
    with pytest.raises(ValueError, match="optimizer.pt is missing"):
        misa_trainer().train(resume_from_checkpoint=str(damaged.parent))


def test_a_checkpoint_of_weights_alone_says_how_to_use_it(misa_trainer, tmp_path):
    misa_trainer(save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    with pytest.raises(ValueError, match="holds no optimizer state"):
        misa_trainer(max_steps=2).train(resume_from_checkpoint=True)


# ---- saving ----


def test_best_and_last_checkpoint_are_kept_and_their_names_are_real(misa_trainer, tmp_path, texts):
    class Worsen(TrainerCallback):  # the best evaluation is the second one
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = abs(state.global_step - 4)

    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    training = misa_trainer(
        **options,
        max_steps=10,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        eval_dataset=texts.select(range(2)),
        callbacks=[Worsen()],
    )
    training.train()
    run = tmp_path / "run"
    assert [path.name for path in completeness.list_checkpoints(run)] == ["checkpoint-4", "checkpoint-10"]
    assert training.state.best_model_checkpoint == str(run / "checkpoint-4")
    state = json.loads((run / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(run / "checkpoint-4")
    assert_same_weights(training.model, AutoModelForCausalLM.from_pretrained(run / "checkpoint-4"))
    assert not (run / checkpoints.STAGING).exists()


def test_a_checkpoint_on_sigterm_is_published_too(misa_trainer, tmp_path):
    """transformers makes the folder, with a mark in it, before it asks for the checkpoint."""
    from transformers.trainer_jit_checkpoint import CheckpointManager

    training = misa_trainer(max_steps=2)
    training.train()
    CheckpointManager(training).execute_jit_checkpoint()
    assert completeness.find_last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


@pytest.mark.parametrize("writer", ["safetensors", "torch", "rename"])
@pytest.mark.parametrize("optimizer", ["misa", "adamw"])
def test_a_full_disk_keeps_the_last_good_checkpoint(misa_trainer, tmp_path, monkeypatch, writer, optimizer):
    full = OSError(errno.ENOSPC, "No space left on device")
    training = misa_trainer(optimizer=optimizer, save_strategy="steps", save_steps=2, max_steps=6, save_total_limit=1)

    class FillTheDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step != 4:
                return

            def fail(*args, **kwargs):
                raise full

            target = {
                "safetensors": "transformers.modeling_utils.safe_save_file",
                "torch": "torch.save",
                "rename": "os.replace",
            }
            monkeypatch.setattr(target[writer], fail)

    training.add_callback(FillTheDisk())
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="could not write .*checkpoint-4.*No space left.*checkpoint-2"):
        training.train()
    monkeypatch.undo()
    assert [path.name for path in completeness.list_checkpoints(run)] == ["checkpoint-2"]
    assert not (run / checkpoints.STAGING).exists()
    training = misa_trainer(optimizer=optimizer, save_strategy="no", max_steps=6)
    training.train(resume_from_checkpoint=True)
    assert training.state.global_step == 6


def test_a_full_disk_during_the_final_save_keeps_the_older_model(misa_trainer, tmp_path, monkeypatch):
    training = misa_trainer(max_steps=2)
    training.train()
    training.save_model()
    run = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        training.save_model()
    monkeypatch.undo()
    assert before == {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_a_full_disk_for_the_run_log_is_no_traceback_from_inside(misa_trainer, monkeypatch):
    training = misa_trainer(max_steps=6)

    def fail(self, kind, step, **fields):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunLog, "append", fail)
    with pytest.raises(CheckpointError, match="misa_log.jsonl.*no complete checkpoint yet"):
        training.train()
