"""MisaTrainer: TRL's supervised fine-tuning with MISA. In a file of its own because trl is an extra."""

from __future__ import annotations

try:
    from trl import SFTTrainer
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise ModuleNotFoundError(
        "MisaTrainer needs TRL, which is not installed: pip install 'misa_engine[train]'", name="trl"
    ) from error

from misa_engine.trainer.mixin import MisaMixin


class MisaTrainer(MisaMixin, SFTTrainer):
    """TRL's SFTTrainer, trained by MISA.

    Takes the arguments of SFTTrainer and, by keyword, ``misa`` (a MisaConfig or a mapping of its fields) and
    ``optimizer`` ("misa", or "adamw" for the baseline).

    Example:
        >>> trainer = MisaTrainer(model, args=SFTConfig("out"), train_dataset=data, misa={"delta": 0.03})
        >>> trainer.train()
        >>> trainer.save_model()
    """

    _tag_names = [*SFTTrainer._tag_names, "misa"]
