"""A few pairs as the model sees them: token by token, and which tokens are scored."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dpo_scale.data.token_pairs import TokenIds, TokenPair, TokenPairs

_SHOWN_PROMPT = 12
_SHOWN_COMPLETION = (16, 4)


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """A prompt and one of its completions."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """The tokens as the vocabulary spells them."""
    scored: tuple[int, ...]
    """1 for a token whose log-prob counts, 0 for one of the prompt."""


@dataclass(frozen=True, slots=True)
class SampledPair:
    """Both sequences of a pair."""

    row: str
    chosen: SampledSequence
    rejected: SampledSequence

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def sample_pairs(
    pairs: TokenPairs, tokenizer: PreTrainedTokenizerBase, *, seed: int, count: int = 5
) -> tuple[SampledPair, ...]:
    """`count` different pairs (all, if there are fewer) that depend on the seed, in their order."""
    drawn = sorted(random.Random(seed).sample(range(len(pairs)), min(count, len(pairs))))
    return tuple(_sample(pairs[index], tokenizer) for index in drawn)


def _sample(pair: TokenPair, tokenizer: PreTrainedTokenizerBase) -> SampledPair:
    chosen, rejected = (_sequence(pair.prompt, completion, tokenizer) for completion in (pair.chosen, pair.rejected))
    return SampledPair(pair.row, chosen, rejected)


def _sequence(prompt: TokenIds, completion: TokenIds, tokenizer: PreTrainedTokenizerBase) -> SampledSequence:
    ids = [*prompt.tolist(), *completion.tolist()]
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    return SampledSequence(tuple(ids), tuple(tokens), (0,) * len(prompt) + (1,) * len(completion))


def show(samples: tuple[SampledPair, ...]) -> Group:
    """The samples for a console: the end of each prompt, and in brackets the tokens that are scored."""
    lines = [Text("Pairs in tokens; [scored] stands in brackets")]
    for sample in samples:
        lines.append(Text(sample.row, "bold"))
        lines += [_line("chosen", sample.chosen), _line("rejected", sample.rejected)]
    return Group(*lines)


def _line(name: str, sequence: SampledSequence) -> Text:
    boundary = len(sequence.scored) - sum(sequence.scored)
    tokens = [_on_one_line(token) for token in sequence.tokens]
    prompt, completion = tokens[:boundary], tokens[boundary:]
    head, tail = _SHOWN_COMPLETION
    line = Text(f"  {name:>8}: ")
    left_out = len(prompt) - _SHOWN_PROMPT
    line.append(f"({left_out} tokens) " if left_out > 0 else "", "dim")
    line.append(" ".join(prompt[-_SHOWN_PROMPT:]) + " ", "dim")
    left_out = len(completion) - head - tail
    shown = [f"[{token}]" for token in (completion if left_out <= 0 else completion[:head])]
    line.append("".join(shown), "green")
    if left_out > 0:
        line.append(f" ({left_out} tokens) ", "dim")
        line.append("".join(f"[{token}]" for token in completion[-tail:]), "green")
    return line


def _on_one_line(token: str) -> str:
    """The token with line breaks and other invisible characters spelled out."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in token)
