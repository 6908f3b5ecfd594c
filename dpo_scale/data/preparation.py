"""Sources -> TokenPairs and their report, tokenized once and kept on disk.

The store is addressed by content: data files, tokenizer, template, settings and this code. A second
call, by any process, maps the stored files into memory and does nothing else.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo_scale.data.preferences import PreferencePair, RowError, check_columns, to_preferences
from dpo_scale.data.report import DataReport, SourceReport
from dpo_scale.data.sources import BadRow, Row, read_rows
from dpo_scale.data.token_pairs import Lengths, TokenIds, TokenPairs
from dpo_scale.data.token_store import PairWriter, TokenStore
from dpo_scale.data.tokenization import NO_PREFERENCE, TEMPLATE_FAILED, Dropped, Kept, PairTokenizer
from dpo_scale.errors import DataError
from dpo_scale.recipe import DataSection, DataSource

CHUNK_ROWS = 512
"""Rows tokenized in one call."""
INLINE_CHUNKS = 16
"""Chunks tokenized in this process before others are started, which takes them seconds."""
MAX_LISTED = 20
"""Bad rows named in one error."""
LOOK_AHEAD_CHUNKS = 100
"""Chunks read on behind the first bad row, to report its like together."""


def prepare_pairs(
    sources: Sequence[DataSource],
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[TokenPairs, DataReport]:
    """The pairs of all sources in order, from the store if they are there.

    `progress` is told of further rows that were tokenized.
    Call it in one process a machine first: that one fills the store, the others find it filled.

    Raises:
        DataError: rows that cannot be used (listed together), a missing file, or no pair left.
    """
    for source in sources:
        check_columns(source.columns)
    pair_tokenizer = PairTokenizer(tokenizer, data)
    store = TokenStore.for_content(sources, data, tokenizer, pair_tokenizer.template, seed=seed)
    stored = store.load()
    if stored is None:
        with store.writer() as writer:
            _tokenize_sources(sources, data, pair_tokenizer, seed, writer, progress)
        stored = store.load()
        assert stored is not None
    return stored


@dataclass(slots=True)
class _Chunk:
    """What became of some rows of one source."""

    tokens: TokenIds
    lengths: Lengths
    places: list[str]
    rows_read: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    """Rows that stop the run under the recipe's settings."""
    formats: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    first_places: dict[str, str] = field(default_factory=dict)
    boundaries_moved: int = 0


def _tokenize_sources(
    sources: Sequence[DataSource],
    data: DataSection,
    tokenizer: PairTokenizer,
    seed: int,
    writer: PairWriter,
    progress: Callable[[int], None] | None,
) -> None:
    reports: list[SourceReport] = []
    bad_rows: list[BadRow] = []
    for source in sources:
        columns = source.columns
        total = _Chunk(np.zeros(0, np.int32), np.zeros((0, 3), np.int64), [])
        pairs_kept = 0
        budget = LOOK_AHEAD_CHUNKS
        for chunk in _tokenized(_chunks(read_rows(source, seed)), columns, tokenizer, data):
            if progress is not None:
                progress(chunk.rows_read)
            bad_rows += chunk.bad_rows
            if bad_rows:
                budget -= 1
                if budget <= 0 or len(bad_rows) >= MAX_LISTED:
                    break
                continue
            writer.add(chunk.tokens, chunk.lengths, chunk.places)
            pairs_kept += len(chunk.lengths)
            _add_counts(total, chunk)
        reports.append(_source_report(source.path, pairs_kept, total))
    if bad_rows:
        raise _bad_rows_error(bad_rows)
    if sources and not any(report.pairs_kept for report in reports):
        raise _nothing_left_error(reports)
    writer.finish(tuple(reports))


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, CHUNK_ROWS)):
        yield chunk


def _tokenized(
    chunks: Iterator[list[Row]],
    columns: dict[str, str] | None,
    tokenizer: PairTokenizer,
    data: DataSection,
) -> Iterator[_Chunk]:
    """Chunks in order: the first few in this process, the rest of a large source in others."""
    for rows in itertools.islice(chunks, INLINE_CHUNKS):
        yield _tokenize_chunk(tokenizer, columns, rows)
    workers = data.workers or len(os.sched_getaffinity(0))
    if workers == 1:
        for rows in chunks:
            yield _tokenize_chunk(tokenizer, columns, rows)
        return
    ahead = next(chunks, None)
    if ahead is None:
        return
    # Spawned, not forked: this process may hold CUDA, communicator and tokenizer threads.
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (tokenizer, columns)) as pool:
        waiting: deque[Future[_Chunk]] = deque()
        try:
            for rows in itertools.chain([ahead], chunks):
                waiting.append(pool.submit(_work, rows))
                if len(waiting) > 3 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


