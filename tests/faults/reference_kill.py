"""Kill a reference pass again and again, go on with other numbers of ranks, and compare with an undisturbed one.

    python tests/faults/reference_kill.py --pairs FILE --kills 20 [--seed 0]

Every process of a launch gets SIGKILL at a random moment of the pass. Started with --rank by the
launcher, this file is one rank of such a pass, which notes what it scores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
import launching

SECONDS_BETWEEN_COMMITS = 0.5
PARTS_BEFORE_A_MERGE = 2
TOLERANCE = 1e-5
"""Nats a token: other micro-batches round otherwise."""


@dataclass(frozen=True)
class Scored:
    """Rows that one rank took from one micro-batch, as it noted them."""

    launch: str
    rank: int
    time: float
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What the kills did."""

    kills: int
    rows_needed: int
    rows_scored: int
    """Over all launches; a row that was lost and scored again counts twice."""
    rows_lost: int
    """Scored rows that a kill destroyed."""
    most_in_an_interval: int
    """Rows that ranks scored between two commits, at most: what one kill may cost."""
    oldest_lost: float
    """Age of the oldest row that a kill destroyed, in seconds."""
    rows_stored: int
    """In all parts; a row in two parts counts twice. Pruned before: a kill in a merge repeats rows."""
    same_keys: bool
    largest_gap: float
    """To the undisturbed store, in nats a token."""


def run_rank(recipe: str) -> None:
    """One rank of a pass that commits often and appends to a file what it has scored."""
    from dpo_scale.launched import run_stage
    from dpo_scale.reference import scoring

    scoring.SECONDS_BETWEEN_COMMITS = SECONDS_BETWEEN_COMMITS
    scoring.PARTS_BEFORE_A_MERGE = PARTS_BEFORE_A_MERGE
    log = os.open(os.environ["SCORED_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    add = scoring.FreshRows.add

    def noting(self: scoring.FreshRows, keys: np.ndarray, rows: Sequence[np.ndarray]) -> None:
        names = [key.tobytes().hex() for key in keys]
        note = [os.environ["LAUNCH"], int(os.environ["RANK"]), time.time(), names]
        os.write(log, (json.dumps(note) + "\n").encode())
        add(self, keys, rows)

    scoring.FreshRows.add = noting  # type: ignore[method-assign]
    sys.argv = [sys.argv[0], recipe]
    run_stage("score")


class Passes:
    """Launches of one recipe's scoring stage over one store."""

    def __init__(self, folder: Path, pairs: Path, rank_tokens: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "zero3.json").write_text(json.dumps(launching.ZERO3))
        accelerate = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {"deepspeed_config_file": str(folder / "zero3.json"), "zero3_init_flag": True},
            "num_machines": 1,
            "machine_rank": 0,
        }
        (folder / "accelerate.yaml").write_text(yaml.safe_dump(accelerate))
        self._recipe = {
            "model": {"path": str(launching.make_model(folder / "model")), "dtype": "float32"},
            "reference": {"rank_tokens": rank_tokens},
            "data": {"train": str(pairs), "max_length": rank_tokens, "cache_dir": str(folder / "tokens")},
            "batch": {"global_pairs": 8},
            "loss": {"beta": 1.0},
            "run": {"output_dir": str(folder / "run")},
        }
        self._launches = 0

    def start(self, cache: Path, processes: int) -> tuple[subprocess.Popen[bytes], str]:
        """A launch, and the name under which its ranks note what they score."""
        self._launches += 1
        launch = f"launch-{self._launches}"
        recipe = self.folder / f"{cache.name}.yaml"
        reference = {**self._recipe["reference"], "cache_dir": str(cache)}
        recipe.write_text(yaml.safe_dump({**self._recipe, "reference": reference}))
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(self.folder / "accelerate.yaml")),
            *("--num_processes", str(processes), "--main_process_port", "0"),
            *(str(Path(__file__).resolve()), "--rank", str(recipe)),
        ]
        settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        settings |= {"LAUNCH": launch, "SCORED_LOG": str(cache.with_suffix(".log"))}
        output = open(self.folder / f"{launch}.out", "wb")  # noqa: SIM115 - the process keeps it
        process = subprocess.Popen(command, env=os.environ | settings, stdout=output, stderr=output)
        return process, launch

    def finish(self, cache: Path, processes: int) -> None:
        """A launch that nothing disturbs."""
        process, launch = self.start(cache, processes)
        assert process.wait(timeout=900) == 0, (self.folder / f"{launch}.out").read_text()[-4000:]


def scored(cache: Path) -> list[Scored]:
    """What ranks noted; a line that a kill tore is left out."""
    log, found = cache.with_suffix(".log"), []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            launch, rank, moment, keys = json.loads(line)
        except ValueError:
            continue
        found.append(Scored(launch, rank, moment, tuple(keys)))
    return found


