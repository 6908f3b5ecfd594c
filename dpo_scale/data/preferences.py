"""Raw row -> PreferencePair. Every accepted format is recognised by its fields and has a name.

Fields are read under the names of this module; `columns` of a source says where another data set
keeps them.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_scale.data.rows import RawRow
from dpo_scale.errors import DataError

Message = dict[str, Any]
Text = str | tuple[Message, ...]

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "system",
    "tools",
    "documents",
    "chat_template_kwargs",
    "completions",
    "scores",
    "ranks",
    "response_1",
    "response_2",
    "preference",
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_TEXT_KEYS = ("content", "text", "response", "answer", "completion", "output")
_SCORE_KEYS = ("score", "overall_score", "rating")


class RowError(DataError):
    """A row that holds no pair; the message is the reason, its place is added by who knows it."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One preference in text: three strings, or three tuples of chat messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    row: str
    """Where it came from, for messages: `file.jsonl:17`."""
    format: str
    """How the row was read, for the report."""
    tools: tuple[Any, ...] | None = None
    """Tools that the chat template announces."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Further variables of the chat template."""

    @property
    def is_chat(self) -> bool:
        """Whether the pair is made of messages rather than text."""
        return not isinstance(self.prompt, str)


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Refuse a `columns` mapping with an unknown name on its left."""
    for name in columns or {}:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FIELDS)}"
            raise DataError(f"data columns: unknown field {name!r}; {hint}")


def to_preferences(raw: RawRow, columns: Mapping[str, str] | None = None) -> list[PreferencePair]:
    """The pairs of a row: one, or one for every two ranked completions.

    Raises RowError with the reason where the row has no known format.
    """
    fields = _rename(raw.fields, columns)
    if "chosen" in fields and "rejected" in fields:
        return [_from_chosen_and_rejected(fields, raw.place)]
    if "completions" in fields:
        return _from_completions(fields, raw.place)
    if "response_1" in fields and "response_2" in fields:
        return [_from_two_responses(fields, raw.place)]
    missing = [name for name in ("chosen", "rejected") if name not in fields]
    raise RowError(
        f"no field {' and no field '.join(map(repr, missing))}; the row has "
        f"{', '.join(map(repr, raw.fields)) or 'no fields'}; name its columns in data columns"
    )


def _rename(fields: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The fields that are present and not null, under the names of this module."""
    named = {name: value for name, value in fields.items() if value is not None}
    for name, column in (columns or {}).items():
        if column not in fields:
            raise RowError(
                f"no field {column!r}, which columns names as {name!r}; the row has "
                f"{', '.join(map(repr, fields)) or 'no fields'}"
            )
        if fields[column] is None:
            raise RowError(f"field {column!r} is null")
        named[name] = fields[column]
    for name in ("prompt", "chosen", "rejected"):
        if name in fields and fields[name] is None and name not in named:
            raise RowError(f"field {name!r} is null")
    return named


def _from_chosen_and_rejected(fields: dict[str, Any], place: str) -> PreferencePair:
    chosen, rejected = _text("chosen", fields["chosen"]), _text("rejected", fields["rejected"])
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("one of chosen and rejected is text, the other a list of messages")
    prompt = _text("prompt", fields["prompt"]) if "prompt" in fields else None
    if prompt is None:
        if isinstance(chosen, str):
            assert isinstance(rejected, str)
            prompt, chosen, rejected, name = _split_strings(chosen, rejected)
        else:
            assert not isinstance(rejected, str)
            prompt, chosen, rejected, name = _split_chats(chosen, rejected)
    elif isinstance(prompt, str) and isinstance(chosen, str):
        name = "prompt, chosen and rejected strings"
    else:
        prompt, chosen, rejected, name = _as_chat(prompt, chosen, rejected)
    return _pair(fields, place, prompt, chosen, rejected, name)


