r"""What a generated text answers: the choice that it names, its last number, its letter. Total: any text has a result.

The published scripts of LLM-Adapters take the first match of ``true|false``, ``answer1|answer2|…`` and so on in the
response, and of a solution the last ``-?\d+\.?\d*`` without commas. So do these, with what malformed generations
need beside: case does not matter, a word is a whole word (``answer1`` is not in ``answer12``, and holds no number 1), a
minus after a digit subtracts, one before a currency counts, fractions are read as numbers, no answer is None.

On the generations that LLM-Adapters' own test files carry (8166572), GSM8K's 1,319 and SVAMP's 1,000 are marked alike
by their rule and by this one, without an exception; AQuA's 254 get the letter that MISA's published code reads (the
last capital A to E) but for one, which names none. The first capital A to E, LLM-Adapters' rule, marks 34 of them
otherwise: it takes the A of "Answer" and the B of "But".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_NUMBER = re.compile(
    r"(?<![\d.\w])"  # not within a word or a number
    r"(?P<sign>[-−])?(?:[$€£¥]\s?)?(?P<minus>[-−])?"  # -$5 and $-5; in "10 - 7" the minus subtracts
    r"(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<part>\.\d+)?"
    r"(?:\s?/\s?(?P<under>\d+(?:\.\d+)?))?"
)
#: Letters that a text declares to be its answer, nearest to its end counts.
_DECLARED = re.compile(
    r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?([A-E]\b(?!')|[a-e](?=[).]|\s*$))"
    r"|\(([A-Ea-e])\)|####\s*([A-Ea-e])\b"
)
_ALONE = re.compile(r"(?<![\w'])([B-E]|A(?!\s+[a-z]))(?![\w'])")  # "A man" names no answer


def choice(text: str, words: Sequence[str]) -> str | None:
    """The first of ``words`` that the text names, in the spelling of ``words``; None when it names none."""
    found = re.search(rf"(?<![a-z0-9])({'|'.join(map(re.escape, words))})(?![a-z0-9])", text.lower())
    return next(word for word in words if word.lower() == found[1]) if found else None


def number(text: str) -> float | None:
    """The last number: ``1,234.50``, ``$5``, ``50%`` (50), ``-3``, ``3/4`` (0.75); None without one."""
    value = None
    for found in _NUMBER.finditer(text):
        if found["whole"] is None and found["part"] is None:
            continue
        one = float((found["whole"] or "0").replace(",", "") + (found["part"] or ""))
        if found["under"]:
            if float(found["under"]) == 0:
                continue
            one /= float(found["under"])
        value = -one if found["sign"] or found["minus"] else one
    return value if value is None or math.isfinite(value) else None


def letter(text: str) -> str | None:
    """The letter A to E that the text declares (``the answer is (C)``), else the last that stands alone."""
    declared = _DECLARED.findall(text)
    if declared:
        return next(one for one in declared[-1] if one).upper()
    alone = _ALONE.findall(text)
    if alone:
        return str(alone[-1])
    bare = text.strip().strip("().").upper()
    return bare if bare in tuple("ABCDE") else None
