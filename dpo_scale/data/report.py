"""What became of the rows: counts by source and reason, lengths, what is odd about the pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from dpo_scale.data.token_pairs import Lengths, TokenIds, TokenPairs

Hashes = npt.NDArray[np.uint64]
HISTOGRAM_BINS = 50
"""Bins up to the longest sequence of a report."""
_BLOCK_PAIRS = 8192
"""Pairs hashed at once: bounds the memory of a pass over any amount of data."""


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Distribution of lengths in tokens."""

    mean: float
    p5: int
    p50: int
    p95: int
    p99: int
    max: int
    bin_tokens: int = 1
    """Tokens spanned by a bin of the histogram; prompt, chosen and rejected of a report share it."""
    bins: tuple[int, ...] = ()
    """Sequences of [0, bin_tokens), [bin_tokens, 2 * bin_tokens), ... tokens."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    """Counts of one source. A row gives one pair, unless it ranks completions."""

    path: str
    rows_read: int
    pairs_kept: int
    formats: Mapping[str, int] = field(default_factory=dict)
    """How rows were read -> pairs."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> rows or pairs set aside."""
    truncated: Mapping[str, int] = field(default_factory=dict)
    """What was cut -> pairs."""
    first_places: Mapping[str, str] = field(default_factory=dict)
    """Reason -> the first row it struck."""
    boundaries_moved: int = 0
    """Pairs whose prompt tokens are no prefix of the joined text, so that some are scored."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """The content of data_report.json for one set of pairs."""

    sources: tuple[SourceReport, ...]
    prompt_tokens: LengthSummary
    chosen_tokens: LengthSummary
    rejected_tokens: LengthSummary
    chosen_longer: float
    """Share of pairs whose chosen completion is the longer one; 0.5 would be no bias by length."""
    rejected_longer: float
    """Share of pairs whose rejected completion is the longer one."""
    duplicates: int
    """Pairs that stand there again."""
    contradictions: int
    """Pairs that another pair turns the other way round."""
    tokens: int
    """Tokens of all pairs, each prompt counted once."""
    tokens_saved_by_sharing: int
    """Tokens of the prompts' second copies, which the shared layout never runs."""

    @property
    def rows_read(self) -> int:
        """Rows read from all sources."""
        return sum(source.rows_read for source in self.sources)

    @property
    def pairs_kept(self) -> int:
        """Pairs of all sources that are trained on."""
        return sum(source.pairs_kept for source in self.sources)

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> rows or pairs set aside, over all sources."""
        return dict(sum((Counter(source.dropped) for source in self.sources), Counter()))

    @property
    def truncated(self) -> dict[str, int]:
        """What was cut -> pairs, over all sources."""
        return dict(sum((Counter(source.truncated) for source in self.sources), Counter()))

    def to_json(self) -> dict[str, Any]:
        """Plain values, the totals first."""
        totals = {
            "rows_read": self.rows_read,
            "pairs_kept": self.pairs_kept,
            "dropped": self.dropped,
            "truncated": self.truncated,
        }
        return {**totals, **asdict(self), "sources": [asdict(source) for source in self.sources]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DataReport:
        """The report that `to_json` wrote."""
        names = cls.__dataclass_fields__
        fields = {name: value for name, value in values.items() if name in names}
        fields["sources"] = tuple(SourceReport(**source) for source in values["sources"])
        for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens"):
            summary = values[name]
            fields[name] = LengthSummary(**{**summary, "bins": tuple(summary.get("bins", ()))})
        return cls(**fields)

    def table(self, title: str = "data") -> Table:
        """The counts as a table for the console."""
        table = Table("", "pairs", title=title, title_justify="left")
        table.columns[1].justify = "right"
        table.add_row("rows read", f"{self.rows_read:,}")
        for name, counts in (("dropped", self.dropped), ("cut", self.truncated)):
            for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
                table.add_row(f"{name}: {reason}", f"{count:,}")
        table.add_row("kept", f"{self.pairs_kept:,}")
        moved = sum(source.boundaries_moved for source in self.sources)
        for name, count in (
            ("boundary moved into the prompt", moved),
            ("duplicates", self.duplicates),
            ("contradictions", self.contradictions),
        ):
            if count:
                table.add_row(name, f"{count:,}")
        for name, lengths in (
            ("prompt", self.prompt_tokens),
            ("chosen", self.chosen_tokens),
            ("rejected", self.rejected_tokens),
        ):
            spread = f"{lengths.mean:.0f} mean, {lengths.p50} median, {lengths.max} longest"
            table.add_row(f"{name} tokens", spread)
        table.add_row("chosen is the longer", f"{self.chosen_longer:.1%}")
        table.add_row("rejected is the longer", f"{self.rejected_longer:.1%}")
        return table


@dataclass(frozen=True, slots=True)
class Overlap:
    """What held-out pairs share with the training pairs."""

    prompts: int
    """Held-out pairs whose prompt is trained on."""
    pairs: int
    """Held-out pairs that are trained on whole."""


def describe(pairs: TokenPairs, sources: tuple[SourceReport, ...]) -> DataReport:
    """The report of a set of pairs."""
    prompt, chosen, rejected = (pairs.lengths[:, column] for column in range(3))
    hashes = pair_hashes(pairs)
    duplicates, contradictions = _repeats(hashes)
    count = max(len(pairs), 1)
    bin_width = int(pairs.lengths.max(initial=0)) // HISTOGRAM_BINS + 1
    return DataReport(
        sources=sources,
        prompt_tokens=_summary(prompt, bin_width),
        chosen_tokens=_summary(chosen, bin_width),
        rejected_tokens=_summary(rejected, bin_width),
        chosen_longer=float((chosen > rejected).sum()) / count,
        rejected_longer=float((chosen < rejected).sum()) / count,
        duplicates=duplicates,
        contradictions=contradictions,
        tokens=pairs.num_tokens,
        tokens_saved_by_sharing=int(prompt.sum()),
    )


def overlap(train: TokenPairs, held_out: TokenPairs) -> Overlap:
    """How many held-out pairs, and prompts of them, are among the training pairs."""
    train_hashes, held_hashes = pair_hashes(train), pair_hashes(held_out)
    return Overlap(
        prompts=int(np.isin(held_hashes[:, 0], train_hashes[:, 0]).sum()),
        pairs=int(np.isin(_whole(held_hashes), _whole(train_hashes)).sum()),
    )


def pair_hashes(pairs: TokenPairs) -> Hashes:
    """uint64 [pairs, 3]: a hash of the tokens of prompt, chosen and rejected."""
    hashes = np.zeros((len(pairs), 3), np.uint64)
    end = 0
    for start in range(0, len(pairs), _BLOCK_PAIRS):
        lengths = pairs.lengths[start : start + _BLOCK_PAIRS].reshape(-1)
        first, end = end, end + int(lengths.sum())
        hashes[start : start + _BLOCK_PAIRS] = _hashes(pairs.tokens[first:end], lengths).reshape(-1, 3)
    return hashes


def _hashes(tokens: TokenIds, lengths: Lengths) -> Hashes:
    """A hash of each of the sequences that lie end to end in `tokens`.

    Tokens are mixed with their positions, added up, and mixed again with the length.
    """
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    mixed = _mix(tokens.astype(np.uint64) + _mix(positions.astype(np.uint64)))
    sums = np.add.reduceat(mixed, starts)  # no sequence is empty
    return _mix(sums + lengths.astype(np.uint64))


def _mix(values: Hashes) -> Hashes:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), a bijection of 64-bit numbers."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _whole(hashes: Hashes, columns: tuple[int, int, int] = (0, 1, 2)) -> Hashes:
    """One hash a pair, of its parts in the order of `columns`."""
    first, second, third = (hashes[:, column] for column in columns)
    return _mix(_mix(_mix(first) + second) + third)


def _repeats(hashes: Hashes) -> tuple[int, int]:
    whole = _whole(hashes)
    duplicates = len(whole) - len(np.unique(whole))
    return duplicates, int(np.isin(_whole(hashes, (0, 2, 1)), whole).sum())


def _summary(lengths: npt.NDArray[np.int64], bin_width: int) -> LengthSummary:
    if not len(lengths):
        return LengthSummary(0.0, 0, 0, 0, 0, 0)
    spread = np.percentile(lengths, (5, 50, 95, 99), method="nearest")
    p5, p50, p95, p99 = (int(value) for value in spread)
    counts = tuple(np.bincount(lengths // bin_width).tolist())
    return LengthSummary(float(lengths.mean()), p5, p50, p95, p99, int(lengths.max()), bin_width, counts)
