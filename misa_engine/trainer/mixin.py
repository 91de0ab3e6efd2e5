"""MISA under the Hugging Face Trainer: a factory for any trainer, a mixin that does the whole job, and MisaTrainer.

    Trainer(..., optimizer_cls_and_kwargs=(MisaFactory, {"lr": 1e-5, "delta": 0.03}))     any Trainer or TRL trainer
    MisaTrainer(model, args=SFTConfig(...), misa={"delta": 0.03}, train_dataset=...)      TRL's SFTTrainer and MISA
    class MisaDPOTrainer(MisaMixin, DPOTrainer): ...                                      the same for another trainer

The mixin clips inside MISA's own update, logs what the sampler does, writes the run log, saves checkpoints that are
complete or absent, and resumes exactly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from misa_engine.engine.optimizer import MISA
from misa_engine.engine.replicas import Replicas
from misa_engine.engine.sharded.mesh import for_shards
from misa_engine.method.config import MisaConfig, check_choice
from misa_engine.trainer import checkpoints, resume_options
from misa_engine.trainer.compat import (
    check_arguments,
    config_from_arguments,
    leave_state_in_place,
    mark_prepared,
    prepare_unwrapped,
)
from misa_engine.trainer.lean import LossCheck
from misa_engine.trainer.log_writer import RunLogWriter, describe_residents, describe_run, sampler_metrics
from misa_engine.trainer.model_config import restored_config, training_fields
from misa_engine.trainer.resident_check import ResidentLosses, resident_losses
from misa_engine.trainer.resuming import ExactResume
from misa_engine.trainer.sharding import Sharding, check_rows, has_rows, shard_model, unaware, whole_weights

logger = logging.getLogger(__name__)


class MisaFactory:
    """Makes MISA where a Trainer wants an optimizer: ``optimizer_cls_and_kwargs=(MisaFactory, {...})``.

    The Trainer calls ``MisaFactory()(model, **kwargs)``, so MISA sees the model with its parameter names. The keyword
    arguments are MisaConfig's fields; nothing is taken from the TrainingArguments. For trainers that do not pass the
    argument on (TRL's DPOTrainer): ``trainer.optimizer_cls_and_kwargs = (MisaFactory, {...})`` before ``train()``.
    """

    def __call__(self, model: nn.Module, **options: Any) -> MISA:
        """Build the optimizer for ``model``; with several processes, keep accelerate from wrapping the model."""
        if options.get("shard_state") and Replicas.join() is not None:
            raise ValueError(
                "shard_state=True with a plain Trainer, which asks rank 0 alone for the optimizer's state when it "
                "saves, where all processes have a part of it. Use MisaTrainer or MisaMixin, or leave it out."
            )
        optimizer = MISA(model, **options)
        if optimizer.replicas is not None:
            mark_prepared(model)
        return optimizer


class _RunCallback(TrainerCallback):
    """Tells the log_writer when training begins and ends and when a step does."""

    def __init__(self, trainer: MisaMixin):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if trainer.is_finished and trainer.log_writer.has_end():
            return  # nothing will happen that is worth a line
        if args.should_save:
            aside = checkpoints.set_aside_after(Path(str(args.output_dir)), state.global_step)
            if aside is not None:
                logger.warning("checkpoints after step %d are now in %s", state.global_step, aside)
        description = describe_run(trainer.misa_config, trainer.optimizer_name, args.device)
        description |= describe_residents(trainer.model, trainer.resident_losses)
        trainer.log_writer.begin(state.global_step, trainer.model, trainer.misa, description)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.log_writer.clock.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.log_writer.clock.end()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.log_writer.end(state.global_step, self.trainer.model, self.trainer.misa)


class MisaMixin(ExactResume):
    """Puts MISA into the Trainer class that follows it in the bases.

    Args:
        *args: the trainer's own arguments.
        misa: MISA's options; learning rate, betas, eps, weight decay, seed and max_grad_norm come from the training
            arguments unless given here.
        optimizer: "misa", or "adamw" for the baseline: all parameters, torch's fused AdamW, everything else the same.
        **kwargs: the trainer's own arguments.

    Raises:
        ValueError: fp16, reentrant checkpointing, DeepSpeed, FSDP1, or an optimizer given by other means.
    """

    def __init__(
        self,
        *args: Any,
        misa: MisaConfig | Mapping[str, Any] | None = None,
        optimizer: str = "misa",
        **kwargs: Any,
    ):
        check_choice("optimizer", optimizer, ("misa", "adamw"))
        model, sharding = kwargs.get("model", args[0] if args else None), None
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, TrainingArguments)), None)
        if given is not None and optimizer == "misa":
            config = config_from_arguments(given, misa)
            check_arguments(given, config)  # before the model is touched
            check_rows(model)
            sharding = Sharding.asked_for(given)
        if kwargs.get("optimizer_cls_and_kwargs") is not None or any(kwargs.get("optimizers") or ()):
            raise ValueError(
                f"{type(self).__name__} makes its own optimizer; leave out optimizers and optimizer_cls_and_kwargs, or "
                "use a plain Trainer with optimizer_cls_and_kwargs=(MisaFactory, {...})."
            )
        if optimizer == "adamw" and has_rows(model):
            raise ValueError(
                "the baseline's checkpoints hold whole weights and their state; this model's are rows (fully_shard). "
                "Give it the model from before sharding, or compare with a smaller one."
            )
        self._own_config = training_fields(model)
        if sharding is not None and given is not None and not has_rows(model):
            if not isinstance(model, nn.Module):
                raise ValueError(f"fsdp needs the model itself, which is then sharded in place; got {model!r}")
            misa = for_shards(config)  # before the model is touched; a rest rule that is off is said once
            shard_model(model, sharding, given.device, misa.family)
        with unaware(given) if sharding is not None and given is not None else nullcontext():
            super().__init__(*args, **kwargs)
        self.has_rows = has_rows(self.model)
        if optimizer == "misa" and self.is_fsdp_enabled:
            raise ValueError(
                "accelerate was set up with FSDP before this trainer, and would shard in its own way. Make no "
                "Accelerator before it, and give it args with fsdp=True."
            )
        self.misa_config = config_from_arguments(self.args, misa)
        if optimizer == "misa" and self.args.world_size > 1:
            prepare_unwrapped(self.accelerator)
            if self.has_rows or self.misa_config.shard_state:
                leave_state_in_place(self.accelerator)
        if optimizer == "misa" and self.has_rows:
            self.misa_config = for_shards(self.misa_config)  # as checkpoints say, so that one process can go on
        self.optimizer_name = optimizer
        self.log_writer = RunLogWriter(self._out, self.args.device, writer=self.is_world_process_zero())
        self._max_norm = self.misa_config.max_grad_norm or self.args.max_grad_norm or math.inf
        self._staged_checkpoint: Path | None = None
        self._push_later: list[str] = []
        self._loss_checked = self._filters_loss = False
        self._changed_options: tuple[str, ...] = ()
        self.resident_losses: ResidentLosses | None = None
        self.add_callback(_RunCallback(self))

    # ---- optimizer and clipping ----

    @property
    def misa(self) -> MISA | None:
        """The MISA optimizer, out of accelerate's wrapper; None before training and for the baseline."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, MISA) else None

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As in Trainer; tells MISA the run's length, of which the cold start gets a share."""
        values = super().set_initial_training_values(*args, **kwargs)
        if self.misa_config.run_steps is None:
            self.misa_config = self.misa_config.altered(run_steps=values[-1])  # max_steps
        return values

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Build MISA, or the baseline's AdamW, over the model."""
        model = self.model if model is None else model
        self.log_writer.remember(model)
        if self.optimizer is None and self.optimizer_name == "misa":
            self.optimizer = MISA(model, self.misa_config)
            self.optimizer.measure_on_arrival = False  # _get_grad_norm measures every step, before clipping
        elif self.optimizer is None:
            config = self.misa_config
            decayed = set(self.get_decay_parameter_names(model))  # the Trainer's own choice: no norms, no biases
            groups = [
                {
                    "params": [p for name, p in model.named_parameters() if (name in decayed) == decay],
                    "weight_decay": rate,
                }
                for decay, rate in ((True, config.weight_decay), (False, 0.0))
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch, as in Trainer; tells MISA whether it is the last of its step."""
        if self.misa is not None:
            self.misa.last_micro_batch = self.accelerator.sync_gradients
        return self._finite_for_the_log(super().training_step(*args, **kwargs))

    def _finite_for_the_log(self, loss: Tensor) -> Tensor:
        """``logging_nan_inf_filter`` without its two waits for the device in every micro-batch, to the same numbers.

        Where it is on, Trainer reads the loss to see whether it is finite, and if not logs the mean so far instead.
        """
        mean_of = getattr(self, "_tr_loss", None)
        if mean_of is None:  # an older transformers, which keeps the sum to itself and goes on filtering
            return loss
        if self.args.logging_nan_inf_filter:
            self.args.logging_nan_inf_filter, self._filters_loss = False, True
        if not self._filters_loss:
            return loss
        steps = 1 + self.state.global_step - self._globalstep_last_logged
        return torch.where(loss.isfinite(), loss, mean_of / steps)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, which leaves losses that are not finite out of the mean here too."""
        given = self.args.logging_nan_inf_filter
        self.args.logging_nan_inf_filter = given or self._filters_loss
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = given

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        misa = self.misa
        if misa is None:
            return self.accelerator.clip_grad_norm_(model.parameters(), self._max_norm)
        return misa.clip_grad_norm_(self._max_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        misa = self.misa
        if misa is not None and grad_norm is None:  # the arguments ask for no clipping
            grad_norm = misa.clip_grad_norm_(self._max_norm)
        return super()._get_grad_norm(model, grad_norm)

    # ---- the loss ----

    def check_loss(self) -> None:
        """Put the lean forward in and hold it to the plain loss: once, before the optimizer exists.

        ``train()`` does this; call it before to know earlier.

        Raises:
            UserError: the losses, or their gradients, differ (see ``misa_engine.trainer.lean``).
        """
        if self._loss_checked or self.optimizer is not None or self.model_init is not None:
            return
        self._loss_checked = True
        if self.args.bf16_full_eval and self.place_model_on_device:  # only then the model is not there yet
            self._move_model_to_device(self.model, self.args.device)
        check = LossCheck.before(self)
        if self.args.use_liger_kernel:  # as super().train() would, in the midst of it; twice is once
            apply_liger_kernel(self.model, self.args.liger_kernel_config)
        if check is not None:
            check.compare()
        self.resident_losses = resident_losses(self)
        if self.resident_losses is not None:
            logger.info(self.resident_losses.describe())
            self.resident_losses.check()

    # ---- saving ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.has_rows:
            state_dict = whole_weights(self.model, keep=self.args.should_save)
        with checkpoints.sharded_saving(self.model), restored_config(self.model, self._own_config):
            super()._save(output_dir, state_dict)

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is being written, the Trainer's own code composes its paths inside the staging folder.
        if self._staged_checkpoint is not None:
            return str(self._staged_checkpoint.parent)
        return super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        writer, best = self.args.should_save, self.state.best_model_checkpoint
        self._push_later = []
        with checkpoints.staging(final, self._out, writer=writer) as staged:
            self.accelerator.wait_for_everyone()  # until the folder is there: each process saves its random state
            try:
                self._staged_checkpoint = staged
                super()._save_checkpoint(model, trial)
                best_step = self.state.best_global_step
                best_now = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best_step}"
                if best_step and (best_now == final or best_now.is_dir()):
                    best = str(best_now)
            finally:
                self._staged_checkpoint = None
                self.state.best_model_checkpoint = best  # never a path inside the staging folder
            if writer:
                self.state.save_to_json(str(staged / "trainer_state.json"))
                resume_options.write_options(staged, self._options())
            self.accelerator.wait_for_everyone()
            if writer:
                checkpoints.publish(staged, final)
        if writer:
            checkpoints.rotate(run_dir, self.args.save_total_limit, keep=[final, *([Path(best)] if best else [])])
        for folder in self._push_later:
            super()._push_from_checkpoint(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Uploading runs in the background and needs a folder that stays: wait until the checkpoint has its name.
        if self._staged_checkpoint is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._push_later.append(str(self._staged_checkpoint.parent.parent / self._staged_checkpoint.name))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that each of its files appears whole, and an older model stays until then.

        Raises:
            CheckpointError: a file could not be written.
        """
        if self._staged_checkpoint is not None:
            super().save_model(output_dir, _internal_call)
            return
        target = self._out if output_dir is None else Path(output_dir)
        writer = self.args.should_save
        with checkpoints.staging(target / "model", self._out, writer=writer) as staged:
            super().save_model(str(staged), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if writer:
                checkpoints.install_files(staged, target)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # ---- what is seen ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the sampler's metrics to the training metrics, and write all of them to the run log."""
        misa = self.misa
        if misa is not None and "loss" in logs:
            logs.update(sampler_metrics(misa))
        super().log(logs, start_time)
        self.log_writer.metrics(self.state.global_step, logs)
