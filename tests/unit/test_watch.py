"""A rank ends when another died or when nothing moves, and says why before it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from disks import full_pipe

from dpo_scale import watch
from dpo_scale.training import status
from dpo_scale.watch import Watch, died

RANK = """
import os, sys, time
from pathlib import Path
from dpo_scale import watch
from dpo_scale.watch import Watch

def say(message, *, cause):
    print("CAUSE" if cause else "ACCOUNT", message, flush=True)

def wait_for_a_collective_that_never_ends():
    time.sleep(60)

watch.GRACE_SECONDS = 0.5
mine = Watch(Path(sys.argv[1]), int(sys.argv[2]), say)
print("signed on", flush=True)
what = sys.argv[3]
if what == "ends well":
    mine.close()
    os._exit(0)
if what == "outlives it":
    mine.outlive_launcher()
    print("listens", flush=True)
    time.sleep(2.0)
    print("goes on", flush=True)
    os._exit(0)
mine.expect(0.5)
if what != "waits":
    mine.moved("step 7")
if what == "rests":
    mine.rest()
if what == "moves again":
    time.sleep(1.0)
    mine.moved("step 8")
    mine.close()
    os._exit(0)
wait_for_a_collective_that_never_ends()
"""


def start(folder: Path, rank: int, what: str, log: int = subprocess.PIPE) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(folder), str(rank), what],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "signed on\n"
    return process


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Rank 0, which waits."""
    process = start(tmp_path, 0, "waits")
    yield process
    process.kill()
    process.wait()


def test_a_rank_ends_after_another_was_killed_and_names_it(tmp_path: Path, waiting: subprocess.Popen[str]) -> None:
    other = start(tmp_path, 1, "waits")
    other.send_signal(signal.SIGKILL)
    other.wait()  # as the launcher does
    output, stacks = waiting.communicate(timeout=20)
    assert waiting.returncode == 1
    assert output == f"CAUSE {died({1: other.pid})}\n"
    assert f"rank 1 (process {other.pid}) died without a word" in output
    assert "wait_for_a_collective_that_never_ends" in stacks


@pytest.fixture
def hung_log() -> Iterator[int]:
    reader, writer = full_pipe()
    yield writer
    os.close(reader)
    os.close(writer)


def test_a_rank_that_does_not_move_ends_though_its_log_hangs(tmp_path: Path, hung_log: int) -> None:
    process = start(tmp_path, 0, "stalls", log=hung_log)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    account, cause = output.split("CAUSE ")
    assert "in wait_for_a_collective_that_never_ends" in account
    assert cause.startswith("stalled since: step 7")


def test_a_rank_whose_log_hangs_ends_after_another_was_killed(tmp_path: Path, hung_log: int) -> None:
    process, other = start(tmp_path, 0, "waits", log=hung_log), start(tmp_path, 1, "waits")
    other.kill()
    other.wait()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output == f"CAUSE {died({1: other.pid})}\n"


