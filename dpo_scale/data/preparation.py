"""Sources -> TokenPairs and their report, tokenized once and kept on disk.

The store is addressed by content: data files, tokenizer, template, settings and this code. A second
call, by any process, maps the stored files into memory and does nothing else.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_scale.console import counted
from dpo_scale.data.hashing import Hashes, sequence_hashes
from dpo_scale.data.preferences import NAME_COLUMNS, PreferencePair, check_columns, to_preferences
from dpo_scale.data.readers import JSON_ARRAY
from dpo_scale.data.report import DataReport, SourceReport
from dpo_scale.data.row_values import RowError
from dpo_scale.data.rows import BadRow, Block, Numbers
from dpo_scale.data.sources import HELD_OUT_SEED, check_paths, read_blocks
from dpo_scale.data.token_pairs import Lengths, TokenIds, TokenPairs
from dpo_scale.data.token_store import PairWriter, TokenStore
from dpo_scale.data.tokenization import (
    NO_PREFERENCE,
    TEMPLATE_FAILED,
    TOO_LONG,
    Dropped,
    Kept,
    PairTokenizer,
    no_preference,
)
from dpo_scale.errors import DataError
from dpo_scale.recipe import DataSection, DataSource

INLINE_BLOCKS = 4
"""Blocks tokenized in this process before others are started."""
MAX_LISTED = 20
"""Bad rows counted in one error."""
LOOK_AHEAD_BLOCKS = 100
"""Blocks read on behind the first bad row, to report its like together."""


def prepare_pairs(
    sources: Sequence[DataSource],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    setting: str = "data.train",
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[TokenPairs, DataReport]:
    """The pairs of all sources in order, from the store if they are there.

    Call it in one process a machine first: that one fills the store, or waits for another machine that does, and the
    others find it filled. The sources lie one behind the other; the order of an epoch (planning.py) mixes them.

    Args:
        seed: draws the rows of sources with `rows` or `weight`.
        setting: the list that the sources stand in, `data.train` or `data.evaluate`, for messages.
        progress: called with the number of further rows that are done, with 0 about once a second while another
            process fills the store, and never where it is filled; what it raises ends the work.

    Raises:
        DataError: rows that cannot be used (listed together), missing files, or no pair left.
    """
    _check_sources(sources, setting)
    pair_tokenizer = PairTokenizer(tokenizer, data)
    store = TokenStore.for_content(sources, data, tokenizer, pair_tokenizer.template, seed=seed)
    return store.load() or store.fill(
        lambda writer: _tokenize_sources(sources, setting, pair_tokenizer, seed, writer, progress),
        while_waiting=lambda: progress(0),
    )


def check_rows(data: DataSection, *, seed: int) -> None:
    """Read all rows as text, training rows drawn with a seed, where there is no tokenizer to go on with.

    Raises DataError for rows that cannot be used (listed together), or missing files.
    """
    lists = (("data.train", data.train, seed), ("data.evaluate", data.evaluate, HELD_OUT_SEED))
    for setting, sources, _ in lists:
        _check_sources(sources, setting)
    refused = [
        _refused_as_text(source, setting, data, draws) for setting, sources, draws in lists for source in sources
    ]
    if any(one.rows for one in refused):
        raise _bad_rows_error(refused)


def _check_sources(sources: Sequence[DataSource], setting: str) -> None:
    """Refuse what is wrong with the list itself, before anything is read."""
    for source in sources:
        check_columns(source.columns)
    check_paths(sources, setting)


@dataclass(slots=True)
class _Refused:
    """The rows of one source that stop the run under the recipe's settings."""

    path: str
    setting: str
    """The list that the source stands in."""
    rows_read: int = 0
    rows: list[BadRow] = field(default_factory=list)

    def with_columns(self) -> str:
        """How the recipe names the columns of this source."""
        return f"{self.setting}: [{{path: {self.path}, columns: {{prompt: ..., chosen: ..., rejected: ...}}}}]"

    def add(self, rows_read: int, rows: Sequence[BadRow]) -> None:
        self.rows_read += rows_read
        self.rows += rows

    @property
    def is_misread(self) -> bool:
        """It has another form, or no row the fields that make a pair: none would be left without the bad ones."""
        if any(row.reason == JSON_ARRAY for row in self.rows):
            return True
        return len(self.rows) == self.rows_read > 0 and all(row.reason.endswith(NAME_COLUMNS) for row in self.rows)


def _refused_as_text(source: DataSource, setting: str, data: DataSection, seed: int) -> _Refused:
    refused = _Refused(source.path, setting)

    def set_aside(place: str, reason: str, stops: bool) -> None:
        if stops:
            refused.rows.append(BadRow(place, reason))

    for block in read_blocks(source, seed):
        refused.rows_read += len(block)
        for pair in _recognized(block, source.columns, data, set_aside):
            if reason := no_preference(pair):
                set_aside(pair.row, reason, data.on_no_preference == "error")
        if len(refused.rows) >= MAX_LISTED:
            break
    return refused


