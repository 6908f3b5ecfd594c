"""The store of tokens: what its key holds, and what becomes of a damaged one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from disks import note_order
from small_tokenizers import byte_level
from transformers import CTRLTokenizer, PreTrainedTokenizerBase

import dpo_scale.data
from dpo_scale.data import store_lock, token_pairs, token_store
from dpo_scale.data.preparation import prepare_pairs
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.data.token_store import TokenStore, tokenizer_fingerprint
from dpo_scale.errors import UserError
from dpo_scale.recipe import DataSection


@pytest.fixture
def data(tmp_path: Path) -> DataSection:
    rows = [{"prompt": "Q:", "chosen": f" yes {n}", "rejected": " no"} for n in range(3)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSection(train=[str(path)], cache_dir=str(tmp_path / "not" / "there"), workers=1)


def test_a_store_reaches_the_disk_before_its_name_does(
    data: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = note_order(monkeypatch)
    prepare_pairs(data.train, data, byte_level(), seed=0)
    (store,) = (path.parent for path in tmp_path.rglob("report.json"))
    columns = [f"sync {column.file}" for column in token_store._COLUMNS]
    assert events[events.index(columns[0]) :] == [
        *columns,
        "sync report.json",
        f"sync .{store.name}/",
        f"name {store.name}",
        f"sync {store.parent.name}/",
    ]


# --- the key -------------------------------------------------------------------------------------


def key(data: DataSection, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    return TokenStore.for_content(data.train, data, tokenizer or byte_level(), None, seed=0).folder.name


OTHER_SETTINGS = {
    "max_length": 99,
    "max_prompt_length": 50,
    "max_completion_length": 50,
    "truncation": "keep_start",
    "completion_pairs": "all_pairs",
    "completion_margin": 0.5,
    "on_bad_row": "skip",
    "on_no_preference": "error",
}
WITHOUT_EFFECT = {"evaluate": ["held_out.jsonl"], "chat_template": "of the tokenizer", "workers": 2}


@pytest.mark.parametrize("name", sorted(DataSection.model_fields.keys() - {"train", "cache_dir"}))
def test_every_setting_is_in_the_key_unless_it_changes_no_token(name: str, data: DataSection) -> None:
    other = DataSection(**{**data.model_dump(), name: {**OTHER_SETTINGS, **WITHOUT_EFFECT}[name]})
    assert (key(other) == key(data)) == (name in WITHOUT_EFFECT)


def test_the_place_of_the_store_is_not_in_the_key(data: DataSection, tmp_path: Path) -> None:
    assert key(DataSection(**{**data.model_dump(), "cache_dir": str(tmp_path / "other")})) == key(data)


WITHOUT_TOKENS = {"__init__.py", "layouts.py", "planning.py", "samples.py", "store_lock.py", "token_pairs.py"}


@pytest.mark.parametrize(
    "module", sorted({file.name for file in Path(dpo_scale.data.__path__[0]).glob("*.py")} - WITHOUT_TOKENS)
)
def test_the_code_is_in_the_key(module: str, data: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    before, original = key(data), token_store.sha256_of_file
    monkeypatch.setattr(token_store, "sha256_of_file", lambda file: "0" if file.name == module else original(file))
    assert key(data) != before


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_the_libraries_are_in_the_key(library: str, data: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    before, original = key(data), token_store.importlib.metadata.version
    monkeypatch.setattr(
        token_store.importlib.metadata, "version", lambda name: "0" if name == library else original(name)
    )
    assert key(data) != before


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_special_tokens_are_in_the_key(name: str, data: DataSection) -> None:
    tokenizer = byte_level()
    setattr(tokenizer, name, "<|im_end|>")
    assert key(data, tokenizer) != key(data)


def test_the_merges_of_a_slow_tokenizer_are_in_the_key(data: DataSection, tmp_path: Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", "a", "b", "ab</w>", "a</w>", "b</w>"]
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocabulary.write_text(json.dumps({piece: id_ for id_, piece in enumerate(pieces)}))
    keys, tokens = set(), []
    for text in ("#version: 0.2\na b</w>\n\n", "#version: 0.2\n\n"):
        merges.write_text(text)
        tokenizer = CTRLTokenizer(str(vocabulary), str(merges), unk_token="<unk>", eos_token="</s>")
        tokens.append(tokenizer.tokenize("ab"))
        keys.add(tokenizer_fingerprint(tokenizer))
    assert tokens[0] != tokens[1]
    assert len(keys) == 2


# --- damage --------------------------------------------------------------------------------------


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def cut_a_pair(file: Path) -> None:
    """Of numbers of 8 bytes, three a pair."""
    file.write_bytes(file.read_bytes()[:-24])


def without_digest(file: Path) -> None:
    document = json.loads(file.read_text())
    del document["digest"]
    file.write_text(json.dumps(document))


DAMAGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "token": ("tokens.i32", flip_a_bit),
    "length": ("lengths.i64", flip_a_bit),
    "short tokens": ("tokens.i32", cut),
    "short lengths": ("lengths.i64", cut_a_pair),
    "short hashes": ("hashes.u64", cut_a_pair),
    "short row numbers": ("row_numbers.i64", cut_a_pair),
    "file of a row": ("row_files.i32", lambda file: file.write_bytes(b"\x01" * 12)),
    "no column": ("row_numbers.i64", Path.unlink),
    "no report": ("report.json", Path.unlink),
    "empty report": ("report.json", lambda file: file.write_text("")),
    "other report": ("report.json", lambda file: file.write_text("[]")),
    "cut report": ("report.json", cut),
    "no digest": ("report.json", without_digest),
}


def prepared(data: DataSection) -> TokenPairs:
    return prepare_pairs(data.train, data, byte_level(), seed=0)[0]


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_store_is_made_anew(name: str, data: DataSection) -> None:
    expected = list(map(str, prepared(data)))
    (folder,) = (path for path in Path(str(data.cache_dir)).iterdir() if path.is_dir())
    file, damage = DAMAGES[name]
    damage(folder / file)
    assert TokenStore(folder).load() is None
    assert list(map(str, prepared(data))) == expected
    assert TokenStore(folder).load() is not None
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_a_store_of_another_user_that_cannot_be_read_says_what_mends_it(
    data: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(data)

    def refuse(folder: Path, column: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(token_store, "_map", refuse)
    with pytest.raises(UserError, match=r"another user and cannot be read; have it made readable \(chmod -R a\+rX\)"):
        prepared(data)


def test_an_unfinished_store_of_another_user_stops_nobody(data: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(str(data.cache_dir))
    closed = root / f".{'0' * 32}.{'1' * 32}"
    closed.mkdir(parents=True)
    os.utime(closed, (0, 0))
    iterdir = Path.iterdir

    def refuse(folder: Path) -> Iterator[Path]:
        if folder == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert len(prepared(data))
    assert closed.is_dir()


def test_the_digest_of_a_loaded_store_is_remembered(data: DataSection, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(data)
    pairs = prepared(data)
    monkeypatch.setattr(token_pairs, "hashlib", None)
    assert len(pairs.digest()) == 64


# --- several processes at once -------------------------------------------------------------------


@pytest.mark.parametrize("has_waited", [False, True])
def test_a_store_that_another_machine_was_first_to_make_is_taken_even_if_it_shows_late(
    has_waited: bool, data: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS goes on for a while to say that a name is absent, and refuses to put another folder there."""
    expected = list(map(str, prepared(data)))
    (folder,) = (path for path in Path(str(data.cache_dir)).iterdir() if path.is_dir())
    made = folder.stat().st_ino
    looks = iter([False] * 3)

    def load(store: TokenStore) -> Any:
        return original_load(store) if is_shown() else None

    def is_shown() -> bool:
        return next(looks, True)

    original_load, original_is_dir = TokenStore.load, Path.is_dir
    monkeypatch.setattr(TokenStore, "load", load)
    monkeypatch.setattr(Path, "is_dir", lambda path: (path != folder or is_shown()) and original_is_dir(path))
    monkeypatch.setattr(token_store, "_SECONDS_UNTIL_SHOWN", 1.0)
    if has_waited:
        monkeypatch.setattr(token_store, "one_at_a_time", lambda path, while_waiting: nullcontext(True))
        monkeypatch.setattr(TokenStore, "writer", None)
    assert list(map(str, prepared(data))) == expected
    assert next(looks, None) is None
    assert folder.stat().st_ino == made