def kill_after(process: subprocess.Popen[bytes], launch: str, cache: Path, rows: float, delay: float) -> float | None:
    """SIGKILL to a launch and all its ranks, `delay` seconds after they have scored some rows; None if it ended before.

    Counted in rows, so that a busy machine gets all its kills into one pass.
    """
    while process.poll() is None and sum(len(note.keys) for note in scored(cache) if note.launch == launch) <= rows:
        time.sleep(0.02)
    time.sleep(delay)
    if process.poll() is not None:
        return None
    moment = time.time()
    launching.kill_all(process.pid)
    process.wait()
    return moment


def rows_of(cache: Path) -> tuple[dict[str, np.ndarray], int]:
    """Rows of the only store in a folder, read part by part, and how many there are with repeated ones."""
    from dpo_scale.reference.parts import Part

    rows: dict[str, np.ndarray] = {}
    count = 0
    for path in sorted(cache.glob("*/part-*.safetensors")):
        part = Part(path, None)
        values = part.log_probs(np.arange(part.num_rows, dtype=np.int32))
        rows |= {key.tobytes().hex(): row for key, row in zip(part.keys(), values, strict=True)}
        count += part.num_rows
    return rows, count


def most_in_an_interval(notes: Sequence[Scored]) -> int:
    """Most rows that the ranks of one launch scored within one commit interval and the micro-batch that ends it."""
    most = 0
    for launch in {note.launch for note in notes}:
        by_launch = sorted((note for note in notes if note.launch == launch), key=lambda note: note.time)
        longest = 0.0
        for rank in {note.rank for note in by_launch}:
            times = [note.time for note in by_launch if note.rank == rank]
            longest = max([longest, *np.diff(times)])
        for first in by_launch:
            end = first.time + SECONDS_BETWEEN_COMMITS + longest
            most = max(most, sum(len(note.keys) for note in by_launch if first.time <= note.time <= end))
    return most


def kill_and_compare(folder: Path, pairs: Path, kills: int, seed: int, rank_tokens: int) -> Outcome:
    """One pass undisturbed, and one that is killed `kills` times."""
    from dpo_scale.reference.cache import store_folders
    from dpo_scale.reference.commands import prune_waste

    passes, rng = Passes(folder, pairs, rank_tokens), random.Random(seed)
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    passes.finish(undisturbed, processes=2)
    expected, _ = rows_of(undisturbed)
    print(f"undisturbed: {len(expected)} rows", flush=True)
    made, lost, oldest, num_stored = 0, 0, 0.0, 0
    while made < kills:
        process, launch = passes.start(killed, processes=1 + made % 2)
        rows = rng.uniform(0, (len(expected) - num_stored) / (kills - made))
        moment = kill_after(process, launch, killed, rows, delay=rng.uniform(0, SECONDS_BETWEEN_COMMITS))
        if moment is None:
            print(f"the pass ended before kill {made + 1}", flush=True)
            break
        stored, _ = rows_of(killed)
        notes = [note for note in scored(killed) if note.launch == launch]
        gone = [(note, key) for note in notes for key in note.keys if key not in stored]
        made, lost, num_stored = made + 1, lost + len(gone), len(stored)
        oldest = max([oldest, *(moment - note.time for note, _ in gone)])
        total = sum(len(note.keys) for note in notes)
        print(f"kill {made}: {total} rows scored, {len(gone)} lost, {num_stored} stored", flush=True)
    passes.finish(killed, processes=2)
    for store in store_folders(killed):
        print(f"parts that a killed merge left: {len(prune_waste(store).paths)}", flush=True)
    actual, rows_stored = rows_of(killed)
    notes = scored(killed)
    return Outcome(
        kills=made,
        rows_needed=len(expected),
        rows_scored=sum(len(note.keys) for note in notes),
        rows_lost=lost,
        most_in_an_interval=most_in_an_interval(notes),
        oldest_lost=oldest,
        rows_stored=rows_stored,
        same_keys=actual.keys() == expected.keys(),
        largest_gap=max(float(np.abs(actual[key] - expected[key]).max()) for key in actual.keys() & expected.keys()),
    )


def check(outcome: Outcome) -> None:
    """The claims of a resumable pass."""
    assert outcome.same_keys, "the rows differ from an undisturbed pass"
    assert outcome.largest_gap <= TOLERANCE, "the values differ from an undisturbed pass"
    assert outcome.rows_stored == outcome.rows_needed, "a row is stored twice"
    assert outcome.rows_scored == outcome.rows_needed + outcome.rows_lost, "a row was scored again that was not lost"
    assert outcome.rows_lost <= outcome.kills * outcome.most_in_an_interval, "kills cost more than a commit interval"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", metavar="RECIPE", help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank-tokens", type=int, default=8192)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.rank)
    with tempfile.TemporaryDirectory() as folder:
        pairs = options.pairs.resolve()
        outcome = kill_and_compare(Path(folder), pairs, options.kills, options.seed, options.rank_tokens)
    print(outcome)
    check(outcome)
    assert outcome.kills == options.kills, "the pass ended too early: give it more pairs"


if __name__ == "__main__":
    main()