def _pair(fields: dict[str, Any], place: str, prompt: Text, chosen: Text, rejected: Text, name: str) -> PreferencePair:
    """The pair with its system message, tools and template variables."""
    if "system" in fields:
        system = _string("system", fields["system"])
        prompt, chosen, rejected = (
            _messages(prompt, "user"),
            _messages(chosen, "assistant"),
            _messages(rejected, "assistant"),
        )
        if system and not (prompt and prompt[0]["role"] == "system"):
            prompt = ({"role": "system", "content": system}, *prompt)
        name += ", with a system field"
    if not isinstance(prompt, str) and not prompt:
        raise RowError("chosen and rejected begin with different messages: there is no prompt")
    tools = _json_field("tools", fields.get("tools"), list)
    variables = dict(_json_field("chat_template_kwargs", fields.get("chat_template_kwargs"), dict) or {})
    documents = _json_field("documents", fields.get("documents"), list)
    if documents:
        variables["documents"] = documents
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        row=place,
        format=name,
        tools=tuple(tools) if tools else None,
        chat_template_kwargs=variables or None,
    )


def _split_strings(chosen: str, rejected: str) -> tuple[str, str, str, str]:
    """Two texts that hold their common prompt.

    A dialogue of `Human:` and `Assistant:` turns is cut behind the last common `Assistant:`, any
    other text at the first difference, a space in front of it left to the completions.
    """
    common = _common_length(chosen, rejected)
    if chosen.startswith(HUMAN) and rejected.startswith(HUMAN):
        turn = chosen.rfind(ASSISTANT, 0, common)
        if turn < 0:
            raise RowError(f"chosen and rejected have no {ASSISTANT.strip()!r} turn in common")
        cut, name = turn + len(ASSISTANT), "Human/Assistant dialogues"
    else:
        cut, name = common, "chosen and rejected strings, prompt in both"
        if 0 < cut < max(len(chosen), len(rejected)) and chosen[cut - 1] == " ":
            cut -= 1
        if cut == 0:
            raise RowError("no field 'prompt', and chosen and rejected have no beginning in common")
    return chosen[:cut], chosen[cut:], rejected[cut:], name


def _common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the longest common beginning."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(index for index in range(shorter) if left[index] != right[index])


def _split_chats(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Text, Text, Text, str]:
    cut = _common_length(chosen, rejected)
    return chosen[:cut], chosen[cut:], rejected[cut:], "whole chats, prompt in both"


def _as_chat(prompt: Text, chosen: Text, rejected: Text) -> tuple[Text, Text, Text, str]:
    """A prompt next to completions of which at least one side is made of messages."""
    if isinstance(prompt, str):
        assert not isinstance(chosen, str)
        assert not isinstance(rejected, str)
        cut = _common_length(chosen, rejected)
        if cut and chosen[cut - 1]["role"] != "assistant":
            # UltraFeedback's form: whole chats, with the last question once more as text.
            return (
                chosen[:cut],
                chosen[cut:],
                rejected[cut:],
                "whole chats and their prompt as text",
            )
        return (
            _messages(prompt, "user"),
            chosen,
            rejected,
            "prompt string, completions as messages",
        )
    if isinstance(chosen, str):
        return (
            prompt,
            _messages(chosen, "assistant"),
            _messages(rejected, "assistant"),
            "prompt as messages, completion strings",
        )
    assert not isinstance(rejected, str)
    size = len(prompt)
    if prompt and chosen[:size] == prompt and rejected[:size] == prompt:
        return prompt, chosen[size:], rejected[size:], "chats, prompt given and in both"
    return prompt, chosen, rejected, "prompt, chosen and rejected messages"


def _from_completions(fields: dict[str, Any], place: str) -> list[PreferencePair]:
    """Best against worst of scored or ranked completions."""
    entries = fields["completions"]
    if not isinstance(entries, list) or len(entries) < 2:
        raise RowError("completions has to be a list of two or more")
    if "prompt" not in fields:
        raise RowError("completions need a field 'prompt'")
    ranked = [(_merit(entry, index, fields), _completion(entry)) for index, entry in enumerate(entries)]
    (best, chosen), (worst, rejected) = max(ranked, key=_first), min(ranked, key=_first)
    if best == worst:
        rejected = chosen  # no preference: set aside with the pairs that carry none
    prompt = _text("prompt", fields["prompt"])
    name = "ranked or scored completions, best against worst"
    if not isinstance(prompt, str) or not isinstance(chosen, str):
        prompt, chosen, rejected = (
            _messages(prompt, "user"),
            _messages(chosen, "assistant"),
            _messages(rejected, "assistant"),
        )
    return [_pair(fields, place, prompt, chosen, rejected, name)]


