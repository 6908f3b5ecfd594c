"""Hashes of numbers and of token sequences, in bulk: the same on every machine and library version."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]


def splitmix64(values: npt.ArrayLike) -> Hashes:
    """A bijection of 64-bit numbers: Steele et al. 2014, "Fast splittable pseudorandom number generators", fig. 16."""
    with np.errstate(over="ignore"):
        z = np.asarray(values, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def sequence_hashes(tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64]) -> Hashes:
    """A hash of each of the sequences that lie end to end in `tokens`, uint64 [sequences]; none may be empty.

    Tokens are mixed with their positions, added up, and mixed again with the length.
    """
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    mixed = splitmix64(tokens.astype(np.uint64) + _of_positions(positions))
    sums = np.add.reduceat(mixed, starts)
    return splitmix64(sums + lengths.astype(np.uint64))


_positions = splitmix64(np.arange(4096))


def _of_positions(positions: npt.NDArray[np.int64]) -> Hashes:
    """Their hashes; those of the first few thousand are looked up."""
    global _positions
    longest = int(positions.max(initial=0))
    if longest >= len(_positions):
        if longest >= 2**20:
            return splitmix64(positions)
        _positions = splitmix64(np.arange(2 * longest))
    return _positions[positions]
