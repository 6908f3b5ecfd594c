"""The store of log-probs keeps every committed row through kills, damage and other writers."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import math
import multiprocessing
import os
import random
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors.numpy import load_file, save_file

from dpo_scale import files
from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.errors import UserError
from dpo_scale.reference import cache, commands, parts, rescoring
from dpo_scale.reference.cache import (
    MissingRowsError,
    NonFiniteLogProbsError,
    ReferenceStore,
    near_misses,
    part_paths,
)
from dpo_scale.reference.fingerprint import ReferenceFingerprint, read_fingerprint
from dpo_scale.reference.key_index import KeyIndex
from dpo_scale.reference.parts import set_aside
from dpo_scale.reference.row_keys import pair_row_keys, row_keys

Keys = npt.NDArray[np.uint8]
LogProbs = npt.NDArray[np.float32]

FINGERPRINT = ReferenceFingerprint(
    scoring_version=1,
    dtype="bfloat16",
    weights={"model-00001-of-00002.safetensors": "a" * 64, "model-00002-of-00002.safetensors": "b"},
    config={"model_type": "llama", "hidden_size": 64},
    source="org/model",
)


def _keys(numbers: Sequence[int]) -> Keys:
    """Distinct keys as good as real ones."""
    digests = b"".join(hashlib.blake2b(struct.pack("<q", n), digest_size=16).digest() for n in numbers)
    return np.frombuffer(digests, np.uint8).reshape(-1, 16)


def _rows(numbers: Sequence[int]) -> list[LogProbs]:
    """The log-probs that belong to those keys: a function of the number, lengths 0 to 6."""
    return [-np.arange(1, 1 + n % 7, dtype=np.float32) / (n + 2) for n in numbers]


def _append(store: ReferenceStore, numbers: Sequence[int]) -> list[Path]:
    return store.append(_keys(numbers), _rows(numbers))


def _assert_holds(store: ReferenceStore, numbers: Sequence[int]) -> None:
    for actual, expected in zip(store.lookup(_keys(numbers)), _rows(numbers), strict=True):
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, expected)


def _flip_a_byte(path: Path, position: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def _close(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody read a file, not even root."""
    os_open, io_open = os.open, io.open

    def refusing(opened: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, *arguments: Any, **named: Any) -> Any:
            if str(file) == str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return opened(file, *arguments, **named)

        return call

    monkeypatch.setattr(os, "open", refusing(os_open))
    monkeypatch.setattr(io, "open", refusing(io_open))
    monkeypatch.setattr(builtins, "open", refusing(io_open))


# Keys of rows


def test_a_row_key_is_the_hash_of_prompt_length_and_token_ids() -> None:
    sequences = [[5, 6, 7, 70000], [5, 6, 7, 70000], [8, 9]]
    actual = row_keys([np.array(s, np.int32) for s in sequences], [1, 2, 1])
    for sequence, num_prompt, key in zip(sequences, [1, 2, 1], actual, strict=True):
        content = struct.pack("<q", num_prompt) + b"".join(struct.pack("<i", t) for t in sequence)
        assert key.tobytes() == hashlib.blake2b(content, digest_size=16).digest()
    assert len({key.tobytes() for key in actual}) == 3  # the boundary counts as well


def test_keys_of_pairs_are_the_keys_of_their_two_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_scale.reference.row_keys._PAIRS_IN_A_BLOCK", 16)
    rng = np.random.default_rng(0)
    draw = lambda: rng.integers(0, 100, rng.integers(1, 9)).astype(np.int32)  # noqa: E731
    pairs = TokenPairs.from_pairs(TokenPair(draw(), draw(), draw(), f"f:{i}") for i in range(50))
    actual = pair_row_keys(pairs)
    prompts = [len(pair.prompt) for pair in pairs]
    expected_chosen = row_keys([np.concatenate([p.prompt, p.chosen]) for p in pairs], prompts)
    expected_rejected = row_keys([np.concatenate([p.prompt, p.rejected]) for p in pairs], prompts)
    np.testing.assert_array_equal(actual[:, 0], expected_chosen)
    np.testing.assert_array_equal(actual[:, 1], expected_rejected)


def test_no_sequences_have_no_keys() -> None:
    assert row_keys([], []).shape == (0, 16)
    assert pair_row_keys(TokenPairs.from_pairs([])).shape == (0, 2, 16)


# The index


