"""What the commands' argument parsers share: errors as UserError with a spelling hint, types and plain values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, NoReturn

from misa_engine.errors import UserError, did_you_mean

#: Every command takes a model under both names: short to type, and as transformers calls it.
MODEL_FLAGS = ("--model", "--model_name_or_path")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors that name the command and the closest known option.

    Abbreviations are off (a script must not change its meaning when an option is added), and every option is known
    with hyphens as well as with underscores.

    Args:
        prog: the command, as typed: "misa plan".
        usage: of ``--help``.
        description: of ``--help``.
        **kwargs: more for ``argparse.ArgumentParser``.
    """

    def __init__(self, prog: str, usage: str | None = None, description: str | None = None, **kwargs: Any):
        super().__init__(prog=prog, usage=usage, description=description, allow_abbrev=False, **kwargs)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """As in argparse; ``--max-length`` is understood where ``--max_length`` is added."""
        if kwargs.get("help"):  # argparse formats help with %, and fails on "5% of it" when help is asked for
            kwargs["help"] = re.sub(r"(?<!%)%(?![(%])", "%%", kwargs["help"])
        action = super().add_argument(*names, **kwargs)
        for name in names:
            if name.startswith("--") and "_" in name:  # not in option_strings: help shows each option once
                self._option_string_actions[name.replace("_", "-")] = action
        return action

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print before it exits.

        Raises:
            UserError: always.
        """
        word = next((word for word in message.split() if word.startswith("--")), "").split("=")[0].lstrip("-")
        known = [flag.lstrip("-") for action in self._actions for flag in action.option_strings]
        hint = did_you_mean(word, known, "--") if message.startswith("unrecognized") else ""
        raise UserError(f"{self.prog}: {message}.{hint} See {self.prog} --help.")


def truth(text: str) -> bool:
    """An argparse type: true, yes, 1, on and their opposites."""
    if text.lower() in ("true", "yes", "1", "on"):
        return True
    if text.lower() in ("false", "no", "0", "off"):
        return False
    raise argparse.ArgumentTypeError(f"true or false, not {text!r}")


def names(text: str) -> tuple[str, ...]:
    """An argparse type: words separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = _number(int, text, "a whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1, not {text}")
    return value


def positive_size(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = _number(float, text, "a number")
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"a number above 0, not {text}")
    return value


def plain(value: Any) -> Any:
    """The value of an option in types that YAML has."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _number(kind: Any, text: str, what: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{what}, not {text!r}") from None
