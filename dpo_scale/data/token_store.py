"""Tokenized data on disk, addressed by all that determines it, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from dpo_scale.data.hashing import Hashes
from dpo_scale.data.report import DataReport, SourceReport, describe
from dpo_scale.data.rows import Numbers
from dpo_scale.data.sources import open_dataset, source_files
from dpo_scale.data.store_lock import one_at_a_time
from dpo_scale.data.token_pairs import Lengths, TokenIds, TokenPairs
from dpo_scale.errors import UserError
from dpo_scale.files import fsync_folder, remembered_sha256, sha256_of_file
from dpo_scale.recipe import DataSection, DataSource, tokens_cache_dir

_CODE = (
    "rows.py",
    "readers.py",
    "tables.py",
    "sources.py",
    "row_values.py",
    "completions.py",
    "hashing.py",
    "preferences.py",
    "tokenization.py",
    "preparation.py",
    "report.py",
    "token_store.py",
)
_SECONDS_BEFORE_ABANDONED = 24 * 3600.0
_SECONDS_UNTIL_SHOWN = 60.0
"""As long as NFS believes by default that a name is absent that was looked for in vain."""
_TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]{32}")
_NOT_OF_CONTENT = frozenset({"train", "evaluate", "chat_template", "workers", "cache_dir"})
"""Settings that change no token, or whose content has a place of its own in the key: sources and template.

