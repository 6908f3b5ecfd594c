"""Who speaks, when, and how long things took."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_scale import console as module
from dpo_scale.console import BYTES, Console, StageClock, counted, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds on the clock, to be set by the test."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (59.7, "1 min"),
        (450, "7 min 30 s"),
        (3600, "1 h"),
        (11_520, "3 h 12 min"),
        (190_800, "2 d 5 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("number", "expected"), [(0, "0 steps"), (1, "1 step"), (1.0, "1 step"), (1.54, "1.5 steps"), (2000, "2,000 steps")]
)
def test_a_number_agrees_with_its_unit(number: float, expected: str) -> None:
    assert counted(number, "step") == expected


def test_a_unit_may_have_a_plural_of_its_own() -> None:
    assert counted(1, "batch", "batches") == "1 batch"
    assert counted(3, "batch", "batches") == "3 batches"


def test_time_counts_for_the_innermost_stage_alone(clock: list[float]) -> None:
    stages = StageClock()
    clock[0] += 1
    with stages.stage("training"):
        clock[0] += 10
        with stages.stage("evaluating"):
            clock[0] += 100
        clock[0] += 1000
        with stages.stage("evaluating"):
            clock[0] += 10_000
    clock[0] += 5
    assert stages.seconds == {"Starting": 6, "training": 1010, "evaluating": 10_100}
    assert sum(stages.seconds.values()) == 11_116


def test_a_stage_that_fails_is_timed_and_left(clock: list[float]) -> None:
    console = Console(io.StringIO())

    def load() -> None:
        with console.progress("loading", None):
            clock[0] += 3
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        load()
    clock[0] += 1
    assert console.clock.seconds == {"Starting": 1, "loading": 3}


def test_the_time_left_follows_from_this_attempts_steps_alone(clock: list[float]) -> None:
    with Console(io.StringIO()).progress("Training", 100, "steps", done=80) as bar:
        clock[0] += 60
        bar.advance(10)
        assert bar.line() == "Training: 90 of 100 steps, about 1 min left"


def test_what_cannot_be_known_is_not_said(clock: list[float]) -> None:
    console = Console(io.StringIO())
    with console.progress("Tokenizing", None, "rows") as rows, console.progress("Checking", None) as nothing:
        clock[0] += 30
        rows.advance(1234)
        assert rows.line() == "Tokenizing: 1,234 rows, 30 s so far"
        assert nothing.line() == "Checking: 30 s so far"
    with console.progress("Hashing", 4_000_000_000, BYTES) as bar:
        clock[0] += 20
        bar.advance(1_000_000_000)
        assert bar.line() == "Hashing: 1.0 GB of 4.0 GB, about 1 min left"


def test_plain_lines_end_a_silence_and_only_the_innermost_bar_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.2)
    stream = io.StringIO()
    console = Console(stream)
    with console.progress("outer", 10, "steps"), console.progress("inner", 10, "steps"):
        deadline = time.monotonic() + 20
        while "inner" not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
    lines = stream.getvalue().splitlines()
    assert lines
    assert all(line.startswith("inner: 0 of 10 steps") for line in lines)


def test_short_stages_and_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, other = io.StringIO(), io.StringIO()
    with Console(quick).progress("quick", 1, "steps") as bar:
        bar.advance(1)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.05)
    with Console(other, is_main=False).progress("other", 1, "steps"):
        time.sleep(0.3)
    assert quick.getvalue() == other.getvalue() == ""


def test_bars_inside_bars_share_a_terminal_and_leave_it_clean() -> None:
    terminal = Terminal()
    console = Console(terminal)
    with console.progress("Training", 10, "steps") as outer:
        outer.advance(4)
        with console.progress("Held-out pairs", 3, "micro-batches") as inner:
            inner.advance(1)
            console.say("step 4")
        console.rich.print(outer.line())
    shown = terminal.getvalue()
    assert "step 4\n" in shown
    assert "Held-out pairs" in shown
    assert shown[shown.rindex("\x1b[2K") :] == "\x1b[2K\x1b[?25h\r"  # the bars' lines are wiped, the cursor is back


SPEAKS = """
import os
import sys
from pathlib import Path
from dpo_scale.console import open_closed_streams, route_output
open_closed_streams()
console = route_output(Path(sys.argv[1]), is_main=True)
with console.progress("Training", 2, "steps") as bar:
    for step in range(2):
        bar.advance(1)
        console.say(f"step {step + 1}")
print("a library speaks", flush=True)
os._exit(0)
"""


def _speak(log: Path, **streams: Any) -> None:
    subprocess.run([sys.executable, "-c", SPEAKS, str(log)], check=True, **streams)
    assert log.read_text() == "step 1\nstep 2\na library speaks\n"


def test_a_broken_pipe_ends_no_run(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    _speak(tmp_path / "log", stdout=writer)
    os.close(writer)


def test_a_terminal_that_is_gone_ends_no_run(tmp_path: Path) -> None:
    person, terminal = os.openpty()
    os.close(person)
    _speak(tmp_path / "log", stdout=terminal)
    os.close(terminal)


@pytest.mark.timeout(60)
def test_a_terminal_that_goes_while_a_bar_is_open_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    person, terminal = os.openpty()
    console = Console(module.Voice(terminal))
    log = io.StringIO()
    monkeypatch.setattr(sys, "stdout", log)
    with console.progress("Training", 2, "steps") as bar:
        print("a library speaks")
        os.close(person)
        bar.advance(1)
        console.say("step 1")
    os.close(terminal)
    said = log.getvalue()
    assert said.startswith("a library speaks\n")
    assert "step 1\n" in said


def test_a_full_disk_behind_the_output_ends_no_run(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        _speak(tmp_path / "log", stdout=full)


def test_streams_may_be_closed_from_the_beginning(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(SPEAKS)} {shlex.quote(str(log))} <&- >&- 2>&-"
    subprocess.run(["sh", "-c", command], check=True)
    assert log.read_text() == "a library speaks\n"


def test_a_log_has_the_permissions_that_the_user_asked_for(tmp_path: Path) -> None:
    """A colleague who may write to the run's folder goes on with the run."""
    command = [sys.executable, "-c", SPEAKS, str(tmp_path / "log")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, umask=0o002)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o664
