"""Millions of pairs through `prepare_pairs`, in bounded memory: python data_scale.py --pairs 10000000

Rows are made up while they are read (no file holds them) and take the whole way: lines, JSON, pairs, tokens, store,
report. A second process opens the store as training does and lays out steps. Prints one JSON object; memory is what
the processes own (RssAnon), summed over all of them, since pages of mapped files are the kernel's to take back.
Rows are short and the tokenizer knows whole words only: what is measured is the memory, and the time beside a
tokenizer that takes hardly any.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenization import cpu_seconds

MIB = 2**20
LINES_AT_ONCE = 256
WORDS = 2000
SECONDS_BETWEEN_LINES = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the store; default: a temporary folder")
    parser.add_argument("--phase", choices=("tokenize", "open"))
    options = parser.parse_args()
    if options.phase:
        phase = _tokenize if options.phase == "tokenize" else _open
        print(json.dumps(phase(options.folder, options.pairs, options.workers)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _word_tokenizer(Path(folder) / "tokenizer")
        (Path(folder) / "rows.jsonl").touch()
        figures: dict[str, Any] = {"pairs": options.pairs, "workers": options.workers or len(os.sched_getaffinity(0))}
        for phase in ("tokenize", "open"):
            command = [sys.executable, __file__, "--phase", phase, "--folder", folder]
            command += ["--pairs", str(options.pairs), "--workers", str(options.workers)]
            figures[phase] = _run(command)
            print(json.dumps(figures), file=sys.stderr, flush=True)
    print(json.dumps(figures, indent=2))


def _run(command: list[str]) -> dict[str, float]:
    """What a phase says, and the most memory that its processes owned together."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peaks = {"peak MiB of all processes": 0.0, "peak MiB of the first process": 0.0}

    def watch() -> None:
        spoke = time.monotonic()
        while process.poll() is None:
            owned = [_owned_mib(pid) for pid in (process.pid, *_children(process.pid))]
            peaks["peak MiB of all processes"] = max(peaks["peak MiB of all processes"], sum(owned))
            peaks["peak MiB of the first process"] = max(peaks["peak MiB of the first process"], owned[0])
            if time.monotonic() - spoke > SECONDS_BETWEEN_LINES:
                spoke = time.monotonic()
                print(json.dumps(peaks), file=sys.stderr, flush=True)
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    assert process.returncode == 0, f"exit code {process.returncode}"
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return {**figures, **{name: round(value, 1) for name, value in peaks.items()}}


def _children(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return
    for child in map(int, children):
        yield child
        yield from _children(child)


def _owned_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


# --- the phases, each in a process of its own ----------------------------------------------------


def _tokenize(folder: Path, pairs: int, workers: int) -> dict[str, float]:
    done, started, cpu = 0, time.perf_counter(), cpu_seconds()

    def progress(rows: int) -> None:
        nonlocal done
        if (done + rows) * 20 // pairs > done * 20 // pairs:
            print(f"{done + rows:,} rows, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        done += rows

    stored = _prepare(folder, pairs, workers, progress)
    assert len(stored) == done == pairs
    files = sum(file.stat().st_size for file in (folder / "store").rglob("*"))
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "CPU seconds": round(cpu_seconds() - cpu, 1),
        "tokens": stored.num_tokens,
        "store MiB": round(files / MIB, 1),
    }


def _open(folder: Path, pairs: int, workers: int) -> dict[str, float]:
    from dpo_scale.data.planning import CostModel, Schedule, layout_costs, plan_step
    from dpo_scale.reference.scoring import ReferenceRows

    started = time.perf_counter()
    stored = _prepare(folder, pairs, workers, None)
    figures = {"seconds to open": round(time.perf_counter() - started, 2)}
    schedule = Schedule(len(stored), global_pairs=512, seed=0, epochs=1)
    costs = layout_costs(stored.lengths, "shared", CostModel(per_attended_position=1e-3))
    for step in range(20):
        plan_step(schedule.pairs_of(step), costs, world_size=8, rank_tokens=16384, step=step)
    figures["seconds to the 20th step's plan"] = round(time.perf_counter() - started, 2)
    ReferenceRows.of_pairs(stored)
    figures["seconds to the reference's keys"] = round(time.perf_counter() - started, 2)
    return figures


def _prepare(folder: Path, pairs: int, workers: int, progress: Any) -> Any:
    from transformers import AutoTokenizer

    from dpo_scale.data import readers
    from dpo_scale.data.preparation import prepare_pairs
    from dpo_scale.recipe import DataSection

    @contextmanager
    def made_up(file: Path) -> Iterator[io.BufferedReader]:
        yield io.BufferedReader(_MadeUpLines(pairs), 2**18)

    readers._open_bytes = made_up  # type: ignore[assignment]
    data = DataSection(train=[str(folder / "rows.jsonl")], cache_dir=str(folder / "store"), workers=workers)
    return prepare_pairs(
        data.train, data, AutoTokenizer.from_pretrained(folder / "tokenizer"), seed=0, progress=progress
    )[0]


class _MadeUpLines(io.RawIOBase):
    """A file of so many rows, each one different, that exists only while it is read."""

    def __init__(self, count: int) -> None:
        self._lines = _lines(count)
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = b"".join(itertools.islice(self._lines, LINES_AT_ONCE))
        size = min(len(self._left), len(buffer))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _lines(count: int) -> Iterator[bytes]:
    words = _words()
    for number in range(count):
        a, b, c, d = (words[number * factor % WORDS] for factor in (1, 7, 11, 13))
        number_words = f"{words[number // 1000 % 1000]} {words[number % 1000]}"
        yield f'{{"prompt": "{number_words} {a} ?", "chosen": " {b} {c}", "rejected": " {d}"}}\n'.encode()


def _word_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["<unk>", "<|end|>", "?", *_words()]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)


def _words() -> list[str]:
    draws = random.Random(0)
    return ["".join(draws.choices("aeioulnrst", k=draws.randint(2, 7))) for _ in range(WORDS)]


if __name__ == "__main__":
    main()
