"""The part of MisaMixin that goes on from a checkpoint: whole, of this model, with these options, exactly."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer

from misa_engine.engine.replicas import lost_ranks
from misa_engine.engine.residents import residents_of
from misa_engine.method.config import MisaConfig
from misa_engine.trainer import checkpoints, compat, completeness, resume_options
from misa_engine.trainer.loading import load_weights
from misa_engine.trainer.log_writer import RunLogWriter
from misa_engine.trainer.manifest import MANIFEST, has_manifest, why_damaged
from misa_engine.trainer.run_lock import lock_run
from misa_engine.trainer.sharding import load_rows, stored_tensors

if TYPE_CHECKING:

    class _Base(Trainer):
        model: Any
        optimizer: Any

        def check_loss(self) -> None: ...
else:
    _Base = object  # the mixin stands before a Trainer class in the bases of whoever uses it

logger = logging.getLogger(__name__)


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Say which checkpoint it is when one of its files cannot be read, and nothing of how to read it unsafely."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, OSError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError) or checkpoint is None:
            raise
        reason = str(error).splitlines()[0] if not isinstance(error, pickle.UnpicklingError) else "no plain tensors"
        raise ValueError(
            f"cannot resume from {checkpoint}: a file is damaged or not a checkpoint's ({reason}). Resume from an "
            "earlier checkpoint."
        ) from error


class ExactResume(_Base):
    """Stands between MisaMixin and the Trainer; uses what MisaMixin sets up."""

    misa_config: MisaConfig
    optimizer_name: str
    log_writer: RunLogWriter
    has_rows: bool
    _changed_options: tuple[str, ...]

    @property
    def _out(self) -> Path:
        return Path(str(self.args.output_dir))

    # ---- before training ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the start or exactly from where a checkpoint was taken.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the last complete one in ``output_dir``.
            *args: as in ``Trainer.train``.
            **kwargs: as in ``Trainer.train``.

        Raises:
            ValueError: the checkpoint is missing, incomplete, or of another model or configuration; or the trainer's
                loss is not the plain one (see ``misa_engine.trainer.lean``).
            CheckpointError: a checkpoint could not be written.
            ReplicaError: another process of the run has ended.
        """
        with lock_run(self._out) if self.args.should_save else nullcontext():
            if self.args.should_save:
                checkpoints.recover(self._out)
            self.accelerator.wait_for_everyone()
            checkpoint = self._resume_point(resume_from_checkpoint)
            self.check_loss()
            self.log_writer.arm()
            with lost_ranks(self.args.process_index) if self.args.world_size > 1 else nullcontext():
                return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)

    def _resume_point(self, wanted: str | bool | None) -> Path | None:
        """The checkpoint to go on from, whole, of this model and of a run with these options."""
        if not wanted:
            return None
        if wanted is True:
            checkpoint, lines = completeness.find_resume_point(self._out)
            for line in lines:
                logger.warning(line)
            if checkpoint is None:
                raise ValueError(
                    f"there is no complete checkpoint in {self._out} to resume from; start the run anew"
                    + "".join(f". {line}" for line in lines)
                )
        else:
            checkpoint = Path(wanted)
            self._check_whole(checkpoint)
        if not has_manifest(checkpoint):
            logger.warning("%s has no %s: its files are taken as they are, unverified", checkpoint.name, MANIFEST)
        if not self._is_sharded and not (checkpoint / "optimizer.pt").is_file():
            raise ValueError(
                f"cannot resume from {checkpoint}: it holds no optimizer state (saved with save_only_model?). Start a "
                "new run from its weights: --model_name_or_path with this folder and another output_dir."
            )
        if not self._is_sharded:
            compat.check_same_model(checkpoint, completeness.stored_shapes(checkpoint), self.model)
        self._changed_options = self._compare_options(checkpoint)
        return checkpoint

    def _check_whole(self, checkpoint: Path) -> None:
        reason = completeness.why_incomplete(checkpoint) or why_damaged(checkpoint)
        if reason is not None:
            last = completeness.find_last_complete_checkpoint(checkpoint.parent)
            last = None if last == checkpoint else last
            raise ValueError(
                f"cannot resume from {checkpoint}: {reason}. "
                + (f"The last complete checkpoint there is {last}." if last else "There is no complete checkpoint.")
            )

    def _compare_options(self, checkpoint: Path) -> tuple[str, ...]:
        """Refuse what cannot change on resume; return what did change."""
        stored = resume_options.read_options(checkpoint)
        if stored is None:
            return ()
        found = resume_options.compare(stored, self._options())
        if found.refused:
            raise ValueError(
                f"cannot resume from {checkpoint} with other options: {'; '.join(found.refused)}. Give them as they "
                "were, or start a new run from its weights in another output_dir."
            )
        step = completeness.checkpoint_step(checkpoint)
        for line in found.changed:
            logger.warning("from step %d on: %s", step, line)
        return found.changed

    def _options(self) -> dict[str, Any]:
        residents = residents_of(self.model)
        rested = "none" if residents is None else residents.format.name
        return resume_options.collect(self.args, self.misa_config, self.optimizer_name, self.train_dataset, rested)

    @property
    def is_finished(self) -> bool:
        """Whether the run has made all its steps, also before ``train`` when it was resumed from its end."""
        return 0 < self.state.max_steps <= self.state.global_step

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # transformers makes one more step than max_steps when it resumes a finished run inside an epoch
        if self.is_finished:
            logger.warning("the run is finished: %d of %d steps", self.state.global_step, self.state.max_steps)
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # ---- loading ----

    @property
    def _is_sharded(self) -> bool:
        """By accelerate, which then has files of its own; only for the baseline. MISA's rows have ordinary files."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.log_writer.remember(self.model)  # before the checkpoint's weights arrive
        with _readable(resume_from_checkpoint):
            if not self._load_renamed(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        fresh = [dict(group, params=None) for group in self.optimizer.param_groups] if checkpoint else []
        with _readable(checkpoint):
            if checkpoint and (self.has_rows or self._state_in_parts):
                self._load_whole_state(Path(checkpoint))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint and self._changed_options and not self._is_sharded:
            self._apply_options(fresh)

    def _load_whole_state(self, checkpoint: Path) -> None:
        """As the Trainer, which would put the whole state on every card before the optimizer takes its part."""
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
        scheduler: Any = self.lr_scheduler
        self.optimizer.load_state_dict(state)
        scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))

    @property
    def _state_in_parts(self) -> bool:
        return bool(getattr(getattr(getattr(self, "misa", None), "replicas", None), "state_in_parts", False))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._state_in_parts and not self.args.should_save:
            self.optimizer.state_dict()  # rank 0 writes what all put together
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _apply_options(self, fresh: list[dict[str, Any]]) -> None:
        """Give the groups and the schedule what the arguments say now; loading has brought back what they said then."""
        scheduler: Any = self.lr_scheduler
        for group, new in zip(self.optimizer.param_groups, fresh, strict=True):
            group.update({name: new[name] for name in ("betas", "eps", "weight_decay", "initial_lr") if name in new})
        if not hasattr(scheduler, "lr_lambdas"):
            if any(line.startswith(("learning_rate:", "lr_scheduler")) for line in self._changed_options):
                raise ValueError(
                    f"the schedule {self.args.lr_scheduler_type} keeps the learning rate of its checkpoint: give "
                    "learning_rate and lr_scheduler_type as they were"
                )
            return
        scheduler.base_lrs = [new.get("initial_lr", new["lr"]) for new in fresh]
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _load_best_model(self) -> None:
        if not self._load_renamed(Path(str(self.state.best_model_checkpoint))):
            super()._load_best_model()

    def _load_renamed(self, checkpoint: Path) -> bool:
        """Load weights whose names in the file are not the model's, or those of a model with residents or of rows
        tensor by tensor; False when the Trainer can do it itself.
        """
        if self._is_sharded:
            return False
        if not compat.check_same_model(checkpoint, completeness.stored_shapes(checkpoint), self.model):
            if self.has_rows:
                load_rows(self.model, stored_tensors(completeness.weight_files(checkpoint)))
                return True
            files = completeness.weight_files(checkpoint) if residents_of(self.model) is not None else []
            load_weights(self.model, files)
            return bool(files)
        compat.load_renamed(checkpoint, self.model)
        return True
