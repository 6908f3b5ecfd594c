"""What became of the rows: counts by source and reason, lengths, what is odd about the pairs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from dpo_scale.data.hashing import Hashes, splitmix64
from dpo_scale.data.token_pairs import TokenPairs

_BLOCK_PAIRS = 2**18
"""Pairs looked at at once: bounds the memory of a pass over any amount of data."""
_MOST_BINS = 50
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """Distribution of lengths in tokens."""

    mean: float
    p5: int
    p50: int
    p95: int
    p99: int
    max: int
    bin_tokens: int
    """Width of a bin of the histogram: 1, 2 or 5 times a power of ten."""
    bins: tuple[int, ...]
    """Pairs by length: bin n holds those of n * bin_tokens up to (n + 1) * bin_tokens - 1 tokens."""


@dataclass(frozen=True, slots=True)
class SourceReport:
    """Counts of one source. A row gives one pair, unless it ranks completions."""

    path: str
    rows_read: int
    """Rows that were taken, those of several copies once."""
    pairs_kept: int
    """Pairs that an epoch takes, further copies included."""
    copies: int = 0
    """Those of them that are further copies, because of the source's weight."""
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
    """Pairs that stand in the sources again, those of another source included."""
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
            fields[name] = LengthSummary(**{**summary, "bins": tuple(summary["bins"])})
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
        for name, count in (
            ("further copies among them", sum(source.copies for source in self.sources)),
            ("boundary moved into the prompt", sum(source.boundaries_moved for source in self.sources)),
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
            spread = f"{lengths.mean:.0f} mean, {lengths.p50} median, {lengths.p95} p95, {lengths.max} longest"
            table.add_row(f"{name} tokens", spread)
        table.add_row("chosen is the longer", f"{self.chosen_longer:.1%}")
        table.add_row("rejected is the longer", f"{self.rejected_longer:.1%}")
        saved = self.tokens_saved_by_sharing / max(1, self.tokens + self.tokens_saved_by_sharing)
        table.add_row("tokens", f"{self.tokens:,}")
        table.add_row("saved by sharing prompts", f"{self.tokens_saved_by_sharing:,} tokens, {saved:.1%}")
        return table

    def tables(self, title: str) -> list[Table]:
        """The counts for the console, and source by source where there are several."""
        return [self.table(title), *([self._sources_table(f"{title} by source")] if len(self.sources) > 1 else [])]

    def _sources_table(self, title: str) -> Table:
        """Share of each source in the mix, and of its rows that were dropped, by reason."""
        table = Table("source", "rows", "pairs", "of the mix", "dropped", title=title, title_justify="left")
        for column in table.columns[1:4]:
            column.justify = "right"
        for source in self.sources:
            dropped = "\n".join(
                f"{count / max(1, source.rows_read):.1%} {reason}"
                for reason, count in sorted(source.dropped.items(), key=lambda item: -item[1])
            )
            share = source.pairs_kept / max(1, self.pairs_kept)
            table.add_row(source.path, f"{source.rows_read:,}", f"{source.pairs_kept:,}", f"{share:.1%}", dropped)
        return table


@dataclass(frozen=True, slots=True)
class Overlap:
    """What held-out pairs share with the training pairs."""

    prompts: int
    """Held-out pairs whose prompt is trained on."""
    pairs: int
    """Held-out pairs that are trained on whole."""

    def describe(self, held_out: int) -> str:
        """One line for the console."""
        if not self.prompts and not self.pairs:
            return f"None of {held_out:,} held-out pairs has a prompt that is trained on"
        return (
            f"Of {held_out:,} held-out pairs {self.prompts:,} have a prompt that is trained on, and {self.pairs:,} are "
            "trained on whole: their metrics say less about unseen data"
        )


def describe(pairs: TokenPairs, sources: tuple[SourceReport, ...]) -> DataReport:
    """The report of a set of pairs. Besides the pairs' own columns it takes some 20 bytes of memory a pair."""
    counts = [_lengths(pairs, column) for column in range(3)]
    chosen_longer, rejected_longer = _longer(pairs)
    duplicates, contradictions = _repeats(pairs.hashes)
    return DataReport(
        sources=sources,
        prompt_tokens=_summary(counts[0]),
        chosen_tokens=_summary(counts[1]),
        rejected_tokens=_summary(counts[2]),
        chosen_longer=chosen_longer / max(len(pairs), 1),
        rejected_longer=rejected_longer / max(len(pairs), 1),
        duplicates=duplicates - sum(source.copies for source in sources),
        contradictions=contradictions,
        tokens=pairs.num_tokens,
        tokens_saved_by_sharing=int(counts[0] @ np.arange(len(counts[0]))),
    )


def overlap(train: TokenPairs, held_out: TokenPairs) -> Overlap:
    """How many held-out pairs, and prompts of them, are among the training pairs."""
    return Overlap(
        prompts=_count_in(held_out.hashes[:, 0], np.sort(train.hashes[:, 0])),
        pairs=_count_in(_whole(held_out.hashes), np.sort(_whole(train.hashes))),
    )


def _whole(hashes: Hashes, columns: tuple[int, int, int] = (0, 1, 2)) -> Hashes:
    """One hash a pair, of its parts in the order of `columns`."""
    whole = np.empty(len(hashes), np.uint64)
    for start in range(0, len(hashes), _BLOCK_PAIRS):
        first, second, third = (hashes[start : start + _BLOCK_PAIRS, column] for column in columns)
        whole[start : start + _BLOCK_PAIRS] = splitmix64(splitmix64(splitmix64(first) + second) + third)
    return whole


def _repeats(hashes: Hashes) -> tuple[int, int]:
    """Pairs that stand there again, and pairs that stand there the other way round as well."""
    ordered = _whole(hashes)
    ordered.sort()
    duplicates = int((ordered[1:] == ordered[:-1]).sum())
    return duplicates, _count_in(_whole(hashes, (0, 2, 1)), ordered)


def _count_in(values: Hashes, ordered: Hashes) -> int:
    """How many of the values are in a sorted array."""
    if not len(ordered):
        return 0
    found = 0
    for start in range(0, len(values), _BLOCK_PAIRS):
        wanted = np.sort(values[start : start + _BLOCK_PAIRS])  # sorted, they are looked up in one walk
        places = np.searchsorted(ordered, wanted)
        found += int((ordered[np.minimum(places, len(ordered) - 1)] == wanted).sum())
    return found


def _longer(pairs: TokenPairs) -> tuple[int, int]:
    """Pairs whose chosen completion is the longer one, and whose rejected one is."""
    chosen_longer = rejected_longer = 0
    for start in range(0, len(pairs), _BLOCK_PAIRS):
        _, chosen, rejected = pairs.lengths[start : start + _BLOCK_PAIRS].T
        chosen_longer += int((chosen > rejected).sum())
        rejected_longer += int((chosen < rejected).sum())
    return chosen_longer, rejected_longer


def _lengths(pairs: TokenPairs, column: int) -> Counts:
    """Pairs by their length, int64 [longest + 1]."""
    counts = np.zeros(1, np.int64)
    for start in range(0, len(pairs), _BLOCK_PAIRS):
        block = np.bincount(pairs.lengths[start : start + _BLOCK_PAIRS, column], minlength=len(counts))
        block[: len(counts)] += counts
        counts = block
    return counts


def _summary(counts: Counts) -> LengthSummary:
    pairs, longest = int(counts.sum()), len(counts) - 1
    p5, p50, p95, p99 = (_percentile(counts, share) for share in (0.05, 0.5, 0.95, 0.99))
    width = _bin_width(longest)
    bins = np.add.reduceat(counts, np.arange(0, len(counts), width)) if pairs else counts[:0]
    mean = float(counts @ np.arange(len(counts))) / max(pairs, 1)
    return LengthSummary(mean, p5, p50, p95, p99, longest, width, tuple(bins.tolist()))


def _percentile(counts: Counts, share: float) -> int:
    """The length at the rank nearest to a share of all."""
    rank = round(share * (int(counts.sum()) - 1))
    length: np.intp = np.searchsorted(np.cumsum(counts), rank, side="right")
    return int(length)


def _bin_width(longest: int) -> int:
    """The narrowest of 1, 2, 5, 10, 20, 50 and so on that makes few enough bins."""
    widths: Iterator[int] = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return next(width for width in widths if longest < width * _MOST_BINS)
