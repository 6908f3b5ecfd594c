"""Ranked or scored completions of one prompt -> the twos of them that make pairs."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_scale.data.row_values import RowError, Text, number, text_or_messages

TEXT_KEY, SCORE_KEY, RANK_KEY = "completions.text", "completions.score", "completions.rank"
"""What `columns` calls the keys inside of each completion."""
MAX_FOR_ALL_PAIRS = 64
"""Completions of one row that `all_pairs` accepts: 2,016 pairs."""
_TEXT_KEYS = ("content", "text", "response", "answer", "completion", "output")
_SCORE_KEYS = ("score", "overall_score", "rating")


@dataclass(frozen=True, slots=True)
class JudgedCompletion:
    """One answer and how good it is."""

    text: Text
    merit: float
    """The score, or the rank upside down (rank 1 is the best)."""


def judged_completions(fields: Mapping[str, Any], columns: Mapping[str, str]) -> list[JudgedCompletion]:
    """The completions of a row, in its order.

    Raises RowError where text or merit of one is missing, or stands there under several names.
    """
    entries = fields["completions"]
    if not isinstance(entries, list) or len(entries) < 2:
        raise RowError("completions has to be a list of two or more")
    return [
        JudgedCompletion(_text(entry, columns), _merit(entry, index, len(entries), fields, columns))
        for index, entry in enumerate(entries)
    ]


def choose_pairs(
    completions: Sequence[JudgedCompletion], choice: str, margin: float
) -> list[tuple[JudgedCompletion, JudgedCompletion]]:
    """The (chosen, rejected) twos whose merits differ by more than the margin; there may be none.

    Raises RowError where all pairs of so many completions are asked for that one row would flood the data.

    Args:
        completions: at least two.
        choice: `data.completion_pairs` of the recipe.
        margin: `data.completion_margin` of the recipe.
    """
    if choice == "all_pairs" and len(completions) > MAX_FOR_ALL_PAIRS:
        raise RowError(
            f"{len(completions)} completions, which are too many for all_pairs (at most {MAX_FOR_ALL_PAIRS})"
        )
    best = max(completions, key=lambda one: one.merit)
    if choice == "best_against_worst":
        candidates = [(best, min(completions, key=lambda one: one.merit))]
    elif choice == "best_against_random":
        candidates = [(best, other) for other in completions]
    else:
        candidates = list(itertools.permutations(completions, 2))
    clear = [(chosen, rejected) for chosen, rejected in candidates if chosen.merit - rejected.merit > margin]
    if choice == "best_against_random" and clear:
        return [clear[_draw(completions, len(clear))]]
    return clear


def _draw(completions: Sequence[JudgedCompletion], count: int) -> int:
    """A number below `count` that the content alone decides: not the row's place, a seed or a rank."""
    content = json.dumps([[one.text, one.merit] for one in completions], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % count


def _text(entry: Any, columns: Mapping[str, str]) -> Text:
    if not isinstance(entry, dict):
        return text_or_messages("completions", entry)
    key = _only_key(entry, (columns[TEXT_KEY],) if TEXT_KEY in columns else _TEXT_KEYS, "its text", TEXT_KEY)
    return text_or_messages(f"completions.{key}", entry[key])


def _merit(entry: Any, index: int, count: int, fields: Mapping[str, Any], columns: Mapping[str, str]) -> float:
    for name, sign in (("scores", 1.0), ("ranks", -1.0)):
        values = fields.get(name)
        if values is None:
            continue
        if {"scores", "ranks"} <= fields.keys():
            raise RowError("completions have both 'scores' and 'ranks'; hide one with an empty name in data columns")
        if not isinstance(values, list) or len(values) != count:
            raise RowError(f"field {name!r} has to be a list with a number for each of the {count} completions")
        return sign * number(name, values[index])
    if not isinstance(entry, dict):
        raise RowError("completions carry no score and no rank, in them or in 'scores' or 'ranks'")
    signs = dict.fromkeys(_SCORE_KEYS, 1.0) | {"rank": -1.0}
    if SCORE_KEY in columns or RANK_KEY in columns:
        signs = {columns[name]: sign for name, sign in ((SCORE_KEY, 1.0), (RANK_KEY, -1.0)) if name in columns}
    what = "a score or a rank, and the row has no field 'scores' or 'ranks'"
    key = _only_key(entry, tuple(signs), what, SCORE_KEY)
    return signs[key] * number(f"completions.{key}", entry[key])


def _only_key(entry: Mapping[str, Any], keys: Sequence[str], what: str, column: str) -> str:
    found = [key for key in keys if entry.get(key) is not None]
    if not found:
        raise RowError(f"a completion has none of the fields {', '.join(keys)} for {what}; name one as {column!r}")
    if len(found) > 1:
        raise RowError(f"a completion has {' and '.join(map(repr, found))} for {what}; name one as {column!r}")
    return found[0]
