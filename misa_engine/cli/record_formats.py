"""What a record may look like: the shapes that TRL knows and some that become one of them, and checks with a remedy.

A new format of record is one row in FORMATS (supervised) or PREFERENCES (DPO).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from misa_engine.errors import UserError, did_you_mean

#: Characters of one record at most, some million tokens: tokenizers take time and memory that grow faster than that.
LONGEST_RECORD = 1 << 22


@dataclass(frozen=True)
class RecordFormat:
    """One kind of record: the columns that make it, and what becomes of them."""

    name: str
    needed: tuple[str, ...]
    kinds: tuple[str, ...]
    """Kind of each needed column: "text", "messages" (role/content), "turns" (from/value), or "tokens"."""
    optional: tuple[str, ...] = ()
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    rename: tuple[str, str] | None = None

    @property
    def conversational(self) -> bool:
        """Whether a chat template is needed."""
        return any(kind in ("messages", "turns") for kind in self.kinds)


def instruction_to_prompt(record: Mapping[str, Any]) -> dict[str, Any]:
    """Alpaca's three columns as prompt and completion, under plain headings."""
    parts = [f"### Instruction:\n{record['instruction'].strip()}"]
    if (record.get("input") or "").strip():
        parts.append(f"### Input:\n{record['input'].strip()}")
    return {"prompt": "\n\n".join(parts) + "\n\n### Response:\n", "completion": record["output"].strip()}


def explicit_prompt(record: Mapping[str, Any]) -> dict[str, Any]:
    """Preferences whose answers may repeat the conversation before them: what both begin with is the prompt.

    Where they share nothing, the prompt's own column, a text, is what the user said.
    """
    chosen, rejected = record["chosen"], record["rejected"]
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared] if shared else [{"role": "user", "content": record["prompt"]}]
    return {"prompt": prompt, "chosen": chosen[shared:], "rejected": rejected[shared:]}


