"""Two kills of a run; `python tests/faults/run_kill.py --kills 30` does more of them, in every phase."""

from __future__ import annotations

from collections import Counter

import pytest
from launching import Launched, Launcher
from run_kill import PHASES, Moment, check, draw_moments, kill_and_compare


@pytest.mark.launch
def test_a_run_that_is_killed_while_it_writes_ends_bitwise_as_the_undisturbed_one(
    launcher: Launcher, undisturbed: Launched
) -> None:
    moments = [Moment("checkpoint", 40, rank=1, seconds=0.0), Moment("export", 15, rank=0, seconds=0.0)]
    outcome = kill_and_compare(launcher, undisturbed.folder, moments)
    assert outcome.kills == Counter(checkpoint=1, export=1)
    check(outcome)


def test_the_long_run_kills_in_every_phase_and_follows_from_its_seed() -> None:
    moments = draw_moments(30, seed=0)
    assert len(moments) == 30
    assert Counter(moment.phase for moment in moments).keys() == PHASES.keys()
    assert [moment.phase for moment in moments[-4:]] == ["export"] * 4
    assert moments == draw_moments(30, seed=0) != draw_moments(30, seed=1)
