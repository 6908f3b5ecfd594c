"""A few pairs as the model sees them: token by token, and which tokens are scored."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dpo_scale.data.token_pairs import TokenPair, TokenPairs

_SHOWN_PROMPT = 12
_SHOWN_COMPLETION = (16, 4)
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How a text ends that stops inside of a character."""
_MOST_PARTS = 4
"""Tokens that a character is cut into at most: its bytes in UTF-8."""


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """A prompt and one of its completions."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """The text of each token. Of a character that is cut over several the last has it whole, the others nothing."""
    scored: tuple[int, ...]
    """1 for a token whose log-prob counts, 0 for one of the prompt."""


@dataclass(frozen=True, slots=True)
class SampledPair:
    """Both sequences of a pair."""

    row: str
    chosen: SampledSequence
    rejected: SampledSequence


def sample_pairs(
    pairs: TokenPairs, tokenizer: PreTrainedTokenizerBase, *, seed: int, count: int = 5
) -> tuple[SampledPair, ...]:
    """`count` different pairs (all, if there are fewer) that depend on the seed, in their order."""
    drawn = sorted(random.Random(seed).sample(range(len(pairs)), min(count, len(pairs))))
    return tuple(_sample(pairs[index], tokenizer) for index in drawn)


def _sample(pair: TokenPair, tokenizer: PreTrainedTokenizerBase) -> SampledPair:
    prompt = pair.prompt.tolist()
    shown = _texts([], prompt, tokenizer)

    def sequence(completion: list[int]) -> SampledSequence:
        tokens = shown + _texts(prompt[-_MOST_PARTS:], completion, tokenizer)
        return SampledSequence((*prompt, *completion), tuple(tokens), (0,) * len(prompt) + (1,) * len(completion))

    return SampledPair(pair.row, sequence(pair.chosen.tolist()), sequence(pair.rejected.tolist()))


def _texts(known: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token adds to the text of those before it, of which `known` are the last."""
    texts: list[str] = []
    waiting: list[int] = []
    for left, id_ in zip(reversed(range(len(ids))), ids, strict=True):
        waiting = [*waiting, id_]
        text = _decode(known + waiting, tokenizer)
        if left and text.endswith(_UNFINISHED) and len(waiting) < _MOST_PARTS:
            texts.append("")
            continue
        texts.append(text[len(_decode(known, tokenizer)) :])
        known, waiting = waiting, []
    return texts


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer
        return str(backend.decode(ids, skip_special_tokens=False))
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def show(samples: tuple[SampledPair, ...]) -> Group:
    """The samples for a console: the end of each prompt, bars between its tokens, and in brackets those scored."""
    lines = [Text("Pairs in tokens: of|the|prompt between bars, [scored] in brackets")]
    for sample in samples:
        lines.append(Text(sample.row, "bold"))
        lines += [_line("chosen", sample.chosen), _line("rejected", sample.rejected)]
    return Group(*lines)


def _line(name: str, sequence: SampledSequence) -> Text:
    boundary = len(sequence.scored) - sum(sequence.scored)
    prompt, completion = sequence.tokens[:boundary], sequence.tokens[boundary:]
    head, tail = _SHOWN_COMPLETION
    line = Text(f"  {name:>8}: ")
    left_out = len(prompt) - _SHOWN_PROMPT
    line.append(f"({left_out} tokens) " if left_out > 0 else "", "dim")
    line.append("|".join(_visible(prompt[-_SHOWN_PROMPT:])) + " ", "dim")
    left_out = len(completion) - head - tail
    line.append(_in_brackets(completion if left_out <= 0 else completion[:head]), "green")
    if left_out > 0:
        line.append(f" ({left_out} tokens) ", "dim")
        line.append(_in_brackets(completion[-tail:]), "green")
    return line


def _in_brackets(tokens: Sequence[str]) -> str:
    return "".join(f"[{token}]" for token in _visible(tokens))


def _visible(tokens: Sequence[str]) -> list[str]:
    return [_on_one_line(token) for token in tokens if token]


def _on_one_line(token: str) -> str:
    """The token with line breaks and other invisible characters spelled out."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in token)
