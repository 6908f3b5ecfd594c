"""Rows come back from every kind of file, each with its place; bad ones with a reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_scale.data import readers, rows
from dpo_scale.data.rows import BadRow, RawRow
from dpo_scale.data.sources import read_blocks, source_files
from dpo_scale.errors import DataError
from dpo_scale.recipe import DataSource

ROWS = [{"prompt": f"question {n}?\n", "chosen": "yés", "rejected": "no"} for n in range(5)]
CHAT = [{"role": "user", "content": "hi"}]
SEED_OF_ROWS_1_2_4 = 22


def json_lines(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(path: Path | str, rows: int | None = None, seed: int = 0) -> list:
    return [row for block in read_blocks(DataSource(path=str(path), rows=rows), seed) for row in block.rows()]


def copies(path: Path | str, seed: int = 0, **amount: float) -> dict[str, int]:
    """How often each row that is taken is taken, by its place."""
    taken: dict[str, int] = {}
    for block in read_blocks(DataSource(path=str(path), **amount), seed):
        assert block.copies is not None
        taken |= zip((row.place for row in block.rows()), block.copies.tolist(), strict=True)
    return taken


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow_stream(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_arrow_file(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_zst(path: Path) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as stream:
        stream.write(json_lines(ROWS))


WRITERS = {
    "rows.jsonl": lambda path: path.write_bytes(json_lines(ROWS)),
    "lines.json": lambda path: path.write_bytes(json_lines(ROWS)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(json_lines(ROWS))),
    "rows.jsonl.zst": write_zst,
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.csv": write_csv,
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2),
    "stream.arrow": write_arrow_stream,
    "file.arrow": write_arrow_file,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_source_gives_its_rows_in_order(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    rows = read(path)
    assert [row.fields for row in rows] == ROWS
    if name != "rows.csv":  # whose quoted cells span lines
        assert [row.place for row in rows] == [f"{path}:{n}" for n in range(1, 6)]


def test_a_csv_place_is_the_line_on_which_the_row_ends(tmp_path):
    write_csv(tmp_path / "rows.csv")
    assert read(tmp_path / "rows.csv")[1].place == f"{tmp_path}/rows.csv:5"


def test_chats_travel_through_csv_as_json(tmp_path):
    with (tmp_path / "rows.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["chosen", "rejected"], [json.dumps(CHAT), "[ok]"]])
    (row,) = read(tmp_path / "rows.csv")
    assert row.fields == {"chosen": CHAT, "rejected": "[ok]"}


def test_folders_and_globs_give_their_data_files_sorted(tmp_path):
    for name, row in (("b.jsonl", ROWS[1]), ("a.jsonl", ROWS[0]), (".hidden.jsonl", ROWS[2])):
        (tmp_path / name).write_bytes(json_lines([row]))
    (tmp_path / "README.md").write_text("no data")
    assert [row.fields for row in read(tmp_path)] == ROWS[:2]
    assert [row.fields for row in read(tmp_path / "[ab].jsonl")] == ROWS[:2]
    assert [file.name for file in source_files(str(tmp_path))] == ["a.jsonl", "b.jsonl"]


def test_a_saved_dataset_of_several_splits_needs_one_named(tmp_path):
    folder = tmp_path / "both"
    splits = {"train": ROWS[:3], "test": ROWS[3:]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder)
    assert [row.fields for row in read(f"{folder}:test")] == ROWS[3:]
    with pytest.raises(DataError, match=r"name a split .* there are train, test"):
        read(folder)


def test_a_sample_is_drawn_with_the_seed_and_keeps_the_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([{"n": n} for n in range(100)]))
    drawn = [row.fields["n"] for row in read(path, rows=10, seed=3)]
    assert len(drawn) == 10
    assert drawn == sorted(drawn) == [row.fields["n"] for row in read(path, rows=10, seed=3)]
    assert drawn != [row.fields["n"] for row in read(path, rows=10, seed=4)]
    assert len(read(path, rows=500)) == 100


@pytest.mark.parametrize("name", WRITERS)
def test_a_sample_is_the_same_rows_in_every_kind_of_source(tmp_path, name, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_ROWS", 2)
    WRITERS[name](tmp_path / name)
    expected = [row for row, is_taken in zip(ROWS, (0, 1, 1, 0, 1), strict=True) if is_taken]
    assert [row.fields for row in read(tmp_path / name, rows=3, seed=SEED_OF_ROWS_1_2_4)] == expected


def test_every_sample_is_as_likely_as_any_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines(ROWS))
    drawn = Counter(tuple(row.place[-1] for row in read(path, rows=2, seed=seed)) for seed in range(2000))
    assert len(drawn) == 10  # all twos out of five
    assert all(abs(count - 200) < 60 for count in drawn.values())  # 4.5 standard deviations


def test_rows_that_are_not_drawn_are_not_parsed(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([{"n": n} for n in range(1000)]))
    parsed = []
    original = rows._json
    monkeypatch.setattr(rows, "_json", lambda text: parsed.append(text) or original(text))
    assert len(read(path, rows=10)) == len(parsed) == 10


def test_a_weight_says_how_often_each_row_is_taken(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([{"n": n} for n in range(4000)]))
    assert set(copies(path, weight=2.0).values()) == {2}
    assert set(copies(path, weight=1.0).values()) == {1}
    half = copies(path, weight=0.5)
    assert set(half.values()) == {1}
    assert abs(len(half) - 2000) < 150  # 4.7 standard deviations
    assert half == copies(path, weight=0.5) != copies(path, weight=0.5, seed=1)
    more = copies(path, weight=2.25)
    assert set(more.values()) == {2, 3}
    assert abs(sum(more.values()) - 9000) < 130


def test_a_weighted_draw_does_not_depend_on_the_blocks(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([{"n": n} for n in range(500)]))
    expected = copies(path, weight=1.5)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 7)
    assert copies(path, weight=1.5) == expected


def test_damage_is_never_left_out_of_a_sample(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json_lines([{"n": f"{n * 7919 % 1000}"} for n in range(2000)]))[:-2000])
    for amount in ({"rows": 1}, {"weight": 0.001}):
        *_, last = read_blocks(DataSource(path=str(path), **amount), 0)
        *_, bad = last.rows()
        assert "damaged from here on" in bad.reason


def test_an_amount_is_stated_once():
    with pytest.raises(ValidationError, match="rows and weight both say how much"):
        DataSource(path="a.jsonl", rows=1, weight=1.0)
    with pytest.raises(ValidationError, match="weight"):
        DataSource(path="a.jsonl", weight=0.0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"chosen": "a"', "not valid JSON"),
        (b'{"chosen": "\xff"}', "not UTF-8"),
        (b"[1, 2]", "this is a list"),
        (b"null", "this is null"),
        (b"\x00\x00", "not valid JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not readable as JSON"),
    ],
)
def test_an_unreadable_line_has_its_number_and_reason_and_the_rest_is_read(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"n": 1}\n\n' + line + b'\n{"n": 4}')
    first, bad, last = read(path)
    assert first == RawRow(f"{path}:1", {"n": 1})
    assert isinstance(bad, BadRow)
    assert bad.place == f"{path}:3"
    assert reason in bad.reason
    assert last == RawRow(f"{path}:4", {"n": 4})


def test_a_line_without_end_is_refused_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"0" * (8 << 20) + b'\n{"n": 2}\n'))
    bad, good = read(path)
    assert (bad.place, good.place) == (f"{path}:1", f"{path}:2")
    assert "longer than 1 MiB" in bad.reason


def test_a_cut_off_archive_gives_its_rows_and_then_the_place_of_the_damage(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    text = json_lines([{"n": n, "text": f"{n * 7919 % 1000}"} for n in range(2000)])
    path.write_bytes(gzip.compress(text)[:-2000])
    *good, bad = read(path)
    assert good
    assert isinstance(bad, BadRow)
    assert "damaged from here on" in bad.reason
    assert bad.place == f"{path}:{len(good) + 1}"


def test_a_csv_row_of_another_width_is_a_bad_row(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n1\n1,2,3\n3,4\n")
    rows = read(tmp_path / "rows.csv")
    assert [isinstance(row, BadRow) for row in rows] == [False, True, True, False]
    assert rows[1].place.endswith("rows.csv:3")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "no such file"),
        ("/absent/folder", None, "no such file"),
        ("*.jsonl", None, "no file matches"),
        ("rows.txt", b"x", "unknown kind of file"),
        ("rows.parquet", b"x", "not a readable Parquet file"),
        ("rows.arrow", b"x" * 64, "not a readable Arrow file"),
        ("rows.jsonl.gz", b"plain text", None),
    ],
)
def test_a_source_that_cannot_be_read_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if message is None:
        (row,) = read(path)
        assert "damaged" in row.reason
        return
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_hub_dataset_that_cannot_be_had_is_named(monkeypatch):
    def load_dataset(*names: str) -> None:
        raise FileNotFoundError("Couldn't reach it\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"someone/pairs:train: .*\(Couldn't reach it\)"):
        read("someone/pairs:train")


def test_a_hub_dataset_is_read_by_name_config_and_split(monkeypatch):
    asked = []

    def load_dataset(*names: str) -> datasets.DatasetDict:
        asked.append(names)
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row.fields for row in read("someone/pairs:small:train")] == ROWS
    assert read("someone/pairs")[4].place == "someone/pairs:5"
    assert asked == [("someone/pairs", "small"), ("someone/pairs",)]


# --- bounded memory ------------------------------------------------------------------------------


def test_a_block_ends_before_it_grows_large(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines([{"text": "x" * 300}] * 20))
    sizes = [len(block) for block in read_blocks(DataSource(path=str(path)), 0)]
    assert sizes == [4] * 5


@pytest.mark.parametrize("name", ["rows.parquet", "file.arrow", "saved"])
def test_a_block_of_a_table_carries_its_own_rows_only(tmp_path, name, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_ROWS", 10)
    table = pyarrow.Table.from_pylist([{"text": f"{n}" * 500} for n in range(2000)])
    path = tmp_path / name
    if name == "rows.parquet":
        pyarrow.parquet.write_table(table, path)
    elif name == "saved":
        datasets.Dataset(table).save_to_disk(path)
    else:
        with pyarrow.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)  # one batch of all rows
    sent = [len(pickle.dumps(block)) for block in read_blocks(DataSource(path=str(path)), 0)]
    assert len(sent) >= 200
    assert max(sent) < 10 * 4 * 500 + 4000
    assert [row.fields for row in read(path)] == table.to_pylist()


def test_a_list_larger_than_the_window_is_read_value_by_value(tmp_path):
    path = tmp_path / "rows.json.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b"[" + b",\n".join(b'{"text": "%s"}' % (b"x" * 10_000) for _ in range(4000)) + b"]")
    tracemalloc.start()
    count = sum(len(block) for block in read_blocks(DataSource(path=str(path)), 0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000
    assert peak < 20 * 2**20 < 4000 * 10_000  # blocks of 4 MiB and a window of 1 MiB, not 40 MB


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=6), st.integers(1, 9), st.sampled_from([None, 0, 2]), st.booleans())
def test_a_list_is_read_as_json_reads_it_wherever_the_window_ends(values, piece, indent, ascii_only):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    if b"\xed" in text:
        return  # a lone surrogate, which UTF-8 cannot hold
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(readers, "JSON_PIECE", piece)
        items = list(readers._list_items(io.BytesIO(text)))
    assert [value for _, value, _ in items] == values
    assert [number for number, _, _ in items] == list(range(1, len(values) + 1))


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (b"", "not valid JSON"),
        (b",", "not valid JSON"),
        (b', {"n":', "not valid JSON"),
        (b' {"n": 3}]', "not valid JSON from here on (expected ']')"),
        (b"] []", "text behind the end"),
        (b", " + b"[" * 100_000, "nested too deeply"),
        (b", " + b"9" * 5000 + b"]", "not readable from here on"),
        (b', "' + b"x" * 5000, "longer than"),
    ],
)
def test_a_broken_list_gives_its_rows_and_then_the_number_and_reason(tmp_path, end, reason, monkeypatch):
    monkeypatch.setattr(readers, "JSON_PIECE", 16)
    if b"xxx" in end:
        monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2000)
    path = tmp_path / "rows.json"
    path.write_bytes(b'\xef\xbb\xbf [{"n": 1}, {"n": 2}' + end)
    *good, bad = read(path)
    assert [row.fields for row in good] == [{"n": 1}, {"n": 2}]
    assert isinstance(bad, BadRow)
    assert bad.place == f"{path}:3"
    assert reason in bad.reason


def test_text_of_a_list_that_is_no_utf8_is_left_to_who_reads_the_row(tmp_path):
    (tmp_path / "rows.json").write_bytes(b'[{"n": 1}, {"n": "\xff"}, {"n": 3}]')
    first, bad, last = read(tmp_path / "rows.json")
    assert (first.fields, bad.fields, last.fields) == ({"n": 1}, {"n": "\udcff"}, {"n": 3})


@pytest.mark.parametrize("text", [b'a,b\n"' + b"x,\n" * 3000, b"a,b\n" + b"x," * 3000, b"a,b\n" + b"x" * 5000])
def test_a_csv_row_without_end_is_refused_without_being_held(tmp_path, text, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2000)
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(text))
    (bad,) = read(tmp_path / "rows.csv.gz")
    assert isinstance(bad, BadRow)
    assert "longer than" in bad.reason or "field larger" in bad.reason


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("chosen,chosen\na,b\n")
    with pytest.raises(DataError, match="header names chosen twice"):
        read(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("name", "separator", "named"),
    [("rows.csv", ";", "';'"), ("rows.csv", "\t", r"'\\t'"), ("rows.tsv", ",", "','"), ("rows.tsv.gz", "|", r"'\|'")],
)
def test_a_csv_of_another_separator_is_said_to_be_one(tmp_path, name, separator, named):
    text = "".join(separator.join(line) + "\n" for line in (("prompt", "chosen", "rejected"), ("q", "a, b", "c")))
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    with pytest.raises(DataError, match=rf"{name}: the file seems to be separated by {named}, and commas \(tabs in"):
        read(tmp_path / name)


def test_a_header_may_hold_the_separators_of_others(tmp_path):
    (tmp_path / "rows.csv").write_text("chosen;a,rejected|b\nx,y\n")
    assert [row.fields for row in read(tmp_path / "rows.csv")] == [{"chosen;a": "x", "rejected|b": "y"}]


def test_a_damaged_table_gives_its_rows_and_then_the_place_of_the_damage(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist([{"text": f"{n * 7919 % 9973}" * 9} for n in range(20_000)])
    pyarrow.parquet.write_table(table, path, row_group_size=5000, use_dictionary=False, compression="zstd")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    *good, bad = read(path)
    assert good
    assert isinstance(bad, BadRow)
    assert bad.place == f"{path}:{len(good) + 1}"
    assert "damaged from here on" in bad.reason


def test_a_text_of_a_table_that_is_no_utf8_is_a_bad_row_by_itself(tmp_path):
    texts = pyarrow.array([b"good", b"\xff", b"good too"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    with pyarrow.ipc.new_file(str(tmp_path / "rows.arrow"), pyarrow.schema({"chosen": pyarrow.string()})) as writer:
        writer.write_batch(pyarrow.record_batch([texts], ["chosen"]))
    first, bad, last = read(tmp_path / "rows.arrow")
    assert (first.fields, last.fields) == ({"chosen": "good"}, {"chosen": "good too"})
    assert isinstance(bad, BadRow)
    assert bad.place.endswith("rows.arrow:2")
    assert "not UTF-8" in bad.reason


def write_damaged(path, batch, kind, before, after):
    """An Arrow file in which some bytes, which are in it once, were replaced."""
    with getattr(pyarrow.ipc, f"new_{kind}")(str(path), batch.schema) as writer:
        writer.write_batch(batch)
    data = path.read_bytes()
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))


TEXTS = [f"text{n}" for n in range(9)]
AS_A_COLUMN = {
    "text": pyarrow.array(TEXTS),
    "large text": pyarrow.array(TEXTS, pyarrow.large_string()),
    "chat": pyarrow.array([[{"content": text}] for text in TEXTS]),
    "struct": pyarrow.array([{"inner": text} for text in TEXTS]),
    "large list": pyarrow.array([[text] for text in TEXTS], pyarrow.large_list(pyarrow.string())),
}


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("column", AS_A_COLUMN)
def test_a_text_of_a_table_that_lies_outside_of_the_file_is_a_bad_row_by_itself(tmp_path, column, kind):
    """Arrow itself follows a damaged offset to wherever it leads, which may end the process."""
    batch = pyarrow.record_batch({"chosen": AS_A_COLUMN[column]})
    size = "q" if column == "large text" else "i"
    before, after = struct.pack(f"<3{size}", 10, 15, 20), struct.pack(f"<3{size}", 10, 1 << 30, 20)
    write_damaged(tmp_path / "rows.arrow", batch, kind, before, after)
    rows = read(tmp_path / "rows.arrow")
    assert [row.place.rpartition(":")[2] for row in rows] == [str(n) for n in range(1, 10)]
    bad = [n for n, row in enumerate(rows) if isinstance(row, BadRow)]
    assert bad == [2, 3]  # the text that ends there, and the one that starts there
    assert all(row.reason.startswith("damaged (") for row in (rows[2], rows[3]))
    whole = batch.to_pylist()
    assert [row.fields for n, row in enumerate(rows) if n not in bad] == [
        row for n, row in enumerate(whole) if n not in bad
    ]


def test_a_list_of_a_table_that_lies_outside_of_the_file_is_a_bad_row_by_itself(tmp_path):
    batch = pyarrow.record_batch({"chosen": [[n] * 5 for n in range(9)]})
    write_damaged(
        tmp_path / "rows.arrow", batch, "file", struct.pack("<3i", 10, 15, 20), struct.pack("<3i", 10, 1 << 30, 20)
    )
    assert [n for n, row in enumerate(read(tmp_path / "rows.arrow")) if isinstance(row, BadRow)] == [2, 3]


@pytest.mark.parametrize("column", AS_A_COLUMN)
def test_a_text_inside_of_a_table_that_is_no_utf8_is_a_bad_row_by_itself(tmp_path, column):
    batch = pyarrow.record_batch({"chosen": AS_A_COLUMN[column]})
    write_damaged(tmp_path / "rows.arrow", batch, "file", b"text4", b"tex\xff4")
    rows = read(tmp_path / "rows.arrow")
    assert [n for n, row in enumerate(rows) if isinstance(row, BadRow)] == [4]
    assert "not UTF-8" in rows[4].reason


def test_rows_of_several_schemas_are_read_as_they_are(tmp_path):
    for name, row in (("a.jsonl", ROWS[0]), ("b.jsonl", {"chosen": CHAT, "rejected": CHAT})):
        (tmp_path / name).write_bytes(json_lines([row]))
    (tmp_path / "c.csv").write_text("question,winner,loser\nq,a,b\n")
    assert [set(row.fields) for row in read(tmp_path)] == [
        {"prompt", "chosen", "rejected"},
        {"chosen", "rejected"},
        {"question", "winner", "loser"},
    ]


# --- the hub, without it -------------------------------------------------------------------------

READ_OFFLINE = """
import sys
from dpo_scale.data.sources import open_dataset, read_blocks
from dpo_scale.recipe import DataSource

