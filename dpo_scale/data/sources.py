"""Sources of a recipe -> blocks of raw rows: files, folders, globs and datasets, whole or drawn from."""

from __future__ import annotations

import glob
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_scale.data import readers
from dpo_scale.data.rows import Block
from dpo_scale.errors import DataError
from dpo_scale.recipe import DataSource

# name:split or name:config:split, the split only where there are several.
_HUB_DATASET = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+){0,2}")


HELD_OUT_SEED = 0
"""Draws the held-out rows of every run: runs of other seeds are compared by the same ones."""


def read_blocks(source: DataSource, seed: int) -> Iterator[Block]:
    """The rows of a source in the order of its files, each as often as `rows` or `weight` says.

    Which rows are drawn depends on `seed` and on their positions in the source, on nothing else.
    """
    if source.rows is None and source.weight is None:
        yield from _all_blocks(source.path)
        return
    draws = random.Random(seed)  # whose random() is promised to stay the same in later versions of Python
    if source.rows is not None:
        copies = _exactly(source.rows, _count_rows(source.path), draws)
    else:
        assert source.weight is not None
        copies = _on_average(source.weight, draws)
    for block in _all_blocks(source.path):
        yield block.take(np.array(list(itertools.islice(copies, len(block))), np.int64))


def _exactly(wanted: int, count: int, draws: random.Random) -> Iterator[int]:
    """1 for `wanted` of `count` rows, every choice of them as likely as any other; 0 for the others.

    Selection sampling (Knuth, The Art of Computer Programming, vol. 2, 3.4.2, algorithm S): in one pass,
    with no memory of what was chosen.
    """
    for left in range(count, 0, -1):
        chosen = draws.random() * left < wanted
        wanted -= chosen
        yield int(chosen)


def _on_average(weight: float, draws: random.Random) -> Iterator[int]:
    """Copies of each row: the whole part of the weight, and one more with the chance that is left."""
    whole, chance = divmod(weight, 1)
    while True:
        yield int(whole) + (draws.random() < chance)


def source_files(path: str) -> list[Path]:
    """The files of a file, folder or glob, sorted; empty for a dataset on the hub.

    Raises DataError where there is none of these.
    """
    if glob.has_magic(path) and not Path(path).exists():
        files = sorted(Path(name) for name in glob.glob(path, recursive=True))
        files = [file for file in files if file.is_file()]
        if not files:
            raise DataError(f"{path}: no file matches this pattern")
        return files
    folder = _dataset_folder(path)
    if folder is not None:
        return sorted(file for file in folder.rglob("*") if file.is_file())
    root = Path(path)
    if root.is_dir():
        files = sorted(file for file in root.rglob("*") if _is_data_file(file, root))
        if not files:
            raise DataError(f"{path}: no data files in this folder; known: {readers.known_suffixes()}")
        return files
    if root.is_file():
        return [root]
    if not _HUB_DATASET.fullmatch(path) or readers.is_known(root):
        raise DataError(f"{path}: no such file")
    return []


def check_paths(sources: Sequence[DataSource], setting: str) -> None:
    """Raise one DataError for all sources that have no files.

    Args:
        setting: the list that they stand in, `data.train` or `data.evaluate`.
    """
    faults: dict[str, str] = {}
    for source in sources:
        try:
            source_files(source.path)
        except DataError as error:
            faults[source.path] = str(error)
    if faults:
        is_relative = not all(Path(path).is_absolute() for path in faults)
        here = [f"relative paths count from the current folder, {Path.cwd()}"] if is_relative else []
        raise DataError(f"{setting}: " + "; ".join([*faults.values(), *here]))


def open_dataset(path: str) -> Any:
    """The `datasets.Dataset` of a hub name or of a folder written by save_to_disk.

    Raises DataError where it cannot be loaded, or one of several splits has to be named.
    """
    import datasets  # takes a second: only where it is needed

    folder = _dataset_folder(path)
    try:
        if folder is not None:
            loaded = datasets.load_from_disk(str(folder))
            split = None if folder == Path(path) else path.rpartition(":")[2]
        else:
            name, *config, split = (path if ":" in path else f"{path}:").split(":")
            loaded = datasets.load_dataset(name, *config)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path}: neither a file nor a dataset that can be loaded ({reason}); "
            "check the path, or for a hub dataset its name, split and the network"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if not split and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise DataError(f"{path}: name a split as in name:split; there are {', '.join(loaded)}")
    return loaded[split]


def _all_blocks(path: str) -> Iterator[Block]:
    files = source_files(path)
    if not files or _dataset_folder(path) is not None:
        from dpo_scale.data.tables import table_blocks  # loads pyarrow, which is left to those who read

        tables = open_dataset(path).with_format("arrow").iter(batch_size=2 * readers.BLOCK_ROWS)
        batches = (batch for table in tables for batch in table.combine_chunks().to_batches())
        yield from table_blocks(path, batches)
        return
    for file in files:
        yield from readers.read_file(file)


def _count_rows(path: str) -> int:
    files = source_files(path)
    if not files or _dataset_folder(path) is not None:
        return len(open_dataset(path))
    return sum(map(readers.count_rows, files))


def _dataset_folder(path: str) -> Path | None:
    """The folder that save_to_disk wrote, named as `folder` or `folder:split`."""
    for name in (path, path.rpartition(":")[0]):
        folder = Path(name)
        if name and ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
            return folder
    return None


def _is_data_file(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file.is_file() and readers.is_known(file)
