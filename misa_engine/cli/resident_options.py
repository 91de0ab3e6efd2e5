"""What goes with ``--residents``; apart from ``residents.py``, which needs the parsed arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from misa_engine.errors import UserError, did_you_mean
from misa_engine.planner.speeds import FORMATS


def check_residents(given: Mapping[str, Any]) -> None:
    """Refuse an unknown format and what cannot be had beside residents; "none" is the same as not given.

    Raises:
        UserError: naming both options and the remedy.
    """
    found = given.get("residents")
    if found in (None, "none"):
        return
    if found not in FORMATS:
        hint = did_you_mean(str(found), (*FORMATS, "none"))
        raise UserError(f"--residents must be one of {', '.join(FORMATS)} or none; got {found!r}.{hint}")
    if given.get("optimizer") == "adamw":
        raise UserError("--residents: AdamW trains all weights at once, which then cannot rest; leave it out.")
    if given.get("rest") not in (None, "none"):
        raise UserError(
            f"--residents {found} with --rest {given['rest']}: the rule moves weights in place on the card, which 8 "
            "bits cannot take. Use --rest none, or leave out --residents."
        )
    if given.get("resize_embeddings"):
        raise UserError("--residents with --resize_embeddings: resize and save the model first, then train the copy.")
    for name in ("fsdp", "deepspeed"):
        if given.get(name):
            raise UserError(f"--residents with --{name}: weights on the host are not sharded; leave one of them out.")
