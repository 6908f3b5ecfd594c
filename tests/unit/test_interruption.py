"""The first signal is noted, the second ends the process at once; a file and a clock stop a run too."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo_scale.errors import DataError, UserError
from dpo_scale.training import interruption
from dpo_scale.training.interruption import (
    SIGNALS,
    Interruption,
    StopRequestedError,
    StopTime,
    agree,
    heed,
    reason_of_any,
    unless_stopped,
)

WORKER = """
import hashlib, sys, time
from pathlib import Path
from dpo_scale.training.interruption import Interruption

interruption = Interruption(Path(sys.argv[1]), None, time.monotonic())
print("ready", flush=True)
while not interruption.reason():
    time.sleep(0.01)
print(interruption.reason(), flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # below Python, as in a collective: no handler of Python's runs
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()


def test_the_first_signal_is_noted_and_the_second_ends_the_process_at_once(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None
    worker.send_signal(signal.SIGUSR1)
    assert worker.stdout.readline() == "SIGUSR1\n"
    assert worker.poll() is None
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=20) == 128 + signal.SIGTERM


def test_the_launchers_copy_of_a_signal_is_not_a_second_one(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None
    worker.send_signal(signal.SIGTERM)
    assert worker.stdout.readline() == "SIGTERM\n"
    worker.send_signal(signal.SIGTERM)
    time.sleep(interruption.ECHO_SECONDS + 0.5)
    assert worker.poll() is None
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=20) == 128 + signal.SIGTERM


@pytest.fixture
def old_handlers() -> Iterator[None]:
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before:
        signal.signal(number, handler)


def reason_soon(stopping: Interruption) -> str:
    """The reason, once the thread that hears signals has had its turn."""
    for _ in range(500):
        if stopping.reason():
            break
        time.sleep(0.01)
    return stopping.reason()


@pytest.mark.usefixtures("old_handlers")
@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_gives_its_name_as_the_reason(number: signal.Signals, tmp_path: Path) -> None:
    stopping = Interruption(tmp_path, None, time.monotonic())
    assert stopping.reason() == ""
    signal.raise_signal(number)
    assert reason_soon(stopping) == number.name


@pytest.mark.usefixtures("old_handlers")
def test_the_stop_file_stops_once(tmp_path: Path) -> None:
    stopping = Interruption(tmp_path, None, time.monotonic())
    stopping.consume_file()  # nothing there: nothing happens
    (tmp_path / "STOP").touch()
    assert stopping.reason() == "the STOP file"
    stopping.consume_file()
    assert stopping.reason() == ""


@pytest.mark.usefixtures("old_handlers")
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_file_server_that_is_away_for_a_moment_ends_no_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = Interruption(tmp_path, None, time.monotonic())
    look = os.stat

    def fail(path: Any, **options: Any) -> os.stat_result:
        if Path(path).name == "STOP":
            raise OSError(number, os.strerror(number), str(path))
        return look(path, **options)

    with monkeypatch.context() as away:
        away.setattr(os, "stat", fail)
        assert stopping.reason() == ""
    (tmp_path / "STOP").touch()
    assert stopping.reason() == "the STOP file"


@pytest.mark.usefixtures("old_handlers")
def test_the_clock_stops_after_the_recipes_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    monkeypatch.setattr(interruption.time, "monotonic", lambda: start)
    stopping = Interruption(tmp_path, 2.0, start)
    monkeypatch.setattr(interruption.time, "monotonic", lambda: start + 119)
    assert stopping.reason() == ""
    assert stopping.reason(needed_seconds=2.0) == "run.stop_after"  # what comes next would end too late
    monkeypatch.setattr(interruption.time, "monotonic", lambda: start + 119.5)
    assert stopping.reason() == "run.stop_after"  # and it is why, however soon the run is there
    fresh = Interruption(tmp_path, 2.0, start)
    monkeypatch.setattr(interruption.time, "monotonic", lambda: start + 121)
    assert fresh.reason() == "run.stop_after"


@pytest.mark.usefixtures("old_handlers")
def test_a_launcher_that_is_gone_stops_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopping = Interruption(tmp_path, None, time.monotonic())
    monkeypatch.setattr(interruption.os, "getppid", lambda: -1)
    assert stopping.reason() == "the end of its launcher"


@pytest.mark.usefixtures("old_handlers")
def test_all_ranks_stop_in_mid_pass_where_one_was_asked_to(tmp_path: Path) -> None:
    stopping = Interruption(tmp_path, None, time.monotonic())
    heed(stopping, OneOfTwo(is_main=False, others=[0, 0]))
    with pytest.raises(StopRequestedError):
        heed(stopping, OneOfTwo(is_main=False, others=[1, 0]))
    (tmp_path / "STOP").touch()
    with pytest.raises(StopRequestedError):
        heed(stopping, OneOfTwo(is_main=False, others=[0, 0]))


@pytest.mark.usefixtures("old_handlers")
def test_data_that_fail_after_a_request_to_stop_are_no_mistake(tmp_path: Path) -> None:
    def fail(between_parts: object) -> None:
        raise DataError("a process that tokenizes was killed")

    stopping = Interruption(tmp_path, None, time.monotonic())
    assert unless_stopped(lambda between_parts: 7, stopping, OneOfTwo(is_main=True, others=[0, 0])) == 7
    with pytest.raises(UserError, match="was killed"):
        unless_stopped(fail, stopping, OneOfTwo(is_main=True, others=[0, 0]))
    with pytest.raises(StopRequestedError):
        unless_stopped(fail, stopping, OneOfTwo(is_main=True, others=[1, 0]))


@pytest.mark.usefixtures("old_handlers")
def test_work_on_data_ends_with_the_part_in_which_a_stop_was_asked_for(tmp_path: Path) -> None:
    parts: list[int] = []

    def work(between_parts: Callable[[], None]) -> None:
        for part in range(3):
            parts.append(part)
            if part == 1:
                (tmp_path / "STOP").touch()
            between_parts()

    with pytest.raises(StopRequestedError):
        unless_stopped(work, Interruption(tmp_path, None, time.monotonic()), OneOfTwo(is_main=True, others=[0, 0]))
    assert parts == [0, 1]


@pytest.mark.usefixtures("old_handlers")
def test_every_rank_knows_why_the_other_stops(tmp_path: Path) -> None:
    stopping = Interruption(tmp_path, None, time.monotonic())
    assert reason_of_any(stopping, OneOfTwo(is_main=True, others=[0, 0], reason="SIGTERM")) == "SIGTERM"
    (tmp_path / "STOP").touch()
    assert reason_of_any(stopping, OneOfTwo(is_main=True, others=[0, 0], reason="")) == "the STOP file"


def test_a_stop_takes_the_longest_step_and_the_last_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    needed = StopTime()
    for seconds in (12.0, 3.0, 12.0):
        needed.step_took(seconds)
    for seconds in (40.0, 10.0):
        needed.commit_took(seconds)
    assert needed.seconds == 22.0
    assert needed.warning() == ""
    needed.commit_took(20.0)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "33")
    assert needed.warning() == ""
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    assert "leaves 30 s, and a step with its commit takes 32 s" in needed.warning()
    assert needed.warning() == ""  # said once


