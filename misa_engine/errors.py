"""The user's own mistakes, and how a failure becomes one line and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Stopped(KeyboardInterrupt):
    """A signal ended the run in good order; the message says how far it came and how to go on.

    Args:
        message: for the user.
        number: of the signal. ``misa`` exits with 128 more, as shells expect.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class UserError(ValueError):
    """Bad input: the message says what is wrong, what was found and what to do. ``misa`` exits with 2."""


@contextmanager
def bad_input(doing: str = "") -> Iterator[None]:
    """Turn a ValueError raised inside into a UserError, for steps that do nothing but check and build the input."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{doing}: {error}" if doing else str(error)) from error


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """A question naming the closest known word, with a space before it; empty when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def exit_code(error: BaseException) -> int:
    """2 for a UserError and for a ValueError that misa_engine itself raised, 128 + signal where one ended the
    run (130 for Ctrl-C), 1 for the rest.

    The engine raises ValueError for nothing but bad input; the same class from a library in the middle of a run says
    nothing about who is to blame, hence the look at the innermost frame.
    """
    if isinstance(error, Stopped):
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, UserError):
        return BAD_INPUT
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    # By module name: a path would give another answer for an editable install and for packages behind a link.
    ours = frame is not None and str(frame.tb_frame.f_globals.get("__name__")).partition(".")[0] == __package__
    return BAD_INPUT if isinstance(error, ValueError) and ours else FAILED