@pytest.mark.parametrize("half", [0, 8], ids=["equal first halves", "equal second halves"])
def test_the_index_tells_keys_with_one_equal_half_apart(half: int) -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (300, 16)).astype(np.uint8)
    keys[:, half : half + 8] = 7
    index = KeyIndex()
    for start in range(0, 200, 50):
        index.add([keys[start : start + 50]], start // 50)
    parts, rows = index.find(keys[:200])
    np.testing.assert_array_equal(parts, np.arange(200) // 50)
    np.testing.assert_array_equal(rows, np.arange(200) % 50)
    assert (index.find(keys[200:])[0] == -1).all()
    assert len(index) == 200


def test_the_index_equals_a_dict_under_random_additions() -> None:
    rng = np.random.default_rng(1)
    universe = _keys(range(400))
    index, expected = KeyIndex(), {}
    for number in range(60):
        drawn = rng.integers(0, 400, rng.integers(0, 40))
        for row, key in enumerate(drawn):
            expected.setdefault(int(key), (number, row))
        index.add([universe[drawn]], number)
        parts, rows = index.find(universe)
        actual = {i: (int(parts[i]), int(rows[i])) for i in range(400) if parts[i] >= 0}
        assert actual == expected
        assert len(index) == len(expected)
    assert len(index._tables) <= 10


def test_keys_are_found_in_the_part_that_theirs_were_merged_into() -> None:
    keys, index = _keys(range(9)), KeyIndex()
    index.add([keys[:3], keys[3:6], keys[6:]], 0)
    index.move({2: 0, 0: 3}, 7)
    parts, rows = index.find(keys)
    assert parts.tolist() == [7, 7, 7, 1, 1, 1, 7, 7, 7]
    assert rows.tolist() == [3, 4, 5, 0, 1, 2, 0, 1, 2]


def test_a_million_rows_are_indexed_in_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    num_rows, part_rows = 1_000_000, 50_000
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    keys = rng.integers(0, 256, (num_rows, 16)).astype(np.uint8)
    row = np.full(3, -1.0, np.float32)
    for start in range(0, num_rows, part_rows):
        store.append(keys[start : start + part_rows], [row] * part_rows)
    started = time.perf_counter()
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    opened = time.perf_counter()
    assert store.contains(keys).all()
    print(
        f"\n1,000,000 rows in {len(part_paths(store.folder))} parts: opened in {opened - started:.2f} s, "
        f"all checked and found in {time.perf_counter() - opened:.2f} s"
    )
    assert len(store) == num_rows


# Reading what was written


def test_what_was_appended_is_found_by_another_process_bit_for_bit(tmp_path: Path) -> None:
    numbers = list(range(50))
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    assert len(_append(store, numbers)) == 1
    for opened in (store, ReferenceStore.open(tmp_path, FINGERPRINT)):
        assert len(opened) == 50
        _assert_holds(opened, numbers)
        _assert_holds(opened, [7, 49, 7, 0])  # any order, and more than once
        np.testing.assert_array_equal(opened.contains(_keys([3, 50, 4])), [True, False, True])


def test_a_part_is_a_plain_safetensors_file_named_by_its_sha256(tmp_path: Path) -> None:
    (path,) = _append(ReferenceStore.open(tmp_path, FINGERPRINT), range(4))
    assert path.name == f"part-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.safetensors"
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["keys"], _keys(range(4)))
    np.testing.assert_array_equal(tensors["offsets"], [0, 0, 1, 3, 6])
    np.testing.assert_array_equal(tensors["values"], np.concatenate(_rows(range(4))))


def test_sums_are_float64_sums_of_the_rows_in_the_order_asked_for(tmp_path: Path) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    for start in range(0, 40, 10):
        _append(store, range(start, start + 10))
    numbers = [34, 0, 14, 7, 24, 14, 6]  # 0, 14 and 7 are empty rows; the sums of 34 and 24 are rounded in fp32
    sums, counts = store.sums_and_counts(_keys(numbers))
    expected_sums = [math.fsum(row.tolist()) for row in _rows(numbers)]
    np.testing.assert_allclose(sums, expected_sums, rtol=1e-15)
    np.testing.assert_array_equal(counts, [len(row) for row in _rows(numbers)])
    assert (sums.dtype, counts.dtype) == (np.float64, np.int64)


def test_missing_rows_are_an_error_that_says_how_many(tmp_path: Path) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    _append(store, range(3))
    with pytest.raises(MissingRowsError, match="2 of 4 rows have no reference log-probs"):
        store.lookup(_keys([0, 8, 1, 9]))
    with pytest.raises(MissingRowsError, match="1 of 1"):
        store.sums_and_counts(_keys([8]))


def test_nothing_is_looked_up_in_an_empty_store(tmp_path: Path) -> None:
    store = ReferenceStore.open(tmp_path / "not" / "there", FINGERPRINT)
    assert len(store) == 0
    assert not store.contains(_keys([1])).any()
    assert store.lookup(_keys([])) == []
    assert store.append(_keys([]), []) == []
    assert not (tmp_path / "not").exists()  # looking writes nothing


def test_log_probs_stay_on_the_disk(tmp_path: Path) -> None:
    rows = [np.full(100_000, -1.0, np.float32)] * 100  # 40 MB
    ReferenceStore.open(tmp_path, FINGERPRINT).append(_keys(range(100)), rows)
    tracemalloc.start()
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    (row,) = store.lookup(_keys([50]))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(row) == 100_000
    assert peak_bytes < 8e6  # the buffer of the checksum and one row


# Writing


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_log_probs_that_are_not_finite_are_refused_and_named(tmp_path: Path, bad: float) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    rows = _rows(range(6))
    rows[4] = np.array([-1.0, bad], np.float32)
    with pytest.raises(NonFiniteLogProbsError, match=r"1 sequences .* \(position 4\)") as caught:
        store.append(_keys(range(6)), rows)
    assert caught.value.rows == ["position 4"]
    assert len(ReferenceStore.open(tmp_path, FINGERPRINT)) == 0


def test_a_row_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    (path,) = _append(store, [1, 2, 2, 1])
    assert len(load_file(path)["keys"]) == 2
    assert _append(store, [1, 2]) == []
    (path,) = _append(store, [1, 3, 2])
    assert len(load_file(path)["keys"]) == 1
    assert len(store) == 3


def test_parts_are_bounded_and_rows_are_never_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 1000)
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    rows = [np.full(n, -1.0, np.float32) for n in (500, 10, 100, 100, 100, 10, 240)]
    paths = store.append(_keys(range(7)), rows)
    tokens = [len(load_file(path)["values"]) for path in paths]
    assert tokens == [500, 210, 110, 240]
    for actual, expected in zip(store.lookup(_keys(range(7))), rows, strict=True):
        assert len(actual) == len(expected)