def _first(ranked: tuple[float, Text]) -> float:
    return ranked[0]


def _completion(entry: Any) -> Text:
    if isinstance(entry, dict):
        for key in _TEXT_KEYS:
            if key in entry:
                return _text(f"completions.{key}", entry[key])
        raise RowError(f"a completion has none of the fields {', '.join(_TEXT_KEYS)}")
    return _text("completions", entry)


def _merit(entry: Any, index: int, fields: dict[str, Any]) -> float:
    """How good a completion is: its score, or its rank upside down (rank 1 is the best)."""
    keys = entry if isinstance(entry, dict) else {}
    for key in _SCORE_KEYS:
        if key in keys:
            return _number(key, keys[key])
    if "rank" in keys:
        return -_number("rank", keys["rank"])
    for name, sign in (("scores", 1.0), ("ranks", -1.0)):
        values = fields.get(name)
        if isinstance(values, list) and len(values) == len(fields["completions"]):
            return sign * _number(name, values[index])
    raise RowError("completions carry no score and no rank, in them or in 'scores' or 'ranks'")


def _from_two_responses(fields: dict[str, Any], place: str) -> PreferencePair:
    """HelpSteer's form: a preference below zero is for response_1, above zero for response_2."""
    for name in ("prompt", "preference"):
        if name not in fields:
            raise RowError(f"response_1 and response_2 need a field {name!r}")
    preference = _number("preference", fields["preference"])
    first, second = fields["response_1"], fields["response_2"]
    chosen, rejected = (second, first) if preference > 0 else (first, second)
    if preference == 0:
        rejected = chosen
    pair = {**fields, "chosen": chosen, "rejected": rejected}
    made = _from_chosen_and_rejected(pair, place)
    return _pair(fields, place, made.prompt, made.chosen, made.rejected, "two responses and a preference")


# --- values ------------------------------------------------------------------------------------


def _text(name: str, value: Any) -> Text:
    """A string, or a tuple of messages."""
    if isinstance(value, str):
        return _string(name, value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"field {name!r} has to be text or a list of messages, not {_describe(value)}")
    return tuple(_message(name, item) for item in value)


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
    if not isinstance(message.get("content", ""), (str, list)):
        raise RowError(f"the content of a message of {name!r} has to be text, not {_describe(message['content'])}")
    for value in _strings(message):
        _string(name, value)
    return message


def _strings(value: Any) -> list[str]:
    """All strings inside a value."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    parts = value if isinstance(value, list) else ()
    return list(itertools.chain.from_iterable(map(_strings, parts)))


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise RowError(f"field {name!r} has to be text, not {_describe(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            f"field {name!r} is not valid Unicode (a lone surrogate at character {error.start + 1})"
        ) from error
    return value


def _messages(value: Text, role: str) -> tuple[Message, ...]:
    return ({"role": role, "content": value},) if isinstance(value, str) else value


def _json_field(name: str, value: Any, kind: type) -> Any:
    """A field that may travel as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError(f"field {name!r} is not valid JSON") from error
    if value is not None and not isinstance(value, kind):
        raise RowError(f"field {name!r} has to be a {kind.__name__}, not {_describe(value)}")
    for text in _strings(value):
        _string(name, text)
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise RowError(f"field {name!r} has to be a number, not {_describe(value)}")
    try:
        number = float(value)
    except ValueError as error:
        raise RowError(f"field {name!r} has to be a number, not {value!r:.40}") from error
    if number != number:
        raise RowError(f"field {name!r} is not a number (NaN)")
    return number


def _describe(value: Any) -> str:
    return {list: "a list", dict: "an object", str: "text", bool: "true or false"}.get(
        type(value), f"a {type(value).__name__}"
    )