HOLDER = """
import sys, time
from pathlib import Path
from small_tokenizers import byte_level
from dpo_scale.data.preparation import prepare_pairs
from dpo_scale.errors import UserError
from dpo_scale.recipe import DataSection

rows, cache, begun, go_on = sys.argv[1:]

def progress(count):
    Path(begun).touch()
    while not Path(go_on).exists():
        time.sleep(0.01)

data = DataSection(train=[rows], cache_dir=cache, workers=1)
prepare_pairs(data.train, data, byte_level(), seed=0, progress=progress)
"""


@pytest.mark.parametrize("is_killed", [False, True], ids=["lives", "is killed"])
def test_data_that_another_process_tokenizes_is_waited_for(
    is_killed: bool,
    data: DataSection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a disk that many machines share, each would write all of it; the kernel frees what a killed one holds."""
    monkeypatch.setattr(store_lock, "POLL_SECONDS", 0.02)
    begun, go_on = tmp_path / "begun", tmp_path / "go_on"
    arguments = [data.train[0].path, str(data.cache_dir), str(begun), str(go_on)]
    command = [sys.executable, "-c", HOLDER, *arguments]
    told: list[int] = []
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as holder:
        try:
            while not begun.exists():
                assert holder.poll() is None
                time.sleep(0.01)

            def progress(rows: int) -> None:
                told.append(rows)
                if rows:
                    (lock,) = Path(str(data.cache_dir)).glob(".*.lock")
                    assert lock.read_text().startswith(f"process {os.getpid()} on ")
                if len(told) == 3:
                    holder.kill() if is_killed else go_on.touch()

            pairs, _ = prepare_pairs(data.train, data, byte_level(), seed=0, progress=progress)
        finally:
            holder.kill()
    assert len(pairs) == 3
    assert told[:3] == [0, 0, 0]
    assert sum(told) == (3 if is_killed else 0)
    (said,) = (record.message for record in caplog.records if record.name == store_lock.__name__)
    assert f"Waiting for process {holder.pid} on " in said
    folders = [path for path in Path(str(data.cache_dir)).iterdir() if path.is_dir() and path.name[0] != "."]
    assert len(folders) == 1


def test_the_lock_of_a_store_is_no_folder_of_a_dead_writer(data: DataSection) -> None:
    prepared(data)
    root = Path(str(data.cache_dir))
    (lock,) = root.glob(".*.lock")
    os.utime(lock, (0, 0))
    assert token_store._abandoned(root) == []
