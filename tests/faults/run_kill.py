"""Kill a run again and again, from scoring to export, start it again each time, and compare with an undisturbed one.

    python tests/faults/run_kill.py --kills 30 [--seed 0]

Launcher and ranks get SIGKILL together, at moments that are drawn from the seed. Started by the launcher, this file is
one rank of such a run, which kills the launch at its moment.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import launching

PHASES = {"scoring": 0.2, "training": 0.35, "checkpoint": 0.3, "export": 0.15}
"""Share of the kills. An event is a micro-batch scored, a forward, or a tensor, fsync or rename of a file."""
MOST_EVENTS = {"scoring": 3, "training": 12, "checkpoint": 70, "export": 25}
SECONDS_AFTER_AN_EVENT = 0.02
EXACT = (
    *("step", "epoch", "loss", "grad_norm", "learning_rate", "pairs", "tokens", "completion_tokens"),
    *("rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen", "logps/rejected"),
    *("eval/loss", "eval/rewards/margin", "eval/rewards/accuracy", "eval/logps/chosen"),
)
"""What metrics.jsonl must hold to the last bit; times and counts of cached rows may differ."""
STEPS_A_CHECKPOINT = 2


@dataclass(frozen=True)
class Moment:
    """When to kill: some time after an event of a phase, as one rank counts them from the start of a launch."""

    phase: str
    event: int
    rank: int
    seconds: float


def draw_moments(kills: int, seed: int) -> list[Moment]:
    """Scoring first, then training and checkpoints mixed, then export."""
    rng = random.Random(seed)
    counts = {phase: round(kills * share) for phase, share in PHASES.items()}
    counts["training"] += kills - sum(counts.values())
    middle = ["training"] * counts["training"] + ["checkpoint"] * counts["checkpoint"]
    rng.shuffle(middle)
    phases = ["scoring"] * counts["scoring"] + middle + ["export"] * counts["export"]
    return [
        Moment(
            phase=phase,
            event=rng.randint(1, MOST_EVENTS[phase]),
            rank=0 if phase == "export" else rng.randrange(2),  # the other rank writes no model
            seconds=rng.choice([0.0, rng.uniform(0, SECONDS_AFTER_AN_EVENT)]),
        )
        for phase in phases
    ]


# --- one rank of a launch


class Killer:
    """Counts the events of a phase and kills the launch at its moment."""

    def __init__(self, moment: Moment) -> None:
        self._moment, self._seen, self._inside = moment, 0, ""

    def count(self, phase: str) -> None:
        self._seen += phase == self._moment.phase
        if self._seen == self._moment.event and phase == self._moment.phase:
            if self._moment.seconds:
                threading.Timer(self._moment.seconds, launching.kill_all, [os.getppid()]).start()
            else:
                launching.kill_all(os.getppid())

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; while it runs, file operations are events of the phase."""

        def call(*arguments: Any, **options: Any) -> Any:
            self._inside = phase
            result = function(*arguments, **options)
            self._inside = ""
            return result

        return call

    def before(self, function: Callable[..., Any], phase: str = "") -> Callable[..., Any]:
        """The function; each call is an event of the phase, or of the one that is inside."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.count(phase or self._inside)
            return function(*arguments, **options)

        return call


def run_rank() -> None:
    """The program's own training, with its events counted."""
    from dpo_scale.distributed.engines import PolicyEngine
    from dpo_scale.launched import run_stage
    from dpo_scale.reference import scoring
    from dpo_scale.training import loop, tensor_files

    scoring.SECONDS_BETWEEN_COMMITS = 0.0  # each micro-batch is kept: a launch goes on from the last one
    moment = Moment(**json.loads(os.environ["KILL"])) if os.environ.get("KILL") else None
    if moment is not None and moment.rank == int(os.environ["RANK"]):
        killer: Any = Killer(moment)
        scoring.FreshRows.add = killer.before(scoring.FreshRows.add, "scoring")
        PolicyEngine.__call__ = killer.before(PolicyEngine.__call__, "training")
        loop.save = killer.around("checkpoint", loop.save)
        loop.export_engine = killer.around("export", loop.export_engine)
        tensor_files._bytes_of = killer.before(tensor_files._bytes_of)
        os.fsync, os.replace = killer.before(os.fsync), killer.before(os.replace)
    run_stage("train")