def test_a_folder_that_cannot_be_written_is_found_out_before_the_pass(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = ReferenceStore.open(tmp_path / "file", FINGERPRINT)
    with pytest.raises(UserError, match=r"set reference\.cache_dir to a writable folder"):
        store.ensure_writable()


def test_two_references_do_not_see_each_other(tmp_path: Path) -> None:
    other = replace(FINGERPRINT, dtype="float32")
    (path,) = _append(ReferenceStore.open(tmp_path, FINGERPRINT), range(5))
    _append(ReferenceStore.open(tmp_path, other), range(5, 7))
    store = ReferenceStore.open(tmp_path, other)
    assert len(store) == 2
    (store.folder / path.name).write_bytes(path.read_bytes())  # somebody copies a part over
    assert store.refresh() == 0
    assert not store.contains(_keys(range(5))).any()
    assert "another reference" in store.damaged[0]


def test_refresh_picks_up_what_others_wrote(tmp_path: Path) -> None:
    first, second = (ReferenceStore.open(tmp_path, FINGERPRINT) for _ in range(2))
    _append(first, range(10))
    _append(first, range(10, 15))
    assert not second.contains(_keys([3])).any()
    assert second.refresh() == 15
    assert second.refresh() == 0
    _assert_holds(second, range(15))


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(_truncate, id="truncated"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(b"\x00" * 400), id="zeros"),
        pytest.param(lambda path: path.write_bytes(b"\xff" * 400), id="ones"),
        pytest.param(_flip_a_byte, id="flipped byte of a key"),
        pytest.param(lambda path: _flip_a_byte(path, -90), id="flipped byte of a value"),
        pytest.param(lambda path: _flip_a_byte(path, 40), id="flipped byte of the header"),
    ],
)
def test_only_the_rows_of_a_damaged_part_are_scored_again(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    writer = ReferenceStore.open(tmp_path, FINGERPRINT)
    _append(writer, range(10))
    (path,) = _append(writer, range(10, 15))
    _append(writer, range(15, 20))
    damage(path)
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    found = store.contains(_keys(range(20)))
    np.testing.assert_array_equal(np.flatnonzero(~found), range(10, 15))
    assert [reason.partition(":")[0] for reason in store.damaged] == [path.name]
    assert path.name in caplog.text
    assert path.with_name(f"damaged-{path.name}").exists()
    assert not path.exists()

    _append(store, range(10, 15))
    assert ReferenceStore.open(tmp_path, FINGERPRINT).contains(_keys(range(20))).all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"more": np.zeros(1)}, "holds keys, more, offsets, values"),
        ({"offsets": np.zeros(4, np.int32)}, "layout"),
        ({"offsets": np.zeros(3, np.int64)}, "layout"),
    ],
)
def test_a_file_of_another_layout_is_no_part(
    changes: dict[str, npt.NDArray[np.generic]], reason: str, tmp_path: Path
) -> None:
    (path,) = _append(ReferenceStore.open(tmp_path, FINGERPRINT), range(3))
    save_file({**load_file(path), **changes}, path, metadata={"reference": FINGERPRINT.key})
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    assert len(store) == 0
    assert store.damaged[0].startswith(f"{path.name}: {reason}")


def test_a_part_that_is_cut_after_it_was_checked_is_set_aside_where_it_is_read(tmp_path: Path) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    (path,) = _append(store, range(5))
    _append(store, range(5, 8))
    assert store.contains(_keys(range(8))).all()
    _truncate(path)
    with pytest.raises(MissingRowsError, match="5 of 8"):
        store.lookup(_keys(range(8)))
    assert path.with_name(f"damaged-{path.name}").exists()
    _assert_holds(store, range(5, 8))


def test_the_parts_of_a_large_store_are_not_all_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MAX_OPEN_PARTS", 2)
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    for n in range(5):
        _append(store, [n])
    _assert_holds(store, [4, 0, 3, 1, 2])
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    assert sum(link.exists() and link.resolve().parent == store.folder for link in links) == 2


def test_a_damaged_part_that_cannot_be_renamed_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = _append(ReferenceStore.open(tmp_path, FINGERPRINT), range(5))
    _append(ReferenceStore.open(tmp_path, FINGERPRINT), range(5, 8))
    _flip_a_byte(path)

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refuse)
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    np.testing.assert_array_equal(store.contains(_keys(range(8))), [False] * 5 + [True] * 3)
    assert store.refresh() == 0
    assert len(store.damaged) == 1
    assert path.exists()


def test_a_damaged_part_that_another_process_renamed_first_is_no_error(tmp_path: Path) -> None:
    assert set_aside(tmp_path / "part-0.safetensors")


