"""Raw row -> PreferencePair. Every accepted format is recognised by its fields and has a name.

Fields are read under the names of this module; `columns` of a source says where another data set
keeps them. A row that can be read in two ways is refused, and the message names both.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from dpo_scale.data.completions import RANK_KEY, SCORE_KEY, TEXT_KEY, choose_pairs, judged_completions
from dpo_scale.data.row_values import (
    Message,
    RowError,
    Text,
    as_messages,
    json_value,
    number,
    text,
    text_or_messages,
)
from dpo_scale.data.rows import RawRow
from dpo_scale.errors import DataError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_KEYS_INSIDE = (TEXT_KEY, SCORE_KEY, RANK_KEY)
FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "system",
    "tools",
    "documents",
    "chat_template_kwargs",
    "completions",
    *_KEYS_INSIDE,
    "scores",
    "ranks",
    "response_1",
    "response_2",
    "preference",
)
_ONLY_FOR_CHATS = ("tools", "documents", "chat_template_kwargs")
NAME_COLUMNS = "name its columns in data columns"
"""How the reason ends where a row lacks fields."""


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
    judged_equal: bool = False
    """The row prefers neither answer, so that it is counted and set aside."""

    @property
    def is_chat(self) -> bool:
        """Whether the pair is made of messages rather than text."""
        return not isinstance(self.prompt, str)


@dataclass(frozen=True, slots=True)
class _Row:
    """A raw row under the names of this module."""

    place: str
    fields: Mapping[str, Any]
    """Those that are present and not null."""
    columns: Mapping[str, str]
    """The recipe's names, without those that hide a field."""
    raw: Mapping[str, Any]
    """The row under its own names, for messages."""


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Raise DataError for a `columns` mapping with an unknown name on its left."""
    for name in columns or {}:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(FIELDS)}"
            raise DataError(f"data columns: unknown field {name!r}; {hint}")


def to_preferences(
    raw: RawRow,
    columns: Mapping[str, str] | None = None,
    completion_pairs: str = "best_against_worst",
    completion_margin: float = 0.0,
) -> list[PreferencePair]:
    """The pairs of a row: one, or those of its ranked completions that the recipe asks for.

    Args:
        raw: the row as its file gives it.
        columns: name of this module -> name in the row; an empty name hides a field.
        completion_pairs: which pairs ranked completions make (`data.completion_pairs`).
        completion_margin: by how much their scores or ranks have to differ.

    Raises RowError with the reason where the row has no known format, or more than one.
    """
    named = {name: column for name, column in (columns or {}).items() if column}
    row = _Row(raw.place, _rename(raw.fields, columns or {}), named, raw.fields)
    form = _form(row)
    if form == "completions":
        return _from_completions(row, completion_pairs, completion_margin)
    if form == "response_1":
        return [_from_two_responses(row)]
    return [_from_chosen_and_rejected(row)]


def _rename(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields that are present and not null, under the names of this module.

    Without a system message, a row that has a field for it is a chat like its neighbours.
    """
    if (system := columns.get("system") or "system") in fields and fields[system] is None:
        fields = {**fields, system: ""}
    named = {name: value for name, value in fields.items() if value is not None}
    for name, column in columns.items():
        if name in _KEYS_INSIDE:
            continue
        if not column:
            named.pop(name, None)
            continue
        if column not in fields:
            raise _lacks_fields(f"no field {column!r}, which columns names as {name!r}", fields)
        if fields[column] is None:
            raise RowError(f"field {column!r} is null")
        named[name] = fields[column]
    for name in ("prompt", "chosen", "rejected"):
        if name in fields and fields[name] is None and name not in named and columns.get(name) != "":
            raise RowError(f"field {name!r} is null")
    return named


def _lacks_fields(what: str, raw: Mapping[str, Any]) -> RowError:
    """The error that shows which fields a row has instead."""
    return RowError(f"{what}; the row has {', '.join(map(repr, raw)) or 'no fields'}; {NAME_COLUMNS}")


def _form(row: _Row) -> str:
    """The field that decides how the row is read."""
    forms = {
        "chosen": ("chosen", "rejected"),
        "completions": ("completions",),
        "response_1": ("response_1", "response_2"),
    }
    whole = {form: names for form, names in forms.items() if all(name in row.fields for name in names)}
    if len(whole) > 1:
        # Fields that the recipe names one by one are the ones that it means.
        meant = [form for form, names in whole.items() if all(name in row.columns for name in names)]
        if len(meant) == 1:
            return meant[0]
        candidates = ", or by ".join(" and ".join(map(repr, names)) for names in whole.values())
        raise RowError(
            f"ambiguous fields; the row can be read by {candidates}; name the fields of one in data columns, "
            "or hide the others with an empty name"
        )
    if whole:
        return next(iter(whole))
    missing = [name for name in ("chosen", "rejected") if name not in row.fields]
    raise _lacks_fields(f"no field {' and no field '.join(map(repr, missing))}", row.raw)


