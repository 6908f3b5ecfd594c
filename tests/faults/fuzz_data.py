"""Throw broken preference data at the way from files to tokens, and hold its books to an independent count.

    python tests/faults/fuzz_data.py [--cases 10000] [--seed 0]

A case is one file of good and broken rows, perhaps damaged as a whole. Whatever it holds, reading it ends in time with
pairs or with an error that users can mend; rows read are those of the file; each is kept, or counted under a reason
with the place of the first; and every good row in front of the damage is kept.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from small_tokenizers import hand_byte_level

from dpo_scale.data.preparation import prepare_pairs
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.errors import DataError
from dpo_scale.recipe import DataSection

LONG_LINE = 1 << 16
BOMB_MIB, MEMORY_MIB = 512, 400
"""What a bomb unpacks to, and by how much it may raise the memory of the process."""
CPU_SECONDS_PER_CASE = 60
TEXT_FILES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".csv", ".tsv", ".csv.gz")
TABLES = (".parquet", ".arrow")


@dataclass(frozen=True)
class Case:
    """One file."""

    suffix: str
    content: bytes
    rows: int | None
    """Rows in it by construction; None where it is damaged as a whole."""
    good: tuple[int, ...]
    """Places of the rows that have to be kept, counted from 1."""
    on_bad_row: str


@dataclass
class Tally:
    """What the cases came to."""

    cases: int = 0
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0


# --- rows ---------------------------------------------------------------------------------------

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
spicy_text = st.sampled_from(
    [
        "",
        " ",
        "\x00",
        "\ufeff",
        "\u2028",
        "<|im_end|>",
        "<|end|>",
        "\r\n",
        "\\",
        '"',
        "\U0010ffff",
        "{{ 1/0 }}",
        "a" * 3000,
    ]
)
texts = any_text | spicy_text
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _good_rows(form: str, a: str, b: str) -> dict[str, Any]:
    """A row that is a pair whatever the two texts are."""
    prompt, yes, no = f"Q{a}:", f" yes{b}", f" no{b}"
    chats = {
        "chosen": [user(prompt), assistant(yes)],
        "rejected": [user(prompt), assistant(no)],
    }
    return {
        "strings": {"prompt": prompt, "chosen": yes, "rejected": no},
        "implicit": {"chosen": prompt + yes, "rejected": prompt + no},
        "dialogue": {side: f"\n\nHuman: {a}\n\nAssistant:{end}" for side, end in (("chosen", yes), ("rejected", no))},
        "chats": chats,
        "system": {**chats, "system": a},
        "tools": {**chats, "tools": json.dumps([{"type": "function", "function": {"name": a}}])},
        "scored": {"prompt": prompt, "completions": [no, yes], "scores": [1, 2.5]},
        "ranked": {"prompt": prompt, "completions": [{"text": no, "rank": 2}, {"text": yes, "rank": 1}]},
        "compared": {"prompt": prompt, "response_1": yes, "response_2": no, "preference": -1},
    }[form]


FORMS = ("strings", "implicit", "dialogue", "chats", "system", "tools", "scored", "ranked", "compared")
good_rows = st.builds(_good_rows, st.sampled_from(FORMS), any_text, any_text)
FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "system",
    "tools",
    "documents",
    "chat_template_kwargs",
    "completions",
    "scores",
)
HOSTILE = ("\ud800", "a\udfffb", 10**400, float("nan"), float("-inf"), {"role": "user"}, [[]], [None], [{"from": 1}])


@st.composite
def broken_rows(draw: st.DrawFn) -> dict[str, Any]:
    """A good row with fields that are gone, null, of another type, or of another row's format."""
    row = dict(draw(good_rows))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(FIELDS) | st.sampled_from(sorted(row)) if row else st.sampled_from(FIELDS))
        action = draw(st.sampled_from(["drop", "value", "hostile", "nested", "mixed"]))
        if action == "drop":
            row.pop(name, None)
        elif action == "value":
            row[name] = draw(json_values)
        elif action == "hostile":
            row[name] = draw(st.sampled_from(HOSTILE))
        elif action == "nested":
            row[name] = _nested(draw(st.sampled_from([50, 400])), draw(st.booleans()))
        else:
            row |= draw(good_rows)
    return row


def _nested(depth: int, in_objects: bool) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = {"content": value} if in_objects else [value]
    return value


def _deep(depth: int, name: str) -> bytes:
    opening, closing = (b'{"a":', b"}") if depth % 2 else (b"[", b"]")
    return (
        b'{"prompt":"Q","chosen":"a","rejected":"b","'
        + name.encode()
        + b'":'
        + opening * depth
        + b"1"
        + closing * depth
        + b"}"
    )


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode()


