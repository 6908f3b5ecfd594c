"""Rows come back from every kind of file, each with its place; bad ones with a reason."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_scale.data import readers
from dpo_scale.data.rows import BadRow, RawRow
from dpo_scale.data.sources import read_rows, source_files
from dpo_scale.errors import DataError
from dpo_scale.recipe import DataSource

ROWS = [{"prompt": f"question {n}?\n", "chosen": "yés", "rejected": "no"} for n in range(5)]
CHAT = [{"role": "user", "content": "hi"}]


def json_lines(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def read(path: Path | str, rows: int | None = None, seed: int = 0) -> list:
    return list(read_rows(DataSource(path=str(path), rows=rows), seed))


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
