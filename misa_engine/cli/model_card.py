"""The model card that a TRL trainer writes, and when it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class KeepsReadme:
    """For a TRL trainer: no model card over a README.md of the user's, and none with links to a Hub model."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's card where the model is pushed to the Hub and there is none; TRL calls it at each checkpoint."""
        trainer: Any = self
        if trainer.args.push_to_hub and not Path(str(trainer.args.output_dir), "README.md").exists():
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]
