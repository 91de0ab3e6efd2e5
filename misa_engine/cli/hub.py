"""Whether the Hub can be reached, asked once and quickly: its client tries for half a minute before it says no."""

from __future__ import annotations

import functools
from pathlib import Path

from misa_engine.errors import UserError

#: Seconds to wait for an answer.
PATIENCE = 5.0


def is_path(name: str) -> bool:
    """Whether a name is written as a path on this machine and can be no id on the Hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@functools.cache
def why_unreachable() -> str | None:
    """Why no connection to the Hub can be made; None where one can."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception as error:  # of whichever HTTP library the Hub's client is built on; the text goes to the user
        return " ".join(str(error).split()) or type(error).__name__
    return None


def check_reachable(name: str, file: str, option: str) -> None:
    """Refuse a Hub id that is neither in the cache nor to be had, before anything waits for it.

    A cached one is used as it is: the Hub's client is told not to ask for a newer one.

    Args:
        name: a local path, or ``owner/name`` on the Hub.
        file: that must be in the cache for the name to be usable without a network (``config.json``).
        option: that the user gave it with.

    Raises:
        UserError: in one line, with what to do.
    """
    if Path(name).expanduser().exists():
        return
    reason = why_unreachable()
    if reason is None:
        return
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        cached = isinstance(try_to_load_from_cache(name, file), str)
    except ValueError:  # not even the form of an id: the loader says so
        return
    if not cached:
        raise UserError(
            f"{option} {name}: there is no such directory in {Path.cwd()}, it is not in the Hub's cache, and "
            f"{constants.ENDPOINT} cannot be reached ({reason}). Download it where there is a network (hf download "
            f"{name}) and name the directory."
        )
    constants.HF_HUB_OFFLINE = True