broken_lines = st.one_of(
    broken_rows().map(_line),
    st.binary(max_size=60).map(lambda junk: junk.replace(b"\n", b"")),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.tuples(good_rows.map(_line), st.floats(0, 1)).map(lambda pair: pair[0][: int(len(pair[0]) * pair[1])]),
    st.tuples(good_rows.map(_line), st.integers(0), st.binary(min_size=1, max_size=3)).map(
        lambda three: (
            three[0][: three[1] % len(three[0])] + three[2].replace(b"\n", b"") + three[0][three[1] % len(three[0]) :]
        )
    ),
    st.builds(_deep, st.sampled_from([333, 334, 5000, 12_001]), st.sampled_from(FIELDS)),
    st.sampled_from(
        [b"\x00", b"\x00" * 500, b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00", b'{"prompt":' + b"1" * 5000 + b"}"]
    ),
    st.integers(LONG_LINE, 3 * LONG_LINE).map(lambda size: b'{"prompt":"' + b"a" * size),
    st.sampled_from([b"", b" ", b"\r", b"\t "]),
)


# --- files --------------------------------------------------------------------------------------


def _is_row(line: bytes, number: int) -> bool:
    return bool((line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    suffix = draw(st.sampled_from(TEXT_FILES + TABLES))
    on_bad_row = draw(st.sampled_from(["skip", "skip", "error"]))
    if suffix.startswith(".jsonl"):
        lines, good = _interleave(draw, good_rows.map(_line), broken_lines)
        content = b"\n".join(lines) + draw(st.sampled_from([b"", b"\n"]))
        rows = sum(_is_row(line, number) for number, line in enumerate(content.split(b"\n"), 1))
    elif suffix.startswith(".json"):
        values, good = _interleave(draw, good_rows, broken_rows() | json_values)
        content, rows = json.dumps(values).encode(), len(values)
        if draw(st.integers(0, 9)) == 0:
            content, rows, good = content[: draw(st.integers(0, len(content)))], None, ()
    elif suffix in TABLES:
        content, rows, good = _table(suffix, draw(st.lists(good_rows | broken_rows(), max_size=6)))
    else:
        content, rows, good = _csv(draw, "\t" if "tsv" in suffix else ",")
    content = _compressed(suffix, content)
    if draw(st.integers(0, 4)) == 0:
        content, rows, good = _damaged(draw, content), None, ()
    return Case(suffix, content, rows, good, on_bad_row)


def _interleave(
    draw: st.DrawFn, good: st.SearchStrategy[Any], broken: st.SearchStrategy[Any]
) -> tuple[list[Any], tuple[int, ...]]:
    parts = draw(st.lists(st.one_of(st.tuples(st.just(True), good), st.tuples(st.just(False), broken)), max_size=8))
    places = tuple(number for number, (is_good, _) in enumerate(parts, 1) if is_good)
    return [value for _, value in parts], places


def _csv(draw: st.DrawFn, delimiter: str) -> tuple[bytes, int | None, tuple[int, ...]]:
    rows = draw(st.lists(st.tuples(texts, texts, texts), max_size=6))
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerow(["prompt", "chosen", "rejected"])
    writer.writerows(rows)
    content = stream.getvalue().encode()
    if draw(st.booleans()):
        return content, len(rows), ()
    return content + draw(st.binary(max_size=40)), None, ()


def _table(suffix: str, rows: list[dict[str, Any]]) -> tuple[bytes, int | None, tuple[int, ...]]:
    """Rows of one schema, the mixed ones as JSON text, as columnar files hold them."""
    plain = [{name: json.dumps(value) for name, value in row.items() if name in FIELDS} for row in rows]
    names = sorted({name for row in plain for name in row}) or ["prompt"]
    table = pyarrow.table({name: pyarrow.array([row.get(name) for row in plain], pyarrow.string()) for name in names})
    sink = pyarrow.BufferOutputStream()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes(), len(rows), ()


def _compressed(suffix: str, content: bytes) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(content, 1)
    if suffix.endswith(".zst"):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return content


def _damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut off, or with other bytes somewhere."""
    at = draw(st.integers(0, len(content)))
    if draw(st.booleans()):
        return content[:at]
    other = draw(st.binary(min_size=1, max_size=8))
    return content[:at] + other + content[at + len(other) :]


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files that are large when they are unpacked."""
    mebibyte = b"0" * (1 << 20)
    for suffix, start in (
        (".jsonl.gz", b""),
        (".jsonl.gz", b'{"prompt":"'),
        (".json.gz", b'["'),
        (".csv.gz", b'prompt,chosen\n"'),
    ):
        stream = io.BytesIO()
        with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=1) as zipped:
            zipped.write(start)
            for _ in range(BOMB_MIB):
                zipped.write(mebibyte)
        yield suffix, stream.getvalue()


# --- the check ----------------------------------------------------------------------------------


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Time of the processor: a busy machine is no hang."""

    def ring(*_: object) -> None:
        raise AssertionError(f"a case took longer than {seconds} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


TOKENIZER = hand_byte_level()


def check(case: Case, folder: Path, tally: Tally) -> None:
    """Read the case's file and hold the outcome to the promises at the top."""
    folder.mkdir(exist_ok=True)
    path = folder / f"rows{case.suffix}"
    path.write_bytes(case.content)
    data = DataSection(
        train=[str(path)], on_bad_row=case.on_bad_row, workers=1, cache_dir=str(folder / "store"), max_length=10_000
    )
    tally.cases += 1
    if tally.cases % 500 == 0:
        print(f"{tally.cases:,} files", file=sys.stderr, flush=True)
    began = time.process_time()
    try:
        with _time_limit(CPU_SECONDS_PER_CASE):
            pairs, report = prepare_pairs(data.train, data, TOKENIZER, seed=0)
    except DataError as error:
        _check_error(str(error), path, case, tally)
        return
    finally:
        tally.slowest = max(tally.slowest, time.process_time() - began)
    (source,) = report.sources
    _check_books(path, case, source.rows_read, len(pairs), source.dropped, source.first_places)
    _check_pairs(pairs, path, case)
    tally.rows += source.rows_read
    tally.kept += len(pairs)
    tally.dropped.update(source.dropped)


def _check_books(
    path: Path, case: Case, rows_read: int, kept: int, dropped: dict[str, int], first_places: dict[str, str]
) -> None:
    assert rows_read == kept + sum(dropped.values()), (rows_read, kept, dropped)
    assert case.rows is None or rows_read == case.rows, (rows_read, case.rows)
    assert dropped.keys() == first_places.keys()
    for reason, place in first_places.items():
        assert re.match(rf"{re.escape(str(path))}:\d+: .*{re.escape(reason[:30])}", place, re.DOTALL), (reason, place)


def _check_pairs(pairs: TokenPairs, path: Path, case: Case) -> None:
    places = set(pairs.rows)
    assert len(places) == len(pairs)
    missing = [number for number in case.good if f"{path}:{number}" not in places]
    assert not missing, f"good rows {missing} are not among the pairs"
    for pair in pairs:
        assert len(pair.prompt)
        assert len(pair.chosen)
        assert len(pair.rejected)


def _check_error(message: str, path: Path, case: Case, tally: Tally) -> None:
    """An error names rows with reasons, or the file that is broken as a whole, or keeps the books itself."""
    assert str(path) in message, message
    if message.startswith("no pair is left"):
        rows_read = int(re.search(r": (\d+) rows read", message)[1])  # type: ignore[index]
        entries = re.findall(r"^    (\d+) dropped, first (.*?): (.*)$", message, re.MULTILINE | re.DOTALL)
        counts = re.findall(r"^    (\d+) dropped, first ", message, re.MULTILINE)
        assert sum(map(int, counts)) == rows_read, message
        assert entries or not rows_read, message
        assert case.rows is None or rows_read == case.rows, message
        assert not case.good, message
        tally.rows += rows_read
        tally.errors["no pair is left"] += 1
    elif "cannot be used" in message:
        assert case.on_bad_row == "error"
        assert re.search(rf"^  {re.escape(str(path))}:\d+( and \d+ more rows?)?: \S", message, re.MULTILINE), message
        tally.errors["rows with places and reasons"] += 1
    else:
        assert case.rows is None, message
        tally.errors["the file as a whole"] += 1


def check_bombs(folder: Path, tally: Tally) -> None:
    """A bomb is refused with the place of its row, or as a file, in bounded memory."""
    for number, (suffix, content) in enumerate(bombs()):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        check(Case(suffix, content, None, (), "error"), folder / str(number), tally)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < MEMORY_MIB << 10, f"{suffix}: {grown >> 10} MiB more memory"


def fuzz(num_cases: int, first_seed: int, folder: Path) -> Tally:
    """Check so many cases, and the bombs."""
    tally = Tally()

    @seed(first_seed)
    @settings(
        max_examples=num_cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case: Case) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as own:
            check(case, Path(own), tally)

    run()
    check_bombs(folder, tally)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = fuzz(options.cases, options.seed, Path(folder))
    print(f"{tally.cases:,} files in {time.monotonic() - began:.0f} s, the slowest {tally.slowest:.1f} s of CPU time")
    print(f"{tally.rows:,} rows = {tally.kept:,} kept + {sum(tally.dropped.values()):,} dropped + those of errors")
    for name, counts in (("dropped", tally.dropped), ("error", tally.errors)):
        for reason, count in counts.most_common():
            print(f"  {name}: {reason[:100]}: {count:,}")


if __name__ == "__main__":
    main()