def test_a_rank_ends_though_what_it_says_reaches_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its status lies on a server that hangs; the threads that wait for it hold up nobody."""
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.01)
    monkeypatch.setattr(watch, "WORDS_SECONDS", 0.01)
    over = threading.Event()
    ends: list[int] = []

    def say(message: str, *, cause: bool) -> None:
        over.wait()

    mine = Watch(tmp_path, 0, say, end=ends.append)
    mine.moved("step 7")
    assert mine._moved is not None
    mine._report_stall(*mine._moved)
    mine.close()
    over.set()
    assert ends == [1]


def test_stacks_reach_the_log_where_python_has_no_files_in_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    watch._log_stacks()
    assert "in test_stacks_reach_the_log_where_python_has_no_files_in_memory" in capsys.readouterr().err


def test_a_failure_that_cannot_be_noted_leaves_time_to_say_it() -> None:
    assert watch.LOG_SECONDS + status.PATIENCE_OF_A_RANK_S < watch.WORDS_SECONDS


def test_ranks_know_each_other_though_their_files_were_cleaned_away(tmp_path: Path) -> None:
    mine = Watch(tmp_path, 0, lambda message, *, cause: None, end=lambda code: None)
    killed, ended = start(tmp_path, 1, "waits"), start(tmp_path, 2, "ends well")
    listens = start(tmp_path, 3, "waits")
    assert ended.wait(timeout=20) == 0
    assert mine.gone() == {}
    for file in tmp_path.iterdir():
        file.unlink()
    killed.kill()
    killed.wait()
    assert mine.gone() == {1: killed.pid}
    mine.close()
    listens.kill()
    listens.wait()


def test_a_rank_that_ends_well_takes_nobody_along(tmp_path: Path, waiting: subprocess.Popen[str]) -> None:
    other = start(tmp_path, 1, "ends well")
    assert other.wait(timeout=20) == 0
    time.sleep(2.0)
    assert waiting.poll() is None


def test_a_rank_that_does_not_move_shows_where_it_is_and_ends(tmp_path: Path) -> None:
    process = start(tmp_path, 0, "stalls")
    output, stacks = process.communicate(timeout=20)
    assert process.returncode == 1
    account, cause = output.split("CAUSE ")
    assert account.startswith("ACCOUNT rank 0: nothing has moved for 0.0")
    assert "since: step 7" in account
    assert "in wait_for_a_collective_that_never_ends" in account
    assert cause.startswith("stalled since: step 7")
    assert "Thread 0x" in stacks or "Current thread" in stacks


def test_a_rank_that_moves_again_in_time_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, 0, "moves again")
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "CAUSE" not in output


@pytest.mark.parametrize("meanwhile", ["nothing", "it moves", "it signs off"])
def test_a_rank_ends_only_if_nothing_moved_while_others_gave_their_account(
    meanwhile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.01)
    causes: list[str] = []
    ends: list[int] = []

    def say(message: str, *, cause: bool) -> None:
        if cause:
            causes.append(message)
        elif meanwhile == "it moves":
            mine.moved("step 8")
        elif meanwhile == "it signs off":
            mine.close()

    mine = Watch(tmp_path, 0, say, end=ends.append)
    mine.moved("step 7")
    assert mine._moved is not None
    mine._report_stall(*mine._moved)
    mine.close()
    stalled = meanwhile == "nothing"
    assert ends == [1] * stalled
    assert causes == ["stalled since: step 7; the stack of each rank stands above and in its log"] * stalled


def test_time_in_which_the_process_was_stopped_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a scheduler that suspends the job: a step that is under way goes on where it was."""
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.01)
    now, pauses = [1000.0], iter([0.0, 3600.0])
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    stalled = threading.Event()
    stalled_at: list[float] = []

    def look(*, unnoticed: bool) -> dict[int, int]:
        now[0] += next(pauses, 2.0) if mine._limit else 0.0
        return {}

    def report(since: float, doing: str) -> None:
        stalled_at.append(now[0])
        stalled.set()

    mine = Watch(None, 0, lambda message, *, cause: None)
    monkeypatch.setattr(mine, "_gone", look)
    monkeypatch.setattr(mine, "_report_stall", report)
    mine.moved("step 7")
    mine.expect(60.0)
    assert stalled.wait(60)
    mine.close()
    assert 4660 < stalled_at[0] < 4670


def test_no_progress_is_expected_of_a_rank_that_rests(tmp_path: Path) -> None:
    process = start(tmp_path, 0, "rests")
    time.sleep(2.0)
    assert process.poll() is None
    process.kill()
    assert process.communicate()[0] == ""


def test_a_rank_is_gone_though_its_launcher_has_not_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for one rank to end and does not ask after the others meanwhile. Who fails by itself gives it a second,
    since it knows the signal."""
    monkeypatch.setattr(watch, "GRACE_SECONDS", 0.2)
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    (tmp_path / "1.pid").write_text(str(zombie.pid))
    ended = threading.Event()
    mine = Watch(tmp_path, 0, lambda message, *, cause: None, end=lambda code: ended.set())
    assert mine.gone() == {}
    assert ended.wait(10)
    zombie.wait()
    assert mine.gone() == {1: zombie.pid}
    mine.close()


LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], stdout=subprocess.PIPE, text=True)
for _ in range(2 if sys.argv[-1] == "outlives it" else 1):
    rank.stdout.readline()
subprocess.Popen(["cat"], stdin=rank.stdout)  # the rank speaks on
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("waits", "CAUSE the launcher ended, and this rank with it; the same command starts again\n"),
        ("outlives it", "goes on\n"),
    ],
)
def test_a_rank_outlives_its_launcher_only_where_it_stops_by_itself(what: str, said: str, tmp_path: Path) -> None:
    """Else it would wait an hour for ranks of which some never come, or evaluate for nobody."""
    command = [sys.executable, "-c", LAUNCHER, RANK, str(tmp_path), "0", what]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=30, check=True).stdout == said