_worker: tuple[PairTokenizer, dict[str, str] | None]
"""What a worker process tokenizes with."""


def _start_worker(tokenizer: PairTokenizer, columns: dict[str, str] | None) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (tokenizer, columns)


def _work(rows: list[Row]) -> _Chunk:
    return _tokenize_chunk(*_worker, rows)


def _tokenize_chunk(tokenizer: PairTokenizer, columns: dict[str, str] | None, rows: list[Row]) -> _Chunk:
    data = tokenizer.data
    chunk = _Chunk(np.zeros(0, np.int32), np.zeros((0, 3), np.int64), [], rows_read=len(rows))
    pairs: list[PreferencePair] = []
    for row in rows:
        try:
            if isinstance(row, BadRow):
                raise RowError(row.reason)
            pairs += to_preferences(row, columns)
        except RowError as error:
            _set_aside(chunk, row.place, str(error), data.on_bad_row == "error")
        except RecursionError:
            _set_aside(chunk, row.place, "nested too deeply", data.on_bad_row == "error")
    chunk.formats.update(pair.format for pair in pairs)
    kept: list[Kept] = []
    for outcome in tokenizer.tokenize(pairs):
        if isinstance(outcome, Dropped):
            stops = (outcome.reason in NO_PREFERENCE and data.on_no_preference == "error") or (
                outcome.reason == TEMPLATE_FAILED and data.on_bad_row == "error"
            )
            detail = f" ({outcome.detail})" if outcome.detail else ""
            _set_aside(chunk, outcome.row, outcome.reason + detail, stops)
        else:
            kept.append(outcome)
            chunk.truncated.update(outcome.cuts)
            chunk.boundaries_moved += outcome.boundary_moved
    if kept:
        parts = [ids for one in kept for ids in (one.pair.prompt, one.pair.chosen, one.pair.rejected)]
        chunk.tokens = np.concatenate(parts)
        chunk.lengths = np.array([len(part) for part in parts], np.int64).reshape(-1, 3)
        chunk.places = [one.pair.row for one in kept]
    return chunk


def _set_aside(chunk: _Chunk, place: str, reason: str, stops: bool) -> None:
    if stops:
        chunk.bad_rows.append(BadRow(place, reason))
        return
    # The words in front of the details, so that a thousand rows make one line of the report.
    kind = re.split(r" \(|; |, which ", reason, maxsplit=1)[0]
    chunk.dropped[kind] += 1
    chunk.first_places.setdefault(kind, f"{place}: {reason}")


def _add_counts(total: _Chunk, chunk: _Chunk) -> None:
    total.rows_read += chunk.rows_read
    total.formats += chunk.formats
    total.dropped += chunk.dropped
    total.truncated += chunk.truncated
    total.boundaries_moved += chunk.boundaries_moved
    total.first_places = {**chunk.first_places, **total.first_places}


def _source_report(path: str, pairs_kept: int, total: _Chunk) -> SourceReport:
    return SourceReport(
        path=path,
        rows_read=total.rows_read,
        pairs_kept=pairs_kept,
        formats=dict(total.formats),
        dropped=dict(total.dropped),
        truncated=dict(total.truncated),
        first_places=total.first_places,
        boundaries_moved=total.boundaries_moved,
    )


def _bad_rows_error(bad_rows: Sequence[BadRow]) -> DataError:
    listed = "\n".join(f"  {row.place}: {row.reason}" for row in bad_rows[:MAX_LISTED])
    more = ", and maybe more," if len(bad_rows) >= MAX_LISTED else ""
    plain = all(row.reason in NO_PREFERENCE for row in bad_rows)
    setting = "data.on_no_preference" if plain else "data.on_bad_row"
    count = min(len(bad_rows), MAX_LISTED)
    return DataError(
        f"{count} row{'s' if count > 1 else ''}{more} cannot be used\n{listed}\n"
        f"mend the rows, or set {setting}=skip to leave them out and count them"
    )


def _nothing_left_error(reports: Sequence[SourceReport]) -> DataError:
    lines = [
        f"  {report.path}: {report.rows_read} rows read"
        + "".join(
            f"\n    {count} dropped: {reason}; first: {report.first_places[reason]}"
            for reason, count in report.dropped.items()
        )
        for report in reports
    ]
    return DataError(
        "no pair is left to train on\n"
        + "\n".join(lines)
        + "\nmend the data, or for lengths raise data.max_length or choose another data.truncation"
    )
