"""The Trainer's own defaults that would cost a GPU something: autocast, and a filter that reads every loss."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from misa_engine.trainer.mixin import MisaFactory
from misa_engine.trainer.sft import MisaTrainer
from trainer_cases import COMMON, MISA_OPTIONS, logged, plain_trainer, sft_arguments, tiny

pytest_plugins = ["trainer_cases"]


@pytest.mark.parametrize("which", ["MisaTrainer", "Trainer"])
def test_the_default_autocast_of_sft_leaves_gradients_to_the_gemms(which, tmp_path, tokenizer, texts, tokens):
    """SFTConfig's own default is bf16=True: autocast, also over a model that is held in bfloat16."""
    model = tiny().to(torch.bfloat16)
    misa = {"delta": 0.3, "inner_steps": 3, "cold_start": "none"}
    if which == "Trainer":
        training = plain_trainer(tmp_path, tokens, model, misa=misa, bf16=True, max_steps=2)
    else:
        args = SFTConfig(str(tmp_path), max_length=32, **{**COMMON, "max_steps": 2})
        assert args.bf16
        training = MisaTrainer(model, args=args, train_dataset=texts, processing_class=tokenizer, misa=misa)
    optimizer = None
    written, active = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            nonlocal optimizer
            optimizer = training.optimizer.optimizer
            if not active:
                gemm = optimizer._intake._gemm
                write = gemm._written
                gemm._written = lambda name: (written.append(name), write(name))
            active.extend(optimizer.active)

    training.add_callback(Watch())
    training.train()
    assert active and sorted(written) == sorted(active)


class Overflow:
    """Makes the loss of chosen micro-batches infinite; mixed into a trainer class."""

    overflows: tuple[int, ...] = ()
    calls = 0

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        type(self).calls += 1
        return loss * math.inf if self.calls in self.overflows else loss


@pytest.mark.parametrize("filtered", [True, False])
def test_a_loss_that_is_not_finite_is_filtered_from_the_log_without_reading_any_loss(
    filtered, tmp_path, tokenizer, texts, monkeypatch
):
    reads = []
    for name in ("isnan", "isinf"):  # what Trainer asks of every loss, and Python then of the device
        own = getattr(torch, name)

        def asked(x, own=own):
            if sys._getframe(1).f_code.co_filename.endswith("transformers/trainer.py"):
                reads.append(x)
            return own(x)

        monkeypatch.setattr(torch, name, asked)
    losses = {}
    for base in (MisaTrainer, SFTTrainer):
        trainer_class = type("Overflowing", (Overflow, base), {"overflows": (5, 6)})
        options = {"max_steps": 6, "gradient_accumulation_steps": 2, "logging_nan_inf_filter": filtered}
        options |= {"max_grad_norm": 0.0, "per_device_eval_batch_size": 2}
        # the plain trainer names neither the last micro-batch nor the length of the run
        misa = {**MISA_OPTIONS, "rest": "none", "run_steps": options["max_steps"]}
        factory = (MisaFactory, {**misa, "seed": 42, "lr": 1e-2})
        own = {"misa": misa} if base is MisaTrainer else {"optimizer_cls_and_kwargs": factory}
        training = trainer_class(
            tiny(),
            args=sft_arguments(tmp_path / base.__name__, **options),
            train_dataset=texts,
            eval_dataset=texts.select(range(4)),
            processing_class=tokenizer,
            **own,
        )
        monkeypatch.setattr(MisaTrainer, "check_loss", lambda self: None)  # calls compute_loss too
        before = len(reads)
        training.train()
        assert (len(reads) > before) == (filtered and base is SFTTrainer)
        losses[base] = logged(training, "loss")
        trainer_class.overflows = (trainer_class.calls + 1,)
        losses[base].append(training.evaluate()["eval_loss"])
    assert losses[MisaTrainer] == pytest.approx(losses[SFTTrainer], nan_ok=True)
    assert all(map(math.isfinite, losses[MisaTrainer])) == filtered