# --- chosen and rejected ------------------------------------------------------------------------


def _from_chosen_and_rejected(row: _Row) -> PreferencePair:
    fields = row.fields
    chosen = text_or_messages("chosen", fields["chosen"])
    rejected = text_or_messages("rejected", fields["rejected"])
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError("one of chosen and rejected is text, the other a list of messages")
    prompt = text_or_messages("prompt", fields["prompt"]) if "prompt" in fields else None
    if prompt is None:
        if isinstance(chosen, str):
            assert isinstance(rejected, str)
            return _with_context(row, *_split_strings(row, chosen, rejected), has_turns=False)
        assert not isinstance(rejected, str)
        return _with_context(row, *_split_chats(chosen, rejected))
    if isinstance(prompt, str) and isinstance(chosen, str):
        assert isinstance(rejected, str)
        return _with_context(row, prompt, chosen, rejected, _name_of_strings(row, prompt, chosen, rejected))
    return _with_context(row, *_as_chat(prompt, chosen, rejected))


def _with_context(
    row: _Row, prompt: Text, chosen: Text, rejected: Text, name: str, *, has_turns: bool = True
) -> PreferencePair:
    """The pair with its system message, tools and template variables.

    Args:
        has_turns: whether prompt and completions are whole messages, and not text cut in two.
    """
    fields = row.fields
    system = text("system", fields["system"]) if "system" in fields else None
    is_plain = not has_turns or (isinstance(prompt, str) and prompt.startswith(HUMAN))
    if system and is_plain:
        raise RowError(f"field 'system' makes a chat of a row, and this one is text ({name})")
    if system is not None and not is_plain:
        prompt = as_messages(prompt, "user")
        chosen, rejected = as_messages(chosen, "assistant"), as_messages(rejected, "assistant")
        own = [message.get("content") for message in prompt[:1] if message["role"] == "system"]
        if system and own and own != [system]:
            raise RowError(
                "ambiguous system message; field 'system' and the chat's own system message differ; hide or remove one"
            )
        if system and not own:
            prompt = ({"role": "system", "content": system}, *prompt)
        name += ", with a system field"
    if not isinstance(prompt, str) and not prompt:
        raise RowError(f"chosen and rejected begin with different messages: there is no prompt{_unread_chat(row)}")
    tools = json_value("tools", fields.get("tools"), list)
    variables = dict(json_value("chat_template_kwargs", fields.get("chat_template_kwargs"), dict) or {})
    documents = json_value("documents", fields.get("documents"), list)
    if documents:
        variables["documents"] = documents
    if isinstance(prompt, str) and (tools or variables):
        given = [field for field in _ONLY_FOR_CHATS if fields.get(field)]
        raise RowError(f"field {given[0]!r} is for chat templates, and this row is text; hide it in data columns")
    return PreferencePair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        row=row.place,
        format=name,
        tools=tuple(tools) if tools else None,
        chat_template_kwargs=variables or None,
    )


def _unread_chat(row: _Row) -> str:
    """A hint at a field that holds messages and has no name of this module."""
    for name, value in row.raw.items():
        if name in FIELDS or name in row.columns.values() or not isinstance(value, list):
            continue
        with suppress(RowError):
            if text_or_messages(name, value):
                return f"; field {name!r} was not read, data columns {{prompt: {name}}} reads it"
    return ""


def _name_of_strings(row: _Row, prompt: str, chosen: str, rejected: str) -> str:
    if not (prompt.strip() and chosen.startswith(prompt) and rejected.startswith(prompt)):
        return "prompt, chosen and rejected strings"
    if "prompt" in row.columns:
        return "prompt, chosen and rejected strings, both repeat the prompt"
    raise RowError(
        "ambiguous prompt; chosen and rejected both begin with it: are they whole texts, or answers that repeat it? "
        "in data columns, prompt: '' says whole texts, and prompt: prompt says answers"
    )


def _split_strings(row: _Row, chosen: str, rejected: str) -> tuple[str, str, str, str]:
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
            raise _lacks_fields("no field 'prompt', and chosen and rejected have no beginning in common", row.raw)
    return chosen[:cut], chosen[cut:], rejected[cut:], name


