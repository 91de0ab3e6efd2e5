"""A method named with options of its own, as in ``misa:rest=sign:delta=0.03``: a row beside the plain ``misa``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from misa_engine.bench.baselines import BASELINES, OURS
from misa_engine.errors import UserError, did_you_mean
from misa_engine.method.config import MisaConfig, check_choice
from misa_engine.planner.residents import without_rest
from misa_engine.planner.speeds import FORMATS

CONFIG = tuple(entry.name for entry in fields(MisaConfig))
#: Options that are settings of the case, and a format that MisaConfig does not know.
SHARED = ("delta", "inner_steps", "residents")


def name_of(text: str) -> str:
    """The method's name without its options."""
    return text.partition(":")[0]


def file_name(name: str, ending: str = ".json") -> str:
    """The name of a run or a method as a file's."""
    return re.sub(r"[^\w.=-]+", "_", name) + ending


def options_of(text: str, method: str, own: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of a named method: those of MisaConfig and those of the case, both empty where none are given.

    Args:
        text: name and options. ``residents=int8`` among them lets what is not drawn rest in 8 bits.
        method: of BASELINES, that trains.
        own: options that the method has already, MisaConfig's among them; those in ``text`` win.

    Raises:
        UserError: options of a method that is not MISA's, an unknown one, or a value that MisaConfig refuses.
    """
    name, *words = text.split(":")
    if not words:
        return {}, {}
    if method not in OURS:
        raise UserError(f"{text}: options are MISA's, and {name} is none of its rules.")
    given = dict(_option(text, word) for word in words)
    shared = {key: given.pop(key) for key in SHARED if key in given}
    all_options = {**own, **given, **shared}
    try:
        config = MisaConfig.from_dict({name: all_options[name] for name in CONFIG if name in all_options})
        if "residents" in shared:
            check_choice("residents", shared["residents"], FORMATS)
            without_rest(config)  # refuses a rule that was asked for
    except (ValueError, TypeError) as error:
        raise UserError(f"{text}: {error}") from error
    return given, shared


def case_options(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """``options_of`` for a name of BASELINES, with or without options.

    Raises:
        UserError: as ``options_of``.
    """
    name = name_of(text)
    return options_of(text, name, BASELINES[name].options)


def _option(text: str, word: str) -> tuple[str, Any]:
    key, given, value = word.partition("=")
    known = {"residents", *CONFIG}
    if not given or key not in known:
        hint = did_you_mean(key, known)
        raise UserError(f"{text}: {word!r} is no option=value of MisaConfig.{hint}")
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, {"true": True, "false": False}.get(value.lower(), value)
