"""PreferencePair -> TokenPair: chat templates, the prompt's boundary, truncation.

A prompt and a completion are tokenized as one text, as a model would have written them. The
boundary is where the tokens of the prompt alone stop being a prefix of both joined texts.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_scale.data.preferences import PreferencePair
from dpo_scale.data.row_values import Message
from dpo_scale.data.token_pairs import TokenIds, TokenPair
from dpo_scale.errors import DataError, UserError
from dpo_scale.recipe import DataSection

# Reasons why a pair is set aside, as the report names them.
EQUAL = "chosen and rejected are equal"
JUDGED_EQUAL = "chosen and rejected are judged equal, or within data.completion_margin"
EMPTY_CHOSEN = "chosen is empty"
EMPTY_REJECTED = "rejected is empty"
EMPTY_PROMPT = "prompt is empty, and the tokenizer has no BOS to stand for it"
EQUAL_AFTER_CUT = "chosen and rejected are equal after the cut"
PROMPT_TOO_LONG = "prompt longer than the limit"
COMPLETION_TOO_LONG = "completion longer than the limit"
PAIR_TOO_LONG = "prompt and completion longer than data.max_length"
TEMPLATE_FAILED = "chat template failed"
NO_PREFERENCE = frozenset({EQUAL, JUDGED_EQUAL, EMPTY_CHOSEN, EMPTY_REJECTED, EQUAL_AFTER_CUT})
TOO_LONG = frozenset({PROMPT_TOO_LONG, COMPLETION_TOO_LONG, PAIR_TOO_LONG, EQUAL_AFTER_CUT})
# What was cut from a pair that stays.
PROMPT_START_CUT = "start of the prompt cut"
PROMPT_END_CUT = "end of the prompt cut"
CHOSEN_CUT = "end of chosen cut"
REJECTED_CUT = "end of rejected cut"

# What transformers calls a template where there are several.
DEFAULT_TEMPLATE, TOOL_TEMPLATE = "default", "tool_use"
# Templates are programs: what they do to a row's values can fail in any of these ways.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
_OWN_ARGUMENTS = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters} - {
    "documents",
    "kwargs",
}
"""What a row cannot set as a variable of the template."""
TEMPLATE_DATE = datetime(2024, 7, 26)
"""Today, for templates that write the date (Llama 3.2): with that of the clock, the prompts of a run that goes on the
next day would be others. It is the day that Llama's templates name where they cannot know.
"""
_ASKS_FOR_DATE = re.compile(r"""strftime_now\(\s*(['"])(?P<form>[^'"]*)\1\s*\)""")


@dataclass(frozen=True, slots=True)
class Kept:
    """A pair in tokens and what was done to it."""

    pair: TokenPair
    cuts: tuple[str, ...]
    boundary_moved: bool
    """The prompt's own tokens are no prefix of the joined texts: its tail is scored, too."""


@dataclass(frozen=True, slots=True)
class Dropped:
    """A pair that is set aside."""

    row: str
    reason: str
    """One of the reasons above, under which it is counted."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class _Texts:
    """A pair as the three texts that are tokenized, and whether an end token has to be added."""

    prompt: str
    chosen: str
    rejected: str
    add_prefix: bool
    add_end: tuple[bool, bool]


class PairTokenizer:
    """Turns batches of pairs into tokens. Picklable, so that worker processes can hold one.

    Args:
        tokenizer: with an end token; with a chat template if there are chats.
        data: limits, truncation and the template file.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataSection) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{tokenizer.name_or_path or 'tokenizer'}: no end token; set eos_token in tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.data = data
        templates = chat_templates(tokenizer, data.chat_template)
        self._templates = {name: _dated(template) for name, template in templates.items()}
        self._prefix = _prefix(tokenizer)
        self._special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)

    @property
    def template(self) -> str | None:
        """The text of all templates that may be used, for keys of what they rendered."""
        return json.dumps(self._templates, sort_keys=True) if self._templates else None

    def tokenize(self, pairs: Sequence[PreferencePair]) -> list[Kept | Dropped]:
        """Tokens of each pair, or why it is set aside, in the order given."""
        outcomes: list[Kept | Dropped | None] = []
        texts: list[_Texts] = []
        for pair in pairs:
            prepared = self._texts(pair)
            if isinstance(prepared, _Texts):
                texts.append(prepared)
                outcomes.append(None)
            else:
                outcomes.append(prepared)
        flat = [part for text in texts for part in (text.prompt, text.chosen, text.rejected)]
        encoded = self._encode(flat)
        triples = iter(zip(texts, encoded[0::3], encoded[1::3], encoded[2::3], strict=True))
        return [
            self._assemble(pair.row, *next(triples)) if outcome is None else outcome
            for pair, outcome in zip(pairs, outcomes, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[TokenIds]:
        if not texts:
            return []
        if self.tokenizer.is_fast:
            # The Rust tokenizer itself: no dictionaries of masks for millions of texts.
            backend: Any = self.tokenizer.backend_tokenizer
            backend.no_truncation()
            backend.no_padding()
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            lists = [encoding.ids for encoding in encodings]
            ends = list(itertools.accumulate(map(len, lists), initial=0))
            flat = np.fromiter(itertools.chain.from_iterable(lists), np.int32, ends[-1])
            return [flat[start:end] for start, end in itertools.pairwise(ends)]
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(row, np.int32) for row in ids]

    def _texts(self, pair: PreferencePair) -> _Texts | Dropped:
        reason = no_preference(pair)
        if reason:
            return Dropped(pair.row, reason)
        if pair.is_chat:
            return self._render(pair)
        assert isinstance(pair.prompt, str)
        assert isinstance(pair.chosen, str)
        assert isinstance(pair.rejected, str)
        written = "".join(self.tokenizer.convert_ids_to_tokens(self._prefix.tolist()))
        return _Texts(
            prompt=pair.prompt,
            chosen=pair.prompt + pair.chosen,
            rejected=pair.prompt + pair.rejected,
            add_prefix=not pair.prompt.startswith(written),
            add_end=(True, True),
        )

    def _render(self, pair: PreferencePair) -> _Texts | Dropped:
        """The chat as the template writes it; special tokens are the template's business."""
        if DEFAULT_TEMPLATE not in self._templates:
            names = f" named {DEFAULT_TEMPLATE!r}, only {', '.join(self._templates)}" if self._templates else ""
            raise UserError(
                f"{pair.row}: a chat, but the tokenizer has no chat template{names}; "
                f"set data.chat_template to {'one of these or ' if names else ''}a file with one"
            )
        refused = _OWN_ARGUMENTS & (pair.chat_template_kwargs or {}).keys()
        if refused:
            return Dropped(pair.row, TEMPLATE_FAILED, f"chat_template_kwargs cannot set {', '.join(sorted(refused))}")
        assert not isinstance(pair.prompt, str)
        assert not isinstance(pair.chosen, str)
        assert not isinstance(pair.rejected, str)
        try:
            prompt = self._apply(pair, pair.prompt, generation_prompt=True)
            chosen = self._apply(pair, pair.prompt + pair.chosen)
            rejected = self._apply(pair, pair.prompt + pair.rejected)
            for rendered, completion in ((chosen, pair.chosen), (rejected, pair.rejected)):
                if self._shows_nothing(pair, rendered, completion):
                    return Dropped(pair.row, TEMPLATE_FAILED, "it writes nothing of a completion without text")
        except _TEMPLATE_ERRORS as error:
            return Dropped(pair.row, TEMPLATE_FAILED, str(error).splitlines()[0] if str(error) else "")
        return _Texts(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            add_prefix=False,
            add_end=(self._ends_open(chosen, pair.chosen), self._ends_open(rejected, pair.rejected)),
        )

    def _apply(self, pair: PreferencePair, messages: tuple[Message, ...], *, generation_prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=list(pair.tools) if pair.tools else None,
            chat_template=self._templates.get(TOOL_TEMPLATE if pair.tools else "", self._templates[DEFAULT_TEMPLATE]),
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **(pair.chat_template_kwargs or {}),
        )
        return text

    def _shows_nothing(self, pair: PreferencePair, rendered: str, completion: tuple[Message, ...]) -> bool:
        """Whether a completion without text, such as the call of a tool, is rendered as one without anything."""
        if any(message.get("content", "").strip() for message in completion):
            return False
        blank = tuple({"role": message["role"], "content": ""} for message in completion)
        assert not isinstance(pair.prompt, str)
        return self._apply(pair, pair.prompt + blank) == rendered

    def _ends_open(self, rendered: str, completion: tuple[Message, ...]) -> bool:
        """Whether the template wrote no turn end behind the last message: no end would be learned."""
        rendered = rendered.rstrip()
        if rendered.endswith(self._special):
            return False
        last_line = completion[-1].get("content", "").strip().rpartition("\n")[2]
        return rendered.endswith(last_line)  # a call of a tool has no text, and needs an end, too

    def _assemble(
        self, row: str, text: _Texts, prompt: TokenIds, chosen: TokenIds, rejected: TokenIds
    ) -> Kept | Dropped:
        boundary = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
        moved = boundary < len(prompt)
        head, chosen, rejected = prompt[:boundary], chosen[boundary:], rejected[boundary:]
        if text.add_prefix:
            head = np.concatenate([self._prefix, head])
        elif not len(head) and self.tokenizer.bos_token_id is not None:
            head = _with(head, self.tokenizer.bos_token_id)
        if not len(head):
            return Dropped(row, EMPTY_PROMPT)
        end = self.tokenizer.eos_token_id
        if text.add_end[0] and not (len(chosen) and chosen[-1] == end):
            chosen = _with(chosen, end)
        if text.add_end[1] and not (len(rejected) and rejected[-1] == end):
            rejected = _with(rejected, end)
        if np.array_equal(chosen, rejected):
            return Dropped(row, EQUAL)
        if not len(chosen) or not len(rejected):
            return Dropped(row, EMPTY_REJECTED if len(chosen) else EMPTY_CHOSEN)
        return _truncate(TokenPair(head, chosen, rejected, row), self.data, moved, self._prefix_length(head))

    def _prefix_length(self, prompt: TokenIds) -> int:
        """Tokens in front of a prompt that no cut takes away."""
        begins_so = len(self._prefix) and np.array_equal(prompt[: len(self._prefix)], self._prefix)
        return len(self._prefix) if begins_so else int(prompt[0] == self.tokenizer.bos_token_id)


def chat_templates(tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> Mapping[str, str]:
    """Name -> text of the templates for chats: the tokenizer's own, or as `default` the one that is wanted.

    Args:
        wanted: `data.chat_template` of the recipe: a name of one of the tokenizer's templates, or a file.

    Raises DataError for what is neither, or both.
    """
    own = tokenizer.chat_template
    named: dict[str, str] = dict(own) if isinstance(own, dict) else {DEFAULT_TEMPLATE: own} if own else {}
    if wanted is None:
        return named
    if wanted in named and Path(wanted).is_file():
        raise DataError(f"data.chat_template: {wanted} is a template of the tokenizer and a file; write ./{wanted}")
    if wanted in named:
        return {DEFAULT_TEMPLATE: named[wanted]}
    try:
        return {DEFAULT_TEMPLATE: Path(wanted).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template: {wanted} cannot be read ({error}); give a file with a Jinja template, "
            f"or one that the tokenizer has: {', '.join(named) or 'it has none'}"
        ) from error


def _dated(template: str) -> str:
    """The template with `TEMPLATE_DATE` where it asks for the date of the clock."""
    return _ASKS_FOR_DATE.sub(lambda asks: repr(TEMPLATE_DATE.strftime(asks["form"])), template)


def no_preference(pair: PreferencePair) -> str | None:
    """Why a pair says nothing about what is preferred, if so."""
    if _is_empty(pair.chosen):
        return EMPTY_CHOSEN
    if _is_empty(pair.rejected):
        return EMPTY_REJECTED
    if pair.judged_equal:
        return JUDGED_EQUAL
    return EQUAL if pair.chosen == pair.rejected else None


def _is_empty(completion: str | tuple[Message, ...]) -> bool:
    """No text but whitespace, and no tool call."""
    if isinstance(completion, str):
        return not completion.strip()
    return not any(
        message.get("tool_calls") or message.get("reasoning_content") or message.get("content", "").strip()
        for message in completion
    )


def _prefix(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """What the tokenizer puts in front of a plain text: BOS, several tokens, or nothing."""
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = (start for start in range(len(ids)) if ids[start : start + len(bare)] == bare)
    return np.array(ids[: next(starts, 0)], np.int32)


def _common_prefix(left: TokenIds, right: TokenIds) -> int:
    size = min(len(left), len(right))
    differs = left[:size] != right[:size]
    return int(differs.argmax()) if differs.any() else size


def _with(ids: TokenIds, token: int) -> TokenIds:
    return np.concatenate([ids, np.array([token], np.int32)])


# --- truncation --------------------------------------------------------------------------------


def _truncate(pair: TokenPair, data: DataSection, moved: bool, prefix: int) -> Kept | Dropped:
    """The pair within the limits of the recipe, or the limit that drops it."""
    longest = max(len(pair.chosen), len(pair.rejected))
    fits_prompt = data.max_prompt_length is None or len(pair.prompt) <= data.max_prompt_length
    fits_completion = data.max_completion_length is None or longest <= data.max_completion_length
    fits = len(pair.prompt) + longest <= data.max_length
    if fits_prompt and fits_completion and fits:
        return Kept(pair, (), moved)
    if data.truncation == "drop":
        if not fits_prompt or len(pair.prompt) >= data.max_length:
            return _prompt_too_long(pair, data, fits_prompt)
        if not fits_completion:
            return _over(pair, COMPLETION_TOO_LONG, longest, data, "max_completion_length")
        return _over(pair, PAIR_TOO_LONG, len(pair.prompt) + longest, data, "max_length")
    if data.truncation == "keep_start":
        return _cut_completions(pair, data, moved, fits_prompt)
    return _cut_prompt(pair, data, moved, prefix, fits_completion)


def _over(pair: TokenPair, reason: str, tokens: int, data: DataSection, limit: str) -> Dropped:
    return Dropped(pair.row, reason, f"{tokens} tokens, data.{limit} is {getattr(data, limit)}")


def _prompt_too_long(pair: TokenPair, data: DataSection, fits_prompt: bool) -> Dropped:
    return _over(pair, PROMPT_TOO_LONG, len(pair.prompt), data, "max_length" if fits_prompt else "max_prompt_length")


def _cut_completions(pair: TokenPair, data: DataSection, moved: bool, fits_prompt: bool) -> Kept | Dropped:
    """Both completions end at the same token position; no end token is added there."""
    room = data.max_length - len(pair.prompt)
    if data.max_completion_length is not None:
        room = min(room, data.max_completion_length)
    if not fits_prompt or room < 1:
        return _prompt_too_long(pair, data, fits_prompt)
    chosen, rejected = pair.chosen[:room], pair.rejected[:room]
    if np.array_equal(chosen, rejected):
        return Dropped(pair.row, EQUAL_AFTER_CUT)
    cuts = ((CHOSEN_CUT,) if len(pair.chosen) > room else ()) + ((REJECTED_CUT,) if len(pair.rejected) > room else ())
    return Kept(TokenPair(pair.prompt, chosen, rejected, pair.row), cuts, moved)


def _cut_prompt(pair: TokenPair, data: DataSection, moved: bool, prefix: int, fits_completion: bool) -> Kept | Dropped:
    """The prompt loses one end until the longer completion fits; its first `prefix` tokens (BOS) stay in front."""
    longest = max(len(pair.chosen), len(pair.rejected))
    room = data.max_length - longest
    if data.max_prompt_length is not None:
        room = min(room, data.max_prompt_length)
    if not fits_completion:
        return _over(pair, COMPLETION_TOO_LONG, longest, data, "max_completion_length")
    if room < 1 + prefix:
        if room == data.max_prompt_length:  # no more than the prefix
            return _over(pair, PROMPT_TOO_LONG, len(pair.prompt), data, "max_prompt_length")
        return _over(pair, COMPLETION_TOO_LONG, longest, data, "max_length")
    if data.truncation == "keep_start_of_prompt":
        prompt, cut = pair.prompt[:room], PROMPT_END_CUT
    else:
        tail = pair.prompt[len(pair.prompt) - (room - prefix) :]
        prompt, cut = np.concatenate([pair.prompt[:prefix], tail]), PROMPT_START_CUT
    return Kept(TokenPair(prompt, pair.chosen, pair.rejected, pair.row), (cut,), moved)