def pair_to_prompt(prompt: str, completion: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """Two columns under other names as prompt and completion, as they are."""
    return {"prompt": record[prompt], "completion": record[completion]}


#: What ShareGPT's dialects call the speakers, in the words of chat templates. Others keep their name.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bot": "assistant"}


def turns_to_messages(record: Mapping[str, Any]) -> dict[str, Any]:
    """ShareGPT's from/value turns as role/content messages. TRL renames the keys, but leaves the role "gpt"."""
    turns = record["conversations"]
    return {"messages": [{"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]} for turn in turns]}


CHAT_EXTRAS = ("tools", "chat_template_kwargs")
#: Other names under which prompt and completion are found.
PAIRS = (("prompt", "response"), ("question", "answer"), ("query", "response"), ("instruction", "response"))
#: First match wins; the kind is read off the first record. ``{text}`` stands for --dataset_text_field.
FORMATS = (
    RecordFormat("tokens", ("input_ids",), ("tokens",), optional=("labels", "completion_mask", "assistant_masks")),
    RecordFormat("messages", ("messages",), ("messages",), optional=CHAT_EXTRAS),
    RecordFormat(
        "messages", ("conversations",), ("messages",), optional=CHAT_EXTRAS, rename=("conversations", "messages")
    ),
    RecordFormat("ShareGPT conversations", ("conversations",), ("turns",), CHAT_EXTRAS, turns_to_messages),
    RecordFormat(
        "prompt/completion messages", ("prompt", "completion"), ("messages", "messages"), optional=CHAT_EXTRAS
    ),
    RecordFormat("prompt/completion", ("prompt", "completion"), ("text", "text")),
    RecordFormat("instruction/output", ("instruction", "output"), ("text", "text"), ("input",), instruction_to_prompt),
    *(
        RecordFormat(
            f"{prompt}/{completion}", (prompt, completion), ("text", "text"), (), partial(pair_to_prompt, *pair)
        )
        for pair in PAIRS
        for prompt, completion in [pair]
    ),
    RecordFormat("text", ("{text}",), ("text",)),
)
#: What --objective dpo trains on, first match first.
PREFERENCES = (
    RecordFormat(
        "preference messages", ("prompt", "chosen", "rejected"), ("messages", "messages", "messages"), CHAT_EXTRAS
    ),
    RecordFormat(
        "preference messages after a text prompt",
        ("prompt", "chosen", "rejected"),
        ("text", "messages", "messages"),
        CHAT_EXTRAS,
        explicit_prompt,
    ),  # fmt: skip
    RecordFormat("preferences", ("prompt", "chosen", "rejected"), ("text", "text", "text")),
    RecordFormat("whole conversations by preference", ("chosen", "rejected"), ("messages", "messages"), CHAT_EXTRAS),
    RecordFormat("whole texts by preference", ("chosen", "rejected"), ("text", "text")),
)
OBJECTIVES = {"sft": FORMATS, "dpo": PREFERENCES}
#: Every column that any format knows by name.
COLUMNS = tuple(
    dict.fromkeys(name for format in (*FORMATS[:-1], *PREFERENCES) for name in (*format.needed, *format.optional))
) + ("text",)
NEEDED = (
    "'text'; 'prompt' and 'completion' (or 'response'); 'question' and 'answer'; 'messages' (a list of "
    "{role, content}); 'conversations' (a list of {from, value}); or 'instruction' and 'output' with or without "
    "'input'. --columns prompt=q,completion=a says which of yours they are, --dataset_text_field which is the text."
)
NEEDED_PREFERENCES = "'chosen' and 'rejected', best with 'prompt' (--columns chosen=a,rejected=b says which of yours)."


def check_records(
    records: Iterable[tuple[str, Any]],
    source: str,
    text_field: str,
    format: RecordFormat | None = None,
    objective: str = "sft",
) -> RecordFormat:
    """Recognise the format from the first record and hold every other one to it."""
    for place, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{source}, {place}: a record must be an object with named columns; found {_say(record)}.")
        format = format or recognise(record, f"{source}, {place}", text_field, objective)
        problem = record_problem(record, format, text_field)
        if problem:
            raise UserError(f"{source}, {place}: {problem}")
    if format is None:
        raise UserError(f"{source} holds no records.")
    return format


def check_dataset(
    dataset: Any, source: str, text_field: str, format: RecordFormat | None = None, objective: str = "sft"
) -> RecordFormat:
    """The same for a data set in Arrow, where columns of strings need only a look for nulls and lengths."""
    from pyarrow import compute

    if len(dataset) == 0:
        raise UserError(f"{source} holds no records.")
    format = format or recognise(dataset[0], source, text_field, objective)
    columns = needed_columns(format, text_field)
    if set(columns) <= set(dataset.column_names) and all(
        getattr(dataset.features[name], "dtype", "") == "string"
        and dataset.data[name].null_count == 0
        and compute.max(compute.utf8_length(dataset.data[name])).as_py() <= LONGEST_RECORD
        for name in columns
    ):
        return format
    return check_records(((f"record {n}", row) for n, row in enumerate(dataset, 1)), source, text_field, format)


def recognise(record: Mapping[str, Any], place: str, text_field: str = "text", objective: str = "sft") -> RecordFormat:
    """The first format of the objective whose columns are there in the right kind.

    A text column that the user named comes before all.
    """
    partly: str | None = None
    chosen = text_field != "text" and objective == "sft"
    if chosen and text_field not in record:
        found = ", ".join(map(repr, record)) or "nothing"
        raise UserError(f"{place}: there is no column {text_field!r} (--dataset_text_field); found: {found}.")
    for format in FORMATS[-1:] if chosen else OBJECTIVES[objective]:
        columns = needed_columns(format, text_field)
        if all(name in record for name in columns):
            problem = record_problem(record, format, text_field)
            if problem is None:
                return format
            partly = problem  # of the last row: it asks for the simplest kind
    if partly:
        raise UserError(f"{place}: {partly}")
    found = ", ".join(map(repr, record)) or "nothing"
    if objective == "dpo":
        raise UserError(f"{place}: columns found: {found}; --objective dpo needs {NEEDED_PREFERENCES}")
    if {"chosen", "rejected"} <= set(record):
        raise UserError(f"{place} holds preferences ({found}): train on them with --objective dpo.")
    hint = did_you_mean(next(iter(record), ""), ("text", "prompt", "messages", "conversations", "instruction"))
    raise UserError(f"{place}: columns found: {found}; needed: {NEEDED}{hint}")


def record_problem(record: Mapping[str, Any], format: RecordFormat, text_field: str = "text") -> str | None:
    """What is wrong with one record, or None."""
    for column, kind in zip(needed_columns(format, text_field), format.kinds, strict=True):
        if record.get(column) is None:
            missing = "is null" if column in record else f"is missing (found: {', '.join(map(repr, record))})"
            return f"column {column!r} {missing}; every record of a {format.name} data set needs it."
        problem = KINDS[kind](record[column])
        if problem:
            return f"column {column!r} {problem}"
    if "input" in format.optional and not isinstance(record.get("input") or "", str):
        return f"column 'input' is {_say(record['input'])}; it must be text."
    return None


def _text_problem(value: Any) -> str | None:
    if not isinstance(value, str):
        return f"is {_say(value)}; it must be text."
    if len(value) > LONGEST_RECORD:
        return f"has {len(value):,} characters; a record may have {LONGEST_RECORD:,}. Split it into several records."
    return None


def _messages_problem(value: Any, who: str = "role", what: str = "content") -> str | None:
    if not isinstance(value, list) or not value:
        return f"is {_say(value)}; it must be a list of {{{who}, {what}}} objects."
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get(who), str):
            return f"holds {_say(message)} as message {number}; it needs {who!r} and {what!r}."
        # content may be null beside tool calls, or a list of parts
        if not isinstance(message.get(what), (str, list)) and not message.get("tool_calls"):
            return f"holds message {number} with {what!r} {_say(message.get(what))}; it must be text."
    return None


def _turns_problem(value: Any) -> str | None:
    return _messages_problem(value, "from", "value")


def _tokens_problem(value: Any) -> str | None:
    fine = isinstance(value, list) and bool(value) and all(isinstance(token, int) for token in value)
    return None if fine else f"is {_say(value)}; it must be a list of token numbers."


KINDS: dict[str, Callable[[Any], str | None]] = {
    "text": _text_problem,
    "messages": _messages_problem,
    "turns": _turns_problem,
    "tokens": _tokens_problem,
}


def _say(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    names = {"str": "text", "NoneType": "null", "dict": "object", "int": "number", "float": "number"}
    kind = names.get(type(value).__name__, type(value).__name__)
    return "null" if value is None else f"{kind} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def needed_columns(format: RecordFormat, text_field: str) -> list[str]:
    """Names of the columns that the format needs, with --dataset_text_field in its place."""
    return [name.format(text=text_field) for name in format.needed]