def test_one_step_that_was_held_up_shortens_no_run_for_long_and_changes_no_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    needed = StopTime()
    needed.commit_took(1.0)
    needed.step_took(2.0)
    needed.step_took(3600.0)
    assert needed.seconds == 3601.0  # it may be the first of its kind
    assert needed.warning() == ""
    for _ in range(interruption.STEPS_OF_LATE):
        needed.step_took(2.0)
    assert needed.seconds == 3.0
    for seconds in (50.0, 40.0):
        needed.step_took(seconds)
    assert "a step with its commit takes 41 s" in needed.warning()


def test_a_commit_is_due_so_many_minutes_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(interruption.time, "monotonic", lambda: now[0])
    clock = StopTime()
    now[0] += 121
    assert clock.is_commit_due(2.0)
    assert not clock.is_commit_due(None)
    clock.commit_took(1.0)
    assert not clock.is_commit_due(2.0)


@dataclass
class OneOfTwo:
    """A rank whose neighbour has its own wishes."""

    is_main: bool
    others: list[int]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    reason: str = ""

    def max(self, values: Tensor) -> Tensor:
        return torch.maximum(values, torch.tensor(self.others, dtype=values.dtype))

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, self.reason]


def test_any_rank_may_stop_and_only_the_main_one_asks_for_a_checkpoint() -> None:
    assert agree(OneOfTwo(is_main=False, others=[0, 0]), stop=True, commit=False) == (True, False)
    assert agree(OneOfTwo(is_main=False, others=[1, 0]), stop=False, commit=False) == (True, False)
    assert agree(OneOfTwo(is_main=False, others=[0, 0]), stop=False, commit=True) == (False, False)
    assert agree(OneOfTwo(is_main=True, others=[0, 0]), stop=False, commit=True) == (False, True)
    assert agree(OneOfTwo(is_main=False, others=[0, 1]), stop=False, commit=False) == (False, True)