# --- many launches


@dataclass(frozen=True)
class Outcome:
    """What the kills did."""

    kills: Counter[str]
    seconds: float
    same_weights: bool
    wrong_lines: list[str]


def make_runs(folder: Path) -> launching.Launcher:
    """A launcher of runs of 48 steps in which everything happens often."""
    base = launching.make_launcher(folder)
    launching.make_pairs(folder / "train.jsonl", 96, seed=1)
    settings = {
        **base.base,
        "reference": {"rank_tokens": 250},
        "batch": {"global_pairs": 8, "rank_tokens": 300},
        "evaluate": {"every_steps": 8},
        "track": {"every_steps": 3},
        "checkpoint": {"every_steps": STEPS_A_CHECKPOINT},
        "run": {**base.base["run"], "epochs": 4},
    }
    return launching.Launcher(folder, settings)


def launch(launcher: launching.Launcher, run: str, moment: Moment | None) -> launching.Launched:
    """One launch, with a store of its own for each run."""
    kill = "" if moment is None else json.dumps(asdict(moment))
    store = f"reference.cache_dir={launcher.workspace / run}-store"
    return launcher(run, [store], stage=str(Path(__file__).resolve()), environment={"KILL": kill})


def kill_and_compare(launcher: launching.Launcher, undisturbed: Path, moments: Sequence[Moment]) -> Outcome:
    """A run that is killed at each moment, and how it differs from an undisturbed one."""
    started, kills = time.monotonic(), Counter[str]()
    for number, moment in enumerate(moments, 1):
        done = launch(launcher, "killed", moment)
        assert done.returncode == -signal.SIGKILL, f"{moment} never came\n{done.output}"
        kills[moment.phase] += 1
        committed = done.folder / "checkpoints" / "latest"
        reached = committed.read_text().strip() if committed.exists() else "nothing committed"
        print(f"kill {number}: {moment}; {reached}; {time.monotonic() - started:.0f} s", flush=True)
    done = launch(launcher, "killed", None)
    assert done.returncode == 0, done.output
    return Outcome(
        kills=kills,
        seconds=time.monotonic() - started,
        same_weights=_weights(done.folder) == _weights(undisturbed),
        wrong_lines=wrong_lines(undisturbed, done.folder),
    )


def _weights(run: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in (run / "model").glob("*.safetensors")}
    assert files, f"{run}: no model"
    return files


def _exact(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in EXACT if key in line} for line in lines if {"loss", "eval/loss"} & line.keys()]


def wrong_lines(expected_run: Path, actual_run: Path) -> list[str]:
    """How the logged numbers of two runs differ, to the last bit."""
    expected, actual = _exact(expected_run), _exact(actual_run)
    wrong = [f"{a} instead of {e}" for e, a in zip(expected, actual, strict=False) if a != e]
    return wrong + [f"{len(actual)} lines instead of {len(expected)}"] * (len(actual) != len(expected))


def check(outcome: Outcome) -> None:
    """The claim: whatever was killed, the result is the same to the last bit."""
    assert outcome.same_weights, "the final weights differ from an undisturbed run"
    assert not outcome.wrong_lines, "\n".join(outcome.wrong_lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        launcher = make_runs(Path(folder))
        done = launch(launcher, "undisturbed", None)
        assert done.returncode == 0, done.output
        print(f"undisturbed: {len(_exact(done.folder))} lines in metrics.jsonl", flush=True)
        outcome = kill_and_compare(launcher, done.folder, draw_moments(options.kills, options.seed))
    print(outcome)
    check(outcome)


if __name__ == "__main__":
    run_rank() if "RANK" in os.environ else main()