@dataclass(slots=True)
class _Counts:
    """What became of rows."""

    rows_read: int = 0
    pairs_kept: int = 0
    copies: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    first_places: dict[str, str] = field(default_factory=dict)
    boundaries_moved: int = 0

    def add(self, later: _Counts) -> None:
        self.rows_read += later.rows_read
        self.pairs_kept += later.pairs_kept
        self.copies += later.copies
        self.formats += later.formats
        self.dropped += later.dropped
        self.truncated += later.truncated
        self.boundaries_moved += later.boundaries_moved
        self.first_places = {**later.first_places, **self.first_places}

    def report(self, path: str) -> SourceReport:
        return SourceReport(
            path=path,
            rows_read=self.rows_read,
            pairs_kept=self.pairs_kept,
            copies=self.copies,
            formats=dict(self.formats),
            dropped=dict(self.dropped),
            truncated=dict(self.truncated),
            first_places=self.first_places,
            boundaries_moved=self.boundaries_moved,
        )


@dataclass(slots=True)
class _Chunk:
    """A block in tokens: the columns of `PairWriter.add`, and what became of its rows."""

    file: str
    tokens: TokenIds
    lengths: Lengths
    hashes: Hashes
    numbers: Numbers
    counts: _Counts
    bad_rows: list[BadRow]
    """Rows that stop the run under the recipe's settings."""


def _tokenize_sources(
    sources: Sequence[DataSource],
    setting: str,
    tokenizer: PairTokenizer,
    seed: int,
    writer: PairWriter,
    progress: Callable[[int], None],
) -> None:
    reports: list[SourceReport] = []
    refused: list[_Refused] = []
    for source in sources:
        total = _Counts()
        refused.append(_Refused(source.path, setting))
        budget = LOOK_AHEAD_BLOCKS
        for chunk in _tokenized(read_blocks(source, seed), source.columns, tokenizer):
            progress(chunk.counts.rows_read)
            refused[-1].add(chunk.counts.rows_read, chunk.bad_rows)
            num_refused = sum(len(one.rows) for one in refused)
            if num_refused:
                budget -= 1
                if budget <= 0 or num_refused >= MAX_LISTED:
                    break
                continue
            writer.add(chunk.tokens, chunk.lengths, chunk.hashes, chunk.file, chunk.numbers)
            total.add(chunk.counts)
        reports.append(total.report(source.path))
    if any(one.rows for one in refused):
        raise _bad_rows_error(refused)
    if sources and not any(report.pairs_kept for report in reports):
        raise _nothing_left_error(reports, setting)
    writer.finish(tuple(reports))


def _tokenized(blocks: Iterator[Block], columns: dict[str, str] | None, tokenizer: PairTokenizer) -> Iterator[_Chunk]:
    """Blocks in order: the first few in this process, the rest of a large source in others."""
    workers = tokenizer.data.workers or len(os.sched_getaffinity(0))
    for block in blocks if workers == 1 else itertools.islice(blocks, INLINE_BLOCKS):
        yield _tokenize_block(tokenizer, columns, block)
    ahead = next(blocks, None)
    if ahead is None:
        return
    # Spawned, not forked: this process may hold CUDA, communicator and tokenizer threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer, columns))
    waiting: deque[Future[_Chunk]] = deque()
    first_signs: list[Future[int]] = []
    try:
        first_signs += [pool.submit(os.getpid) for _ in range(workers)]
        while ahead is not None and _are_starting(first_signs):
            yield _tokenize_block(tokenizer, columns, ahead)
            ahead = next(blocks, None)
        while ahead is not None:
            waiting.append(pool.submit(_work, ahead))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
            ahead = next(blocks, None)
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenizes was killed, as happens where the memory is full; lower data.workers",
            may_pass=True,  # others on the machine may have taken the memory
        ) from error
    finally:
        pool.shutdown(wait=not _are_starting(first_signs), cancel_futures=True)


def _are_starting(first_signs: Sequence[Future[int]]) -> bool:
    """Whether no worker has come up yet; it takes them seconds, in which this process tokenizes on."""
    return not any(sign.done() for sign in first_signs)


_worker: tuple[PairTokenizer, dict[str, str] | None]
"""What a worker process tokenizes with."""


def _start_worker(tokenizer: PairTokenizer, columns: dict[str, str] | None) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches all processes of a terminal; when to stop is for the one that started this one to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (tokenizer, columns)


