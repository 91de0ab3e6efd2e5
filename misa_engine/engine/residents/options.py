"""What an optimizer has to do differently for a model with residents."""

from __future__ import annotations

import logging

from misa_engine.engine.residents.store import Residents
from misa_engine.method.config import MisaConfig

logger = logging.getLogger(__name__)


def for_residents(config: MisaConfig, residents: Residents | None) -> MisaConfig:
    """The config that a model with residents trains with: a preset's own rest rule is off, and that is said.

    Raises:
        ValueError: the caller named a rest rule, or divides the state over processes.
    """
    if residents is None:
        return config
    if config.shard_state:
        raise ValueError(
            "shard_state=True with residents in 8 bits: what is drawn trains in the arena's own memory, of which each "
            "process would have a part. Leave out one of the two."
        )
    shared = config.without_own_rest()
    if shared.rest != "none":
        raise ValueError(
            f"rest={config.rest!r} with residents in 8 bits: the rule moves weights in place on the card, by steps far "
            "smaller than a step of 8 bits, and the exact weights lie on the host. Use rest='none', or load the model "
            "without residents."
        )
    if shared is not config:
        logger.warning(
            "rest is 'none' with residents in 8 bits: the preset's rule %r would have to move weights in place on the "
            "card, by steps far smaller than those of 8 bits. Matrices outside the draw stand still; expect more steps "
            "to the same loss than without residents.",
            config.rest,
        )
    return shared
