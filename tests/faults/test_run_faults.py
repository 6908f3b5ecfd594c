"""One run to which everything happens, and which ends as if nothing had: each launch goes on from the last one."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import Launched, Launcher, kill_all, make_pairs
from run_kill import wrong_lines
from safetensors.torch import load_file

pytestmark = pytest.mark.launch

SCRIPT = str(Path(__file__).with_name("faulty_rank.py"))
SETTINGS = ["checkpoint.every_steps=1", "run.stall_after=0.5", "track.to=[tensorboard]"]


@dataclass(frozen=True)
class Struck:
    """A launch that a fault struck."""

    launched: Launched
    seconds: float
    """From the fault to the end of the launch."""
    committed: str
    """What `latest` says after it."""

    last_step: int
    """The last one that was trained."""

    @property
    def output(self) -> str:
        return self.launched.output

    @property
    def cause(self) -> str:
        """What the launcher repeats at its end."""
        return self.output.partition("Root Cause (first observed failure)")[2]


def struck(launcher: Launcher, fault: str) -> Struck:
    log = launcher.workspace / "fault.log"
    done = launcher("faulty", SETTINGS, stage=SCRIPT, environment={"FAULT": fault, "FAULT_LOG": str(log)})
    seconds = time.time() - float(log.read_text())
    log.unlink()
    committed = (done.folder / "checkpoints" / "latest").read_text().strip()
    return Struck(done, seconds, committed, done.training_lines()[-1]["step"])


@pytest.fixture(scope="module")
def launches(launcher: Launcher, undisturbed: Launched) -> dict[str, Struck]:
    """What happened, in this order."""
    faults = {"raise": "raise 1 7", "kill": "kill 1 7", "terminate": "terminate 0 7", "stall": "stall 1 9"}
    return {name: struck(launcher, fault) for name, fault in faults.items()}


def test_a_rank_that_raises_takes_the_others_down_and_its_words_come_last(launches: dict[str, Struck]) -> None:
    found = launches["raise"]
    assert found.launched.returncode != 0
    assert found.seconds < 15
    assert found.committed == "step-00000006"
    assert "rank 1 failed:" in found.cause
    assert "this forward fails on purpose" in found.cause
    assert "rank 0 failed" not in found.output, found.output
    assert "in happens" in found.cause  # the line that raised


def test_a_rank_that_is_killed_is_named_by_one_that_survives_it(launches: dict[str, Struck]) -> None:
    found = launches["kill"]
    assert found.launched.returncode != 0
    assert found.seconds < 15
    assert found.committed == "step-00000006"
    assert re.search(r"^rank 1 \(process \d+\) died without a word", found.output, re.MULTILINE)
    assert "rank 0 failed" not in found.output, found.output
    assert "SIGKILL" in found.cause


def test_a_preemption_in_mid_step_commits_that_step_and_says_so(launches: dict[str, Struck]) -> None:
    found = launches["terminate"]
    assert found.launched.returncode != 0
    assert found.committed == "step-00000007"
    assert "Stopped by SIGTERM after step 7, which is committed; the same command goes on" in found.output
    assert found.last_step == 7  # the one that was under way, and no other


def test_a_collective_that_stalls_is_reported_with_the_stack_of_each_rank(launches: dict[str, Struck]) -> None:
    found = launches["stall"]
    assert found.launched.returncode != 0
    assert found.committed == "step-00000008"
    accounts = re.split(r"^rank (\d): nothing has moved for", found.output, flags=re.MULTILINE)
    stacks = dict(zip(accounts[1::2], accounts[2::2], strict=True))
    assert set(stacks) == {"0", "1"}
    assert "since: step 9" in stacks["0"]
    assert "in happens" in stacks["1"]
    assert "in happens" not in stacks["0"].partition("stalled since")[0]
    assert "stalled since: step 9" in found.cause


def test_the_run_ends_as_if_nothing_had_happened(
    launcher: Launcher, launches: dict[str, Struck], undisturbed: Launched
) -> None:
    done = launcher("faulty", SETTINGS)
    assert done.returncode == 0, done.output
    assert wrong_lines(undisturbed.folder, done.folder) == []
    expected, actual = (load_file(run.folder / "model" / "model.safetensors") for run in (undisturbed, done))
    assert expected.keys() == actual.keys()
    assert all(actual[name].equal(expected[name]) for name in expected)


def test_a_preemption_while_data_are_tokenized_ends_it_there(launcher: Launcher) -> None:
    """Not after all rows, for which the launcher might not wait."""
    many = make_pairs(launcher.workspace / "many.jsonl", 200_000, seed=5)
    tokens = launcher.workspace / "tokens of many"
    process = launcher.start(
        "tokenizing", [f"data.train=[{many}]", f"data.cache_dir={tokens}", "data.workers=1", "data.evaluate=[]"]
    )
    try:
        while process.poll() is None and not list(tokens.glob(".*/*")):
            time.sleep(0.1)
        process.terminate()
        output, _ = process.communicate(timeout=25)  # after 30 s the launcher kills
    finally:
        kill_all(process.pid)
        many.unlink()
    status = json.loads((launcher.workspace / "tokenizing" / "status.json").read_text())
    assert (status["state"], status["stage"], status["reason"]) == ("stopped", "preparing data", "SIGTERM"), output
    assert "Stopped by SIGTERM before training; the same command goes on from there" in output
    assert [path.name for path in tokens.iterdir() if path.is_dir()] == []


def test_tensorboard_shows_each_step_once(launches: dict[str, Struck]) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = event_accumulator.EventAccumulator(str(launches["stall"].launched.folder / "trackers" / "dpo_scale"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == list(range(1, len(found.Scalars("loss")) + 1))
    assert len(found.Scalars("loss")) >= 8