def _end_with_parent() -> None:
    """A worker holds both ends of its queue, and would wait in it for ever after its parent was killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(block: Block) -> _Chunk:
    return _tokenize_block(*_worker, block)


def _tokenize_block(tokenizer: PairTokenizer, columns: dict[str, str] | None, block: Block) -> _Chunk:
    data = tokenizer.data
    counts, bad_rows = _Counts(rows_read=len(block)), list[BadRow]()

    def set_aside(place: str, reason: str, stops: bool) -> None:
        if stops:
            bad_rows.append(BadRow(place, reason))
        else:
            _count_dropped(counts, place, reason)

    pairs = list(_recognized(block, columns, data, set_aside))
    counts.formats.update(pair.format for pair in pairs)
    kept: list[Kept] = []
    for outcome in tokenizer.tokenize(pairs):
        if isinstance(outcome, Dropped):
            stops = (outcome.reason in NO_PREFERENCE and data.on_no_preference == "error") or (
                outcome.reason == TEMPLATE_FAILED and data.on_bad_row == "error"
            )
            detail = f" ({outcome.detail})" if outcome.detail else ""
            set_aside(outcome.row, outcome.reason + detail, stops)
        else:
            kept.append(outcome)
            counts.truncated.update(outcome.cuts)
            counts.boundaries_moved += outcome.boundary_moved
    return _chunk(block, kept, counts, bad_rows)


def _recognized(
    block: Block, columns: dict[str, str] | None, data: DataSection, set_aside: Callable[[str, str, bool], None]
) -> Iterator[PreferencePair]:
    """The pairs of a block's rows. `set_aside` gets the place of any other row, why, and whether it stops the run."""
    for row in block.rows():
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            yield from to_preferences(row, columns, data.completion_pairs, data.completion_margin)
        except RowError as error:
            set_aside(row.place, str(error), data.on_bad_row == "error")
        except RecursionError:
            set_aside(row.place, "nested too deeply", data.on_bad_row == "error")


def _chunk(block: Block, kept: list[Kept], counts: _Counts, bad_rows: list[BadRow]) -> _Chunk:
    """The pairs of a block in columns, each as often as its row is taken."""
    numbers = np.array([int(one.pair.row.rpartition(":")[2]) for one in kept], np.int64)
    if block.copies is not None:
        copies = block.copies[np.searchsorted(block.numbers, numbers)]
        kept = [one for one, times in zip(kept, copies.tolist(), strict=True) for _ in range(times)]
        counts.copies = len(kept) - len(numbers)
        numbers = np.repeat(numbers, copies)
    counts.pairs_kept = len(kept)
    parts = [ids for one in kept for ids in (one.pair.prompt, one.pair.chosen, one.pair.rejected)]
    lengths = np.array([len(part) for part in parts], np.int64)
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    hashes = sequence_hashes(tokens, lengths).reshape(-1, 3) if parts else np.zeros((0, 3), np.uint64)
    return _Chunk(block.file, tokens, lengths.reshape(-1, 3), hashes, numbers, counts, bad_rows)


def _count_dropped(counts: _Counts, place: str, reason: str) -> None:
    # The words in front of the details, so that a thousand rows make one line of the report.
    kind = re.split(r" \(|; |, which ", reason, maxsplit=1)[0]
    counts.dropped[kind] += 1
    counts.first_places.setdefault(kind, f"{place}: {reason}")


def _bad_rows_error(refused: Sequence[_Refused]) -> DataError:
    bad_rows = [row for one in refused for row in one.rows][:MAX_LISTED]
    places: dict[str, list[str]] = {}
    for row in bad_rows:
        places.setdefault(row.reason, []).append(row.place)
    more = ", and maybe more," if len(bad_rows) == MAX_LISTED else ""
    lines = [f"{counted(len(bad_rows), 'row')}{more} cannot be used"]
    for reason, (first, *others) in places.items():
        alike = f" and {counted(len(others), 'more row')}" if others else ""
        lines.append(f"  {first}{alike}: {reason}")
    listed = [one for one in refused if one.rows and one.rows[0] in bad_rows]
    if not any(one.is_misread for one in listed):
        plain = all(row.reason in NO_PREFERENCE for row in bad_rows)
        skipping = "data.on_no_preference" if plain else "data.on_bad_row"
        lines.append(f"mend the rows, or set {skipping}=skip to leave them out and count them")
    without_columns = [one for one in listed if any("data columns" in row.reason for row in one.rows)]
    if without_columns:
        lines.append(f"data columns are written as {without_columns[0].with_columns()}")
    return DataError("\n".join(lines))


def _nothing_left_error(reports: Sequence[SourceReport], setting: str) -> DataError:
    lines = [
        f"  {one.path}: {one.rows_read} rows read"
        + "".join(f"\n    {count} dropped, first {one.first_places[why]}" for why, count in one.dropped.items())
        for one in reports
    ]
    what = "pair is left to train on" if setting == "data.train" else f"held-out pair is left ({setting})"
    reasons = {reason for one in reports for reason in one.dropped}
    remedies = ["mend the data"] * bool(reasons - TOO_LONG) if reasons else ["name files with rows"]
    remedies += ["raise the limit, or choose another data.truncation"] * bool(reasons & TOO_LONG)
    return DataError("\n".join([f"no {what}", *lines, ", or ".join(remedies)]))