for path in ("someone/pairs:test", "someone/pairs:default:train"):
    print(*[row.fields["prompt"] for block in read_blocks(DataSource(path=path), 0) for row in block.rows()])
print(open_dataset("someone/pairs:test")._fingerprint == open_dataset("someone/pairs:test")._fingerprint)
"""


def test_a_hub_dataset_is_read_from_its_cache_without_a_network(tmp_path):
    files = {}
    for split, prompts in (("train", "ab"), ("test", "cd")):
        files[split] = str(tmp_path / f"{split}.jsonl")
        Path(files[split]).write_bytes(json_lines([{**ROWS[0], "prompt": prompt} for prompt in prompts]))
    datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "made"))
    (made,) = (tmp_path / "made").glob("json/*/*/*/")
    # As the hub client keeps it: owner___name/config/version/commit.
    cached = tmp_path / "cache" / "someone___pairs" / "default" / "0.0.0" / ("0123456789" * 4)
    shutil.copytree(made, cached)
    for file in cached.glob("json-*.arrow"):
        file.rename(cached / file.name.replace("json-", "pairs-"))
    info = json.loads((cached / "dataset_info.json").read_text())
    info |= {"dataset_name": "pairs", "builder_name": "parquet"}
    (cached / "dataset_info.json").write_text(json.dumps(info))
    offline = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", READ_OFFLINE]
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["c", "d", "a", "b", "True"]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8")))
def test_any_bytes_give_rows_or_reasons_with_rising_line_numbers(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(content)
    numbers = [int(row.place.rpartition(":")[2]) for row in read(path)]
    expected_rows = sum(bool(line.strip()) for line in content.split(b"\n"))
    assert numbers == sorted(set(numbers))
    # A byte order mark alone is an empty first line.
    assert len(numbers) in (expected_rows, expected_rows - content.startswith(b"\xef\xbb\xbf"))


def test_a_dataset_in_the_working_folder_is_read_where_it_is_named(tmp_path, monkeypatch):
    """Every path without a colon has nothing in front of it: that is no folder, and not this one."""
    datasets.Dataset.from_list([ROWS[0]]).save_to_disk(tmp_path / "saved")
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines(ROWS[1:3]))
    monkeypatch.chdir(tmp_path / "saved")
    assert [row.fields for row in read(path)] == ROWS[1:3]
    assert [row.fields for row in read(".")] == ROWS[:1]


@pytest.mark.parametrize("name", ["rows.JSONL", "ROWS.JSONL.GZ", "rows.Csv", "ROWS.TSV", "rows.TSV.gz"])
def test_upper_case_is_no_other_kind_of_file(name, tmp_path):
    mark = "\t" if "TSV" in name else ","
    lines = [mark.join(ROWS[0]), mark.join(value.strip() for value in ROWS[0].values())]
    content = json_lines(ROWS[:1]) if "JSON" in name else "\n".join(lines).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.lower().endswith("gz") else content)
    assert [row.fields["chosen"] for row in read(path)] == ["yés"]


def test_what_a_table_fills_up_is_no_argument_of_a_tool(tmp_path):
    """A struct has every field that any row has."""
    calls = [{"tool_calls": [{"name": "weather", "arguments": {name: "x"}}], "list": [1, None]} for name in "ab"]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(calls), path)
    assert [row.fields for row in read(path)] == calls


def test_a_chat_in_csv_is_read_however_its_json_is_spaced(tmp_path):
    path = tmp_path / "rows.csv"
    cells = [
        json.dumps(CHAT),
        json.dumps(CHAT, indent=1),
        "[ " + json.dumps(CHAT)[1:],
        str(CHAT),
        "[{'a': 1}]",
        '[{"a"',
    ]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["chosen"], *([cell] for cell in cells)])
    *chats, printed, text, cut = read(path)
    assert [row.fields["chosen"] for row in chats] == [CHAT] * 3
    assert printed.reason == "'chosen' holds a list as Python prints it; write it as JSON (json.dumps)"
    assert [text.fields["chosen"], cut.fields["chosen"]] == cells[-2:]