@pytest.mark.parametrize(
    ("broken", "action"),
    [
        ("Part", lambda store: None),
        ("check_digest", lambda store: store.contains(_keys([1]))),
        ("Part.log_probs", lambda store: store.lookup(_keys([1]))),
        ("read_whole", lambda store: store.merge(part_paths(store.folder))),
    ],
)
def test_a_disk_that_fails_is_an_error_and_no_missing_row(
    broken: str, action: Callable[[ReferenceStore], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ReferenceStore.open(tmp_path, FINGERPRINT)
    for numbers in (range(3), range(3, 6)):
        _append(writer, numbers)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(f"dpo_scale.reference.cache.{broken}", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        action(ReferenceStore.open(tmp_path, FINGERPRINT))
    assert len(part_paths(writer.folder)) == 2


def test_a_part_that_may_not_be_read_is_passed_over_and_its_rows_count_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = ReferenceStore.open(tmp_path, FINGERPRINT)
    (closed,) = _append(writer, range(5))
    _append(writer, range(5, 8))
    with monkeypatch.context() as patch:
        _close(closed, patch)
        store = ReferenceStore.open(tmp_path, FINGERPRINT)
        store.refresh()
        np.testing.assert_array_equal(store.contains(_keys(range(8))), [False] * 5 + [True] * 3)
        _assert_holds(store, range(5, 8))
        (warning,) = caplog.messages
        assert warning.startswith(f"{closed}: Permission denied; its rows are scored again")
        assert len(_append(store, range(3))) == 1
        _assert_holds(store, [0, 1, 2, 5, 6, 7])
    store.refresh()  # its owner has made it readable
    _assert_holds(store, range(8))


@pytest.mark.parametrize("broken", ["Part.log_probs", "Part", "check_digest"])
def test_rows_of_a_part_that_is_closed_after_it_was_listed_are_missing(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = _append(ReferenceStore.open(tmp_path, FINGERPRINT), range(5))
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    _close(path, monkeypatch)

    def fail(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(f"dpo_scale.reference.cache.{broken}", fail)
    with pytest.raises(MissingRowsError):
        store.lookup(_keys(range(5)))
    assert path.exists()


def test_a_copy_of_a_row_in_a_sound_part_replaces_the_damaged_one(tmp_path: Path) -> None:
    first, second = (ReferenceStore.open(tmp_path, FINGERPRINT) for _ in range(2))
    _append(first, range(10))
    _append(second, range(5, 15))  # knows nothing of the first: writes five rows again
    for path in part_paths(first.folder):
        content = path.read_bytes()
        _flip_a_byte(path)
        store = ReferenceStore.open(tmp_path, FINGERPRINT)
        assert store.contains(_keys(range(15))).sum() == 10
        _assert_holds(store, range(5, 10))
        path.with_name(f"damaged-{path.name}").unlink()
        path.write_bytes(content)


def test_one_process_sets_aside_what_another_has_open_and_both_agree(tmp_path: Path) -> None:
    writer = ReferenceStore.open(tmp_path, FINGERPRINT)
    (path,) = _append(writer, range(5))
    reader = ReferenceStore.open(tmp_path, FINGERPRINT)
    _flip_a_byte(path)
    assert not ReferenceStore.open(tmp_path, FINGERPRINT).contains(_keys(range(5))).any()
    assert not reader.contains(_keys(range(5))).any()
    assert not writer.contains(_keys(range(5))).any()


def test_a_part_is_read_whole_once_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ReferenceStore.open(tmp_path, FINGERPRINT)
    paths = [_append(writer, [n])[0] for n in range(4)]
    time.sleep(0.06)
    read: list[Path] = []

    def recording(path: Path, progress: object = None) -> str:
        read.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(files, "sha256_of_file", recording)
    assert writer.contains(_keys(range(4))).all()
    assert read == []  # it has just written them
    assert ReferenceStore.open(tmp_path, FINGERPRINT).contains(_keys([0, 1])).all()
    assert sorted(read) == sorted(paths[:2])  # only what is used
    assert ReferenceStore.open(tmp_path, FINGERPRINT).contains(_keys(range(4))).all()
    assert sorted(read) == sorted(paths)
    _flip_a_byte(paths[2])
    assert not ReferenceStore.open(tmp_path, FINGERPRINT).contains(_keys([2])).any()


def test_a_lost_description_does_not_lose_rows(tmp_path: Path) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    _append(store, range(3))
    (store.folder / "reference.json").write_text("{")
    again = ReferenceStore.open(tmp_path, FINGERPRINT)
    _assert_holds(again, range(3))
    _append(again, [3])
    assert read_fingerprint(store.folder) == FINGERPRINT


# Kills and other writers

_WRITER = """
import sys
from pathlib import Path
from tests.unit.test_reference_cache import FINGERPRINT, ReferenceStore, _append
store = ReferenceStore.open(Path(sys.argv[1]), FINGERPRINT)
print("ready", flush=True)
for start in range(0, 10**6, 50):
    _append(store, range(start, start + 50))
    print(start + 50, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_had_committed(tmp_path: Path) -> None:
    rng = random.Random(0)
    committed = 0
    for _ in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.0, 0.3))
        writer.send_signal(signal.SIGKILL)
        said = [int(line) for line in writer.communicate()[0].splitlines() if line.isdigit()]
        committed = max([committed, *said])
        store = ReferenceStore.open(tmp_path, FINGERPRINT)
        assert len(store) in (committed, committed + 50)  # at most one commit it did not speak of
        committed = len(store)
        _assert_holds(store, range(committed))
        assert store.damaged == []
    rows_in_parts = sum(len(load_file(path)["keys"]) for path in part_paths(store.folder))
    assert rows_in_parts == committed > 0  # nothing was written twice


def _write_overlapping(cache_dir: Path, start: int) -> None:
    store = ReferenceStore.open(cache_dir, FINGERPRINT)
    for offset in range(0, 200, 20):
        _append(store, range(start + offset, start + offset + 30))
        store.refresh()


def test_two_writers_of_overlapping_rows_leave_each_row_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_overlapping, args=(tmp_path, s)) for s in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    assert len(store) == 310
    _assert_holds(store, range(310))
    assert read_fingerprint(store.folder) == FINGERPRINT


class StoreIsADict(RuleBasedStateMachine):
    """Two writers, restarts, damage and rubbish: what is sound is there, and nothing else."""

    numbers = st.lists(st.integers(0, 30), max_size=8)
    writer = st.sampled_from([0, 1])

    @initialize(folder=st.builds(lambda: Path(_temporary_folders.pop())))
    def start(self, folder: Path) -> None:
        self.folder = folder
        self.committed: dict[Path, set[int]] = {}
        self.restart()

    @rule()
    def restart(self) -> None:
        self.stores = [ReferenceStore.open(self.folder, FINGERPRINT) for _ in range(2)]
        self.written: list[list[Path]] = [[], []]

    @rule(which=writer, numbers=numbers)
    def append(self, which: int, numbers: list[int]) -> None:
        for path in _append(self.stores[which], numbers):
            written = {tuple(key) for key in load_file(path)["keys"].tolist()}
            self.committed[path] = {n for n in numbers if tuple(_keys([n])[0].tolist()) in written}
            self.written[which].append(path)

    @rule(which=writer)
    def merge(self, which: int) -> None:
        before = [path for path in self.written[which] if path in self.committed]
        merged = self.stores[which].merge(self.written[which])
        numbers = set().union(*(self.committed.pop(path) for path in before))
        for path in merged:
            keys = {key.tobytes() for key in load_file(path)["keys"]}
            self.committed[path] = {n for n in numbers if _keys([n]).tobytes() in keys}
        assert set().union(*(self.committed[path] for path in merged)) == numbers
        self.written[which] = merged

    @rule(which=writer)
    def refresh(self, which: int) -> None:
        self.stores[which].refresh()
        missing = self._sound() - {n for n in range(31) if self.stores[which].contains(_keys([n]))}
        assert not missing

    @rule(draw=st.randoms(use_true_random=False), damage=st.sampled_from([_flip_a_byte, _truncate]))
    def damage_a_part_and_restart(self, draw: random.Random, damage: Callable[[Path], None]) -> None:
        if self.committed:
            path = draw.choice(sorted(self.committed))
            damage(path)
            del self.committed[path]
            self.restart()

    @rule()
    def leave_a_dead_writers_file(self) -> None:
        folder = self.stores[0].folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".part-{'0' * 32}.safetensors.0123456789ab.tmp").write_bytes(b"half a part")

    @rule()
    def prune_waste(self) -> None:
        pruned = commands.prune_waste(self.stores[0].folder)
        before = self._sound()
        self.committed = {p: n for p, n in self.committed.items() if p not in pruned.paths}
        assert self._sound() == before

    @invariant()
    def a_store_that_is_opened_now_equals_the_dict(self) -> None:
        store = ReferenceStore.open(self.folder, FINGERPRINT)
        sound = sorted(self._sound())
        found = np.flatnonzero(store.contains(_keys(range(31)))).tolist()
        assert found == sound
        _assert_holds(store, sound)

    def _sound(self) -> set[int]:
        return set().union(*self.committed.values())


_temporary_folders: list[str] = []


def test_a_store_equals_a_dict_whatever_happens(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("stores")
    _temporary_folders.extend(str(root / str(n)) for n in range(5000))
    StoreIsADict.TestCase.settings = settings(
        max_examples=30,
        stateful_step_count=12,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    StoreIsADict.TestCase().runTest()


# Merging


def _merge(store: ReferenceStore, *numbers: range) -> list[Path]:
    return store.merge([path for some in numbers for path in _append(store, some)])


def test_merged_parts_are_one_that_holds_their_rows(tmp_path: Path) -> None:
    store, reader = (ReferenceStore.open(tmp_path, FINGERPRINT) for _ in range(2))
    _append(store, range(5))
    (merged,) = _merge(store, range(5, 10), range(10, 11), range(11, 30))
    assert len(part_paths(store.folder)) == len(store._names) == 2
    assert merged.name == f"part-{hashlib.sha256(merged.read_bytes()).hexdigest()[:32]}.safetensors"
    reader.refresh()
    for opened in (store, reader, ReferenceStore.open(tmp_path, FINGERPRINT)):
        _assert_holds(opened, range(30))
        assert len(opened) == 30
    assert _append(store, range(30)) == []
    assert store.refresh() == 0
    assert commands.verify(store.folder) == []


def test_parts_are_merged_up_to_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    paths = [path for n in range(7) for path in _append(store, range(10 * n, 10 * n + 10))]
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 3 * max(path.stat().st_size for path in paths))
    merged = store.merge(paths)
    assert [len(load_file(path)["keys"]) for path in merged] == [30, 30, 10]
    assert merged[-1] == paths[-1]  # one part alone stays as it is
    assert sorted(merged) == part_paths(store.folder)
    _assert_holds(ReferenceStore.open(tmp_path, FINGERPRINT), range(70))


@pytest.mark.parametrize("deleted", [0, 1, 2])
def test_a_kill_between_the_merged_part_and_the_deletion_of_the_others_costs_nothing(
    tmp_path: Path, deleted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    paths = [path for n in range(3) for path in _append(store, range(10 * n, 10 * n + 10))]
    killed_at, unlink = [None] * deleted, Path.unlink

    def unlink_or_be_killed(path: Path, missing_ok: bool = False) -> None:
        if path in paths:
            if not killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            killed_at.pop()
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_or_be_killed)
    merger = multiprocessing.get_context("fork").Process(target=store.merge, args=(paths,))
    merger.start()
    merger.join(60)
    assert merger.exitcode == -signal.SIGKILL
    monkeypatch.undo()
    assert len(part_paths(store.folder)) == 4 - deleted
    store.refresh()
    for opened in (store, ReferenceStore.open(tmp_path, FINGERPRINT)):
        assert len(opened) == 30
        _assert_holds(opened, range(30))
        assert opened.damaged == []
        assert _append(opened, range(30)) == []
    assert set(commands.prune_waste(store.folder).paths) <= set(paths)
    assert len(part_paths(store.folder)) == 1
    _assert_holds(ReferenceStore.open(tmp_path, FINGERPRINT), range(30))


def test_rows_are_found_in_the_merged_part_by_who_had_listed_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, reader = (ReferenceStore.open(tmp_path, FINGERPRINT) for _ in range(2))
    paths = [path for n in range(3) for path in _append(store, range(10 * n, 10 * n + 10))]
    list_parts = cache.part_paths

    def list_before_the_merge(folder: Path) -> list[Path]:
        listed = list_parts(folder)
        monkeypatch.setattr(cache, "part_paths", list_parts)
        store.merge(paths)
        return listed

    monkeypatch.setattr(cache, "part_paths", list_before_the_merge)
    assert reader.refresh() == 30
    _assert_holds(reader, range(30))
    assert reader.damaged == []


def test_an_old_listing_that_names_parts_that_are_gone_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    paths = [_append(store, [n])[0] for n in range(2)]
    paths[0].unlink()
    monkeypatch.setattr(cache, "part_paths", lambda folder: paths)
    assert len(ReferenceStore.open(tmp_path, FINGERPRINT)) == 1


@pytest.mark.parametrize("stale", [False, True], ids=["before it is opened", "while it is open, on another node"])
def test_rows_that_were_located_in_a_part_are_read_from_the_one_that_it_was_merged_into(
    tmp_path: Path, stale: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, reader = (ReferenceStore.open(tmp_path, FINGERPRINT) for _ in range(2))
    _append(store, range(100, 110))
    paths = [path for n in range(3) for path in _append(store, range(10 * n, 10 * n + 10))]
    reader.refresh()
    numbers = [105, 3, 25, 14, 22, 101]
    if stale:
        _assert_holds(reader, numbers)
    located, opened = reader._locate(_keys(numbers)), {part._descriptor for part in reader._open.values()}
    store.merge(paths)
    locate, pread = reader._locate, os.pread
    answers = [located]
    monkeypatch.setattr(reader, "_locate", lambda keys: answers.pop() if answers else locate(keys))

    def pread_of_nfs(descriptor: int, length: int, start: int) -> bytes:
        if stale and descriptor in opened:
            opened.remove(descriptor)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return pread(descriptor, length, start)

    monkeypatch.setattr(os, "pread", pread_of_nfs)
    _assert_holds(reader, numbers)
    assert not answers
    assert len(reader._names) == 2


def test_a_damaged_part_is_not_merged(tmp_path: Path) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    paths = [path for n in range(3) for path in _append(store, range(10 * n, 10 * n + 10))]
    _flip_a_byte(paths[1])
    (merged,) = store.merge(paths)
    assert len(load_file(merged)["keys"]) == 20
    for opened in (store, ReferenceStore.open(tmp_path, FINGERPRINT)):
        found = opened.contains(_keys(range(30)))
        np.testing.assert_array_equal(np.flatnonzero(~found), range(10, 20))
    assert store.damaged[0].startswith(paths[1].name)


def test_the_only_sound_part_of_a_merge_stays(tmp_path: Path) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    sound, broken, pruned = (_append(store, range(10 * n, 10 * n + 10))[0] for n in range(3))
    _flip_a_byte(broken)
    pruned.unlink()
    assert store.merge([broken, sound, pruned]) == [sound]
    for opened in (store, ReferenceStore.open(tmp_path, FINGERPRINT)):
        np.testing.assert_array_equal(np.flatnonzero(opened.contains(_keys(range(30)))), range(10))
        _assert_holds(opened, range(10))
    assert store.merge([pruned, broken]) == []


# Near misses and the commands


def test_near_misses_say_why_a_similar_store_does_not_serve(tmp_path: Path) -> None:
    other_precision = replace(FINGERPRINT, dtype="float32")
    other_weights = replace(FINGERPRINT, weights={**FINGERPRINT.weights, "model-00002-of-00002.safetensors": "c"})
    unrelated = replace(FINGERPRINT, weights={"x": "y"}, config={"a": 1}, source="else")
    both = replace(other_weights, dtype="float32")
    retrained = replace(FINGERPRINT, weights={"model.safetensors": "d"}, source="elsewhere")
    for fingerprint in (FINGERPRINT, both, other_precision, other_weights, unrelated, retrained):
        _append(ReferenceStore.open(tmp_path, fingerprint), range(2))
    ReferenceStore.open(tmp_path, replace(FINGERPRINT, dtype="float16")).ensure_writable()  # empty
    damaged = ReferenceStore.open(tmp_path, replace(FINGERPRINT, dtype="float64"))
    _append(damaged, range(2))
    (damaged.folder / "reference.json").write_text("{")
    lines = near_misses(tmp_path, FINGERPRINT)
    assert len(lines) == 4
    reasons = [line.partition("): ")[2] for line in lines]
    weights_differ = "weights differ in model-00002-of-00002.safetensors"
    precision_differs = "precision bfloat16, store has float32"
    files_differ = (
        "weight files model-00001-of-00002.safetensors, model-00002-of-00002.safetensors, store has model.safetensors"
    )
    assert set(reasons[:3]) == {weights_differ, precision_differs, files_differ}
    assert reasons[3] == f"{precision_differs}; {weights_differ}"
    assert near_misses(tmp_path / "nowhere", FINGERPRINT) == []


def test_list_shows_what_each_store_holds(tmp_path: Path) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    _append(store, range(10))
    (path,) = _append(store, range(10, 13))
    _truncate(path)
    (summary,) = commands.list_stores(tmp_path)
    assert (summary.folder, summary.fingerprint) == (store.folder, FINGERPRINT)
    assert (summary.parts, summary.rows) == (1, 10)
    assert summary.tokens == sum(len(row) for row in _rows(range(10)))
    assert summary.bytes == sum(p.stat().st_size for p in store.folder.rglob("*") if p.is_file())
    assert len(summary.damaged) == 1
    table = commands.format_stores([summary])
    assert "org/model" in table
    assert "bfloat16" in table
    assert "1 damaged" in table
    text = commands.format_store(summary)
    assert FINGERPRINT.key in text
    assert "10 in 1 part\n" in text
    assert path.name in text
    (store.folder / "reference.json").unlink()
    assert [found.folder for found in commands.list_stores(tmp_path)] == [store.folder]
    assert commands.format_stores(commands.list_stores(tmp_path / "nowhere")) == "no stores"


def test_what_may_not_be_read_is_told_and_stops_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    (closed,) = _append(store, range(3))
    (own,) = _append(ReferenceStore(store.folder, FINGERPRINT), range(5))
    _close(closed, monkeypatch)
    (summary,) = commands.list_stores(tmp_path)
    assert (summary.parts, summary.rows, summary.unreadable) == (1, 5, (closed.name,))
    assert commands.format_stores([summary]).endswith("1 not readable")
    assert f"\nnot readable {closed.name}" in commands.format_store(summary)
    assert commands.verify(store.folder) == [f"{closed.name}: Permission denied; have it made readable (chmod a+r)"]
    assert commands.prune_waste(store.folder).paths == ()
    assert part_paths(store.folder) == sorted([closed, own])


def test_a_store_whose_reference_may_not_be_read_is_of_an_unknown_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    _append(store, range(3))
    _close(store.folder / "reference.json", monkeypatch)
    assert [found.fingerprint for found in commands.list_stores(tmp_path)] == [None]
    assert near_misses(tmp_path, replace(FINGERPRINT, dtype="float32")) == []


def test_a_store_is_named_by_the_start_of_its_folder_or_by_its_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    _append(store, [1])
    for name in (store.folder.name, store.folder.name[:6], "org/model"):
        assert commands.find_store(tmp_path, name) == store.folder
    elsewhere = tmp_path / "elsewhere"
    assert commands.find_store(elsewhere, str(store.folder)) == store.folder
    of_folder = ReferenceStore.open(elsewhere, replace(FINGERPRINT, source=str(tmp_path / "base")))
    _append(of_folder, [1])
    monkeypatch.chdir(tmp_path)
    assert commands.find_store(elsewhere, "base") == of_folder.folder
    with pytest.raises(UserError, match="is no store"):
        commands.find_store(elsewhere, str(tmp_path))
    with pytest.raises(UserError, match=f"is no store .* one of: {store.folder.name[:12]}"):
        commands.find_store(tmp_path, "zzz")
    _append(ReferenceStore.open(tmp_path, replace(FINGERPRINT, dtype="float32")), [1])
    with pytest.raises(UserError, match="'org/model' means several stores"):
        commands.find_store(tmp_path, "org/model")


def test_verify_finds_a_flipped_byte_that_left_no_trace_in_the_time_stamps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    _append(store, range(5))
    (path,) = _append(store, range(5, 9))
    assert commands.verify(store.folder) == []
    monkeypatch.setattr(files, "_file_state", lambda path: path.name)  # the disk rots in silence
    monkeypatch.setattr(files, "_is_settled", lambda changed_ns: True)
    assert ReferenceStore.open(tmp_path, FINGERPRINT).contains(_keys(range(9))).all()
    _flip_a_byte(path, -70)  # of a value
    assert ReferenceStore.open(tmp_path, FINGERPRINT).contains(_keys(range(9))).all()
    (wrong,) = commands.verify(store.folder)
    assert wrong.startswith(f"{path.name}: its bytes have changed")
    found = ReferenceStore.open(tmp_path, FINGERPRINT).contains(_keys(range(9)))
    np.testing.assert_array_equal(np.flatnonzero(found), range(5))


def test_rows_scored_anew_are_compared_with_the_stored_ones(tmp_path: Path) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    _append(store, range(1, 40, 2))
    asked: list[int] = []

    def rescore(positions: npt.NDArray[np.intp]) -> list[LogProbs]:
        asked.extend(positions.tolist())
        rows = _rows(positions.tolist())
        rows[2] = rows[2] + np.float32(0.25)
        return rows

    actual = rescoring.compare_rows(store, _keys(range(60)), rescore, rows=8)
    assert len(set(asked)) == 8
    assert all(n % 2 == 1 and n < 40 for n in asked)  # of this data, only what is stored
    assert (actual.rows, actual.tokens) == (8, sum(len(row) for row in _rows(asked)))
    assert actual.largest_gap == pytest.approx(0.25 if len(_rows(asked)[2]) else 0.0)
    everything = rescoring.compare_rows(store, _keys(range(60)), lambda p: _rows(p.tolist()), 1000)
    assert (everything.rows, everything.largest_gap) == (20, 0.0)
    broken = rescoring.compare_rows(store, _keys([1]), lambda p: [np.array([math.nan], np.float32)], rows=1)
    assert broken.largest_gap == math.inf
    with pytest.raises(UserError, match="another scoring path"):
        rescoring.compare_rows(store, _keys([1]), lambda p: [np.zeros(9, np.float32)], rows=1)
    with pytest.raises(UserError, match="none of the 1 rows"):
        rescoring.compare_rows(store, _keys([0]), lambda p: [], rows=1)


def test_prune_deletes_only_what_it_was_asked_to(tmp_path: Path) -> None:
    stores = [ReferenceStore.open(tmp_path, replace(FINGERPRINT, dtype=dtype)) for dtype in "abcd"]
    for store in stores:
        _append(store, range(4))
    old, named, known_by_path, kept = stores
    for path in part_paths(old.folder):
        os.utime(path, (time.time() - 10 * 86400,) * 2)
    with pytest.raises(UserError, match="nothing to prune"):
        commands.prune_stores(tmp_path)
    with pytest.raises(UserError, match="is no store"):
        commands.prune_stores(tmp_path, [named.folder.name, "zzz"])
    assert len(commands.list_stores(tmp_path)) == 4
    expected_bytes = sum(p.stat().st_size for p in named.folder.rglob("*") if p.is_file())
    pruned = commands.prune_stores(tmp_path, [named.folder.name])
    assert (pruned.paths, pruned.bytes) == ((named.folder,), expected_bytes)
    assert commands.prune_stores(tmp_path, older_than_days=9).paths == (old.folder,)
    path = known_by_path.folder
    assert commands.prune_stores(tmp_path / "elsewhere", [str(path)]).paths == (path,)
    assert [p.name for p in tmp_path.iterdir()] == [kept.folder.name]
    _assert_holds(ReferenceStore.open(tmp_path, kept.fingerprint), range(4))


@pytest.mark.parametrize("closed", ["", "verified"])
def test_prune_leaves_the_store_of_another_user_where_it_is(
    closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = [ReferenceStore.open(tmp_path, replace(FINGERPRINT, dtype=dtype)) for dtype in "ab"]
    for store in (mine, theirs):
        _append(store, range(4))
    place = theirs.folder / closed
    place.mkdir(exist_ok=True)
    monkeypatch.setattr(commands.os, "access", lambda path, mode: path != place)
    with pytest.raises(UserError, match=f"{place}: may not be written to; have its owner prune"):
        commands.prune_stores(tmp_path, [mine.folder.name, theirs.folder.name])
    assert {path.name for path in tmp_path.iterdir()} == {mine.folder.name, theirs.folder.name}


@pytest.mark.parametrize(("deleted", "said"), [(0, "not deleted"), (1, "only partly deleted")])
def test_a_store_that_cannot_be_deleted_keeps_its_name_while_it_is_whole(
    deleted: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    for numbers in (range(4), range(4, 6)):
        _append(store, numbers)

    def fail(folder: Path) -> None:
        for path in part_paths(folder)[:deleted]:
            path.unlink()
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(commands.shutil, "rmtree", fail)
    with pytest.raises(UserError, match=f"{store.folder}: {said}: Operation not permitted"):
        commands.prune_stores(tmp_path, [store.folder.name])
    assert len(part_paths(store.folder)) == (0 if deleted else 2)


def test_prune_takes_what_a_killed_pruning_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, own = tmp_path / ".pruned-0123456789ab", tmp_path / ".pruned-notes"
    for folder in (left, own):
        folder.mkdir()
        (folder / "part-0.safetensors").write_bytes(b"half")
    assert commands.prune_stores(tmp_path, older_than_days=1).paths == ()  # its pruner may be at it
    monkeypatch.setattr(commands, "_DEAD_AFTER_S", -60.0)
    assert commands.prune_stores(tmp_path, older_than_days=1) == commands.Pruned((left,), 4)
    assert [path.name for path in tmp_path.iterdir()] == [own.name]


def test_a_store_that_no_row_was_written_to_is_as_old_as_its_folder(tmp_path: Path) -> None:
    old, fresh = [ReferenceStore.open(tmp_path, replace(FINGERPRINT, dtype=dtype)) for dtype in "ab"]
    for store in (old, fresh):
        store.ensure_writable()
    os.utime(old.folder, (time.time() - 10 * 86400,) * 2)
    assert commands.prune_stores(tmp_path, older_than_days=9).paths == (old.folder,)


def test_what_is_no_store_is_neither_listed_nor_pruned(tmp_path: Path) -> None:
    """A run's folder has a reference.json too, and tokenized data lie under names like a store's."""
    run, tokens = tmp_path / "llama-8b", tmp_path / ("0" * 32)
    for folder in (run / "checkpoints", tokens):
        folder.mkdir(parents=True)
    files.write_json(run / "reference.json", FINGERPRINT.to_json())
    (tokens / "report.json").write_text("{}")
    for folder in (run, tokens):
        os.utime(folder, (0, 0))
    assert commands.list_stores(tmp_path) == []
    assert commands.prune_stores(tmp_path, older_than_days=1).paths == ()
    for name in ("llama-8b", "org/model", "0"):
        with pytest.raises(UserError, match="is no store"):
            commands.prune_stores(tmp_path, [name])
    assert (run / "checkpoints").is_dir()
    assert tokens.is_dir()


def test_prune_drops_repeated_parts_and_the_debris_of_kills_but_no_row(tmp_path: Path) -> None:
    stores = [ReferenceStore.open(tmp_path, FINGERPRINT) for _ in range(4)]
    (large,) = _append(stores[0], range(20))
    (repeated,) = _append(stores[1], range(5, 10))
    (half_new,) = _append(stores[2], range(15, 25))
    (broken,) = _append(stores[3], range(30, 33))
    _flip_a_byte(broken)
    ReferenceStore.open(tmp_path, FINGERPRINT).contains(_keys(range(40)))
    fresh, dead = (large.with_name(f".part-{n}.safetensors.tmp") for n in (1, 2))
    for path in (fresh, dead):
        path.write_bytes(b"half")
    os.utime(dead, (time.time() - 7200,) * 2)
    pruned = commands.prune_waste(large.parent)
    expected = {repeated, broken.with_name(f"damaged-{broken.name}"), dead}
    assert set(pruned.paths) == expected
    assert not any(path.exists() for path in expected)
    assert all(path.exists() for path in (large, half_new, fresh))
    _assert_holds(stores[1], range(5, 10))  # a reader that had the dropped part finds the other
    _assert_holds(ReferenceStore.open(tmp_path, FINGERPRINT), range(25))


def test_prune_keeps_one_of_two_equal_parts_and_never_counts_on_a_damaged_one(
    tmp_path: Path,
) -> None:
    stores = [ReferenceStore.open(tmp_path, FINGERPRINT) for _ in range(3)]
    paths = [
        _append(stores[0], [1, 2])[0],
        _append(stores[1], [2, 1])[0],
        _append(stores[2], [2, 1, 3])[0],
    ]
    _flip_a_byte(paths[2])
    assert len(commands.prune_waste(stores[0].folder).paths) == 1
    _assert_holds(ReferenceStore.open(tmp_path, FINGERPRINT), [1, 2])