Everything else counts, known or not: tokenizing anew is the smaller harm.
"""


@dataclass(frozen=True, slots=True)
class _Column:
    """One file of a store: numbers of one type, end to end."""

    file: str
    dtype: str


_TOKENS = _Column("tokens.i32", "<i4")
_LENGTHS = _Column("lengths.i64", "<i8")
_HASHES = _Column("hashes.u64", "<u8")
_ROW_FILES = _Column("row_files.i32", "<i4")
_ROW_NUMBERS = _Column("row_numbers.i64", "<i8")
_COLUMNS = (_TOKENS, _LENGTHS, _HASHES, _ROW_FILES, _ROW_NUMBERS)


class RowPlaces(Sequence[str]):
    """`file:number` of each pair, kept as two columns of numbers."""

    def __init__(self, names: Sequence[str], files: npt.NDArray[np.int32], numbers: npt.NDArray[np.int64]) -> None:
        self._names = names
        self._files = files
        self._numbers = numbers

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return RowPlaces(self._names, self._files[index], self._numbers[index])
        return f"{self._names[self._files[index]]}:{self._numbers[index]}"

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True, slots=True)
class TokenStore:
    """The folder of one set of pairs."""

    folder: Path

    @classmethod
    def for_content(
        cls,
        sources: Sequence[DataSource],
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        *,
        seed: int,
    ) -> TokenStore:
        """The store that belongs to these data files, tokenizer, template and settings.

        Raises UserError where its folder cannot be made, or a source is not there.
        """
        root = tokens_cache_dir(data)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir: {root}: {error.strerror}; choose another folder") from error
        content = {
            "code": [sha256_of_file(Path(__file__).with_name(name)) for name in _CODE],
            "versions": [importlib.metadata.version(name) for name in ("tokenizers", "transformers")],
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "template": template,
            "settings": data.model_dump(exclude=set(_NOT_OF_CONTENT)),
            "sources": [_source_identity(source, root, seed) for source in sources],
        }
        text = json.dumps(content, sort_keys=True)
        return cls(root / hashlib.sha256(text.encode()).hexdigest()[:32])

    def load(self) -> tuple[TokenPairs, DataReport] | None:
        """The pairs mapped into memory and their report; None if they are not there, or damaged.

        Raises UserError where they are another user's and cannot be read.
        """
        try:
            document = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
            pairs = _open_pairs(self.folder, document["files"])
            report = DataReport.from_json(document["report"])
            return (pairs, report) if pairs.digest() == document["digest"] else None
        except PermissionError as error:
            raise UserError(
                f"data.cache_dir: {self.folder} belongs to another user and cannot be read; have it made readable "
                "(chmod -R a+rX), or set data.cache_dir"
            ) from error
        except (FileNotFoundError, AttributeError, KeyError, TypeError, ValueError):
            return None

    def fill(
        self, make: Callable[[PairWriter], None], while_waiting: Callable[[], None]
    ) -> tuple[TokenPairs, DataReport]:
        """The pairs and their report, written by `make`, or by another process that is at it: that one is waited for.

        Args:
            while_waiting: called about once a second; what it raises ends the wait.
        """
        lock = self.folder.with_name(f".{self.folder.name}.lock")
        with one_at_a_time(lock, while_waiting) as is_made:
            if is_made:
                self._wait_until_shown()
            stored = self.load()
            if stored is not None:
                return stored
            with self.writer() as writer:
                make(writer)
        stored = self.load()
        assert stored is not None
        return stored

    @contextmanager
    def writer(self) -> Iterator[PairWriter]:
        """Collects pairs in a temporary folder that becomes the store when all went well.

        Raises UserError where they cannot be written.
        """
        for abandoned in _abandoned(self.folder.parent):
            shutil.rmtree(abandoned, ignore_errors=True)
        temporary = self._temporary()
        temporary.mkdir()
        writer = PairWriter(temporary)
        try:
            yield writer
            fsync_folder(temporary)
            self._put_in_place(temporary)
            fsync_folder(self.folder.parent)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: {self.folder.parent}: {error.strerror or error}; make room or choose another folder"
            ) from error
        finally:
            writer.close()
            shutil.rmtree(temporary, ignore_errors=True)

    def _put_in_place(self, temporary: Path) -> None:
        try:
            temporary.rename(self.folder)
        except OSError as error:
            # These two prove that the folder is there; a network file system may still say that it is not.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) and not self.folder.is_dir():
                raise
            self._wait_until_shown()
            if self.load() is None:  # else another process was first, with the same content
                damaged = self._temporary()
                self.folder.rename(damaged)
                temporary.rename(self.folder)
                shutil.rmtree(damaged, ignore_errors=True)

    def _wait_until_shown(self) -> None:
        """Bear with a network file system that does not show at once what another machine has put in place."""
        give_up = time.monotonic() + _SECONDS_UNTIL_SHOWN
        while not self.folder.is_dir() and time.monotonic() < give_up:
            time.sleep(_SECONDS_UNTIL_SHOWN / 100)

    def _temporary(self) -> Path:
        """A name beside the store that nobody reads."""
        return self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}")


class PairWriter:
    """Appends pairs to the columns of a store; memory does not grow with their number."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._streams = {column: (folder / column.file).open("wb") for column in _COLUMNS}
        self._files: dict[str, int] = {}

    def add(self, tokens: TokenIds, lengths: Lengths, hashes: Hashes, file: str, numbers: Numbers) -> None:
        """Append pairs: flat token ids, [pairs, 3] lengths and hashes, and the rows of a file that they came from."""
        if not len(lengths):
            return
        self._append(_TOKENS, tokens)
        self._append(_LENGTHS, lengths)
        self._append(_HASHES, hashes)
        self._append(_ROW_FILES, np.full(len(numbers), self._files.setdefault(file, len(self._files))))
        self._append(_ROW_NUMBERS, numbers)

    def _append(self, column: _Column, values: npt.ArrayLike) -> None:
        self._streams[column].write(np.asarray(values, column.dtype).tobytes())

    def finish(self, sources: tuple[SourceReport, ...]) -> None:
        """Write the report of what was added."""
        for column in self._streams.values():
            column.flush()
            os.fsync(column.fileno())
        names = list(self._files)
        pairs = _open_pairs(self._folder, names)
        report = describe(pairs, sources)
        with (self._folder / "report.json").open("w", encoding="utf-8") as stream:
            json.dump({"files": names, "digest": pairs.digest(), "report": report.to_json()}, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams.values():
            with suppress(OSError):  # of a full disk, which the write that failed has told; the file is closed even so
                stream.close()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what decides a tokenizer's ids."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        rules: Any = tokenizer.backend_tokenizer.to_str()
    else:
        settings = sorted((name, repr(value)) for name, value in tokenizer.init_kwargs.items())
        added = sorted((id_, repr(token)) for id_, token in tokenizer.added_tokens_decoder.items())
        rules = [sorted(tokenizer.get_vocab().items()), settings, added, _vocabulary_digests(tokenizer)]
    parts = [type(tokenizer).__name__, rules, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _vocabulary_digests(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """SHA-256 of each file that a slow tokenizer's vocabulary is saved as, in which its merges stand, too."""
    with TemporaryDirectory() as folder:
        with suppress(NotImplementedError):  # its code is its vocabulary
            tokenizer.save_vocabulary(folder)
        return [sha256_of_file(file) for file in sorted(Path(folder).iterdir())]


def _open_pairs(folder: Path, names: Sequence[str]) -> TokenPairs:
    """The columns mapped into memory; ValueError where they do not fit each other."""
    tokens, lengths, hashes, files, numbers = (_map(folder, column) for column in _COLUMNS)
    if not len(lengths) == len(hashes) == 3 * len(files) == 3 * len(numbers):
        raise ValueError(f"{folder}: columns of different lengths")
    if files.min(initial=0) < 0 or files.max(initial=-1) >= len(names):
        raise ValueError(f"{folder}: a row of a file that has no name")
    return TokenPairs(tokens, lengths.reshape(-1, 3), RowPlaces(names, files, numbers), hashes.reshape(-1, 3))


def _map(folder: Path, column: _Column) -> npt.NDArray[Any]:
    file = folder / column.file
    if not file.stat().st_size:  # an empty file cannot be mapped
        return np.zeros(0, column.dtype)
    return np.asarray(np.memmap(file, column.dtype, "r"))


def _abandoned(root: Path) -> list[Path]:
    """Temporary folders of killed writers: those that nobody has written to for a day.

    Anything may lie beside them, the user's own hidden folders too: only names that `writer` gives count.
    """
    before = time.time() - _SECONDS_BEFORE_ABANDONED
    ours = [folder for folder in root.glob(".*") if _TEMPORARY_NAME.fullmatch(folder.name)]
    return [folder for folder in ours if folder.is_dir() and _last_write(folder) < before]


def _last_write(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except (FileNotFoundError, PermissionError):  # its writer has just put it in place, or is another user
        return math.inf


def _source_identity(source: DataSource, root: Path, seed: int) -> dict[str, Any]:
    """What decides a source's rows: its files' contents, or the fingerprint of a hub dataset."""
    files = source_files(source.path)
    content: Any = [[str(file), remembered_sha256(file, root)] for file in files]
    return {
        "path": source.path,
        "columns": source.columns,
        "rows": source.rows,
        "weight": source.weight,
        "seed": seed if source.is_drawn_from else None,
        "content": content or open_dataset(source.path)._fingerprint,
    }
