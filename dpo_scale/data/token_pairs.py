"""Tokenized preference pairs: one value for a pair, and columns that hold millions of them.

The columns may be memory maps, so that every rank of a machine reads the same pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from dpo_scale.data.hashing import Hashes, sequence_hashes

TokenIds = npt.NDArray[np.int32]
Lengths = npt.NDArray[np.int64]

_BLOCK_PAIRS = 8192
"""Pairs hashed at once: bounds the memory of a pass over any amount of data."""


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One preference in tokens. The two sequences are prompt + chosen and prompt + rejected."""

    prompt: TokenIds
    """Token ids that are conditioned on and never scored; the first holds BOS where the tokenizer has one."""
    chosen: TokenIds
    """Token ids of the preferred completion, its end token included."""
    rejected: TokenIds
    """Token ids of the other completion, its end token included."""
    row: str
    """Where the pair came from, for messages: `file.jsonl:17`."""


class TokenPairs(Sequence[TokenPair]):
    """Pairs in columns: one flat array of token ids and 3 lengths a pair. Not to be written to.

    Args:
        tokens: int32 [tokens], for each pair its prompt, chosen and rejected ids, end to end.
        lengths: int64 [pairs, 3], tokens of prompt, chosen and rejected.
        rows: where each pair came from.
        hashes: see the property; None computes them when they are asked for.
    """

    def __init__(self, tokens: TokenIds, lengths: Lengths, rows: Sequence[str], hashes: Hashes | None = None) -> None:
        self.tokens = tokens
        self.rows = rows
        self.lengths = lengths
        self._starts = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths.sum(axis=1), out=self._starts[1:])
        self._hashes = hashes
        self._digest: str | None = None
        if lengths.shape != (len(rows), 3) or self._starts[-1] != len(tokens):
            raise ValueError("tokens, lengths and rows do not describe the same pairs")

    @classmethod
    def from_pairs(cls, pairs: Iterable[TokenPair]) -> TokenPairs:
        """Collect pairs into a store."""
        parts: list[TokenIds] = []
        lengths: list[tuple[int, int, int]] = []
        rows: list[str] = []
        for pair in pairs:
            parts += [pair.prompt, pair.chosen, pair.rejected]
            lengths.append((len(pair.prompt), len(pair.chosen), len(pair.rejected)))
            rows.append(pair.row)
        tokens = np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
        return cls(tokens, np.array(lengths, np.int64).reshape(-1, 3), rows)

    @overload
    def __getitem__(self, index: int) -> TokenPair: ...
    @overload
    def __getitem__(self, index: slice) -> TokenPairs: ...
    def __getitem__(self, index: int | slice) -> TokenPair | TokenPairs:
        if isinstance(index, slice):
            return TokenPairs.from_pairs(self[i] for i in range(*index.indices(len(self))))
        start = int(self._starts[index])
        n_prompt, n_chosen, n_rejected = (int(n) for n in self.lengths[index])
        middle, end = start + n_prompt + n_chosen, start + n_prompt + n_chosen + n_rejected
        return TokenPair(
            prompt=self.tokens[start : start + n_prompt],
            chosen=self.tokens[start + n_prompt : middle],
            rejected=self.tokens[middle:end],
            row=self.rows[index],
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TokenPair]:
        return (self[index] for index in range(len(self)))

    @property
    def hashes(self) -> Hashes:
        """uint64 [pairs, 3]: a hash of the tokens of prompt, chosen and rejected; none of them may be empty."""
        if self._hashes is None:
            hashes = np.zeros((len(self), 3), np.uint64)
            for start in range(0, len(self), _BLOCK_PAIRS):
                lengths = self.lengths[start : start + _BLOCK_PAIRS].reshape(-1)
                first = self._starts[start]
                tokens = self.tokens[first : first + lengths.sum()]
                hashes[start : start + _BLOCK_PAIRS] = sequence_hashes(tokens, lengths).reshape(-1, 3)
            self._hashes = hashes
        return self._hashes

    @property
    def num_tokens(self) -> int:
        """Tokens of all prompts, chosen and rejected completions, each prompt counted once."""
        return len(self.tokens)

    @property
    def largest_token_id(self) -> int:
        """The largest id in the store, -1 if it is empty."""
        return int(self.tokens.max(initial=-1))

    def digest(self) -> str:
        """SHA-256 of ids and lengths: equal digests mean equal training input, in the same order.

        The first call reads all of them, at 1 to 2 GB/s.
        """
        if self._digest is None:
            digest = hashlib.sha256(np.ascontiguousarray(self.lengths).data)
            digest.update(np.ascontiguousarray(self.tokens).data)
            self._digest = digest.hexdigest()
        return self._digest

    def short_digest(self) -> str:
        """Enough of the digest to tell in records which pairs a number is of."""
        return self.digest()[:12]
