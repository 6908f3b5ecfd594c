"""Typed values out of a raw row: text, chat messages, numbers, and JSON that travels as text."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

from dpo_scale.errors import DataError

Message = dict[str, Any]
Text = str | tuple[Message, ...]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class RowError(DataError):
    """A row that holds no pair; the message is the reason, its place is added by who knows it."""


def text_or_messages(name: str, value: Any) -> Text:
    """A string, or a tuple of messages. Raises RowError for anything else."""
    if isinstance(value, str):
        return text(name, value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"field {name!r} has to be text or a list of messages, not {describe(value)}")
    return tuple(_message(name, item) for item in value)


def as_messages(value: Text, role: str) -> tuple[Message, ...]:
    """Text as the one message of a role; messages as they are."""
    return ({"role": role, "content": value},) if isinstance(value, str) else value


def text(name: str, value: Any) -> str:
    """A string that can be written as UTF-8. Raises RowError for anything else."""
    if not isinstance(value, str):
        raise RowError(f"field {name!r} has to be text, not {describe(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"field {name!r} is not valid Unicode (a lone surrogate at character {error.start + 1})"
        ) from error
    return value


def number(name: str, value: Any) -> float:
    """A number that may travel as text. Raises RowError for anything else, NaN among it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise RowError(f"field {name!r} has to be a number, not {describe(value)}")
    try:
        converted = float(value)
    except (ValueError, OverflowError) as error:
        raise RowError(f"field {name!r} has to be a number, not {value!r:.40}") from error
    if math.isnan(converted):
        raise RowError(f"field {name!r} is not a number (NaN)")
    return converted


def json_value(name: str, value: Any, kind: type) -> Any:
    """A list or an object that may travel as JSON text; None where there is none. Raises RowError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError(f"field {name!r} is not valid JSON") from error
    if value is not None and not isinstance(value, kind):
        raise RowError(f"field {name!r} has to be {_KINDS[kind]}, not {describe(value)}")
    for string in _strings(value):
        text(name, string)
    return value


def describe(value: Any) -> str:
    """What a value is, for messages."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")


_KINDS = {list: "a list", dict: "an object", str: "text", bool: "true or false", type(None): "null"}


def _message(name: str, message: dict[str, Any]) -> Message:
    """A message with `role` and `content`; ShareGPT's `from` and `value` are read as these."""
    if "from" in message and "value" in message:
        role = message["from"]
        message = {
            "role": _ROLES.get(role, role) if isinstance(role, str) else role,
            "content": message["value"],
        }
    # Columnar files fill the fields that a message does not have with null.
    message = {key: value for key, value in message.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise RowError(f"a message of {name!r} has no 'role'")
    if "content" not in message and "tool_calls" not in message:
        raise RowError(f"a message of {name!r} has no 'content'")
    if isinstance(message.get("content"), list):
        # A template for text alone would print such a list as Python does.
        message["content"] = "".join(_part(name, part) for part in message["content"])
    if not isinstance(message.get("content", ""), str):
        raise RowError(f"the content of a message of {name!r} has to be text, not {describe(message['content'])}")
    for string in _strings(message):
        text(name, string)
    return message


def _part(name: str, part: Any) -> str:
    """The text of one part of a message's content."""
    if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        part = part["text"]
    if not isinstance(part, str):
        kind = repr(part["type"]) if isinstance(part, dict) and "type" in part else describe(part)
        raise RowError(f"a message of {name!r} has a part that is not text ({kind}); only text is trained on")
    return part


def _strings(value: Any) -> list[str]:
    """All strings inside a value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    parts = value if isinstance(value, list) else ()
    return list(itertools.chain.from_iterable(map(_strings, parts)))