def _common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Length of the longest common beginning."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(index for index in range(shorter) if left[index] != right[index])


def _split_chats(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Text, Text, Text, str]:
    cut = _common_length(chosen, rejected)
    if cut == len(chosen) == len(rejected) and cut > 1:
        cut -= 1  # the same chat twice: its last message is the answer, and both are equal
    return chosen[:cut], chosen[cut:], rejected[cut:], "whole chats, prompt in both"


def _as_chat(prompt: Text, chosen: Text, rejected: Text) -> tuple[Text, Text, Text, str]:
    """A prompt next to completions of which at least one side is made of messages."""
    if isinstance(chosen, str):
        answers = as_messages(chosen, "assistant"), as_messages(rejected, "assistant")
        return (prompt, *answers, "prompt as messages, completion strings")
    assert not isinstance(rejected, str)
    if isinstance(prompt, str):
        if not (_begins_a_chat(chosen) or _begins_a_chat(rejected)):
            return as_messages(prompt, "user"), chosen, rejected, "prompt string, completions as messages"
        split = _split_chats(chosen, rejected)
        _check_prompt_is_theirs(prompt, split[0])
        return (*split[:3], "whole chats and their prompt as text")
    size = len(prompt)
    if prompt and chosen[:size] == prompt and rejected[:size] == prompt:
        return prompt, chosen[size:], rejected[size:], "chats, prompt given and in both"
    if prompt and prompt[-1]["role"] != "assistant" and (_begins_a_chat(chosen) or _begins_a_chat(rejected)):
        raise RowError(
            "ambiguous prompt; chosen and rejected begin with a turn of the user but not both with the messages of the "
            "prompt: are they whole chats, or answers? prompt: '' in data columns hides the prompt"
        )
    return prompt, chosen, rejected, "prompt, chosen and rejected messages"


def _begins_a_chat(messages: tuple[Message, ...]) -> bool:
    return bool(messages) and messages[0]["role"] in ("system", "developer", "user")


def _check_prompt_is_theirs(prompt: str, common: Text) -> None:
    """The text next to whole chats has to be one of their common messages, or to hold the last one."""
    contents = [message.get("content") for message in common if isinstance(message, dict)]
    last = contents[-1] if contents else None
    is_one = prompt.strip() in [content.strip() for content in contents if isinstance(content, str)]
    holds_last = isinstance(last, str) and bool(last.strip()) and last.strip() in prompt
    if prompt.strip() and not is_one and not holds_last:
        raise RowError(
            "ambiguous prompt; it is text that the chats in chosen and rejected do not begin with: is it a turn in "
            "front of them, or a note? prompt: '' in data columns hides it"
        )


# --- completions that were ranked, scored or compared --------------------------------------------


def _from_completions(row: _Row, choice: str, margin: float) -> list[PreferencePair]:
    judged = judged_completions(row.fields, row.columns)
    pairs = choose_pairs(judged, choice, margin)
    if not pairs:  # one pair that is counted as a row without a preference
        return [replace(_from_two(row, judged[0].text, judged[1].text, choice), judged_equal=True)]
    return [_from_two(row, chosen.text, rejected.text, choice) for chosen, rejected in pairs]


def _from_two(row: _Row, chosen: Text, rejected: Text, choice: str) -> PreferencePair:
    return _from_answers(row, chosen, rejected, f"ranked or scored completions, {choice.replace('_', ' ')}")


def _from_two_responses(row: _Row) -> PreferencePair:
    """HelpSteer's form: a preference below zero is for response_1, above zero for response_2."""
    if "preference" not in row.fields:
        raise RowError("response_1 and response_2 need a field 'preference'")
    preference = number("preference", row.fields["preference"])
    first, second = row.fields["response_1"], row.fields["response_2"]
    chosen, rejected = (second, first) if preference > 0 else (first, second)
    pair = _from_answers(row, chosen, rejected, "two responses and a preference")
    return replace(pair, judged_equal=preference == 0)


def _from_answers(row: _Row, chosen: Any, rejected: Any, name: str) -> PreferencePair:
    """Two answers of a row read as `chosen` and `rejected`, under the name of the row's own format."""
    if "prompt" not in row.fields and isinstance(chosen, str):
        raise _lacks_fields(f"no field 'prompt', which {name.split(',')[0]} need", row.raw)
    pair = _from_chosen_and_rejected(replace(row, fields={**row.fields, "chosen": chosen, "rejected": rejected}))
    with_system = ", with a system field" if "system" in row.fields else ""
    return replace(pair, format=name + with_system)
