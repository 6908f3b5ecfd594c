"""A few hundred files of broken data; `python tests/faults/fuzz_data.py` reads thousands."""

from __future__ import annotations

from pathlib import Path

from fuzz_data import fuzz


def test_broken_data_ends_with_pairs_or_a_reason_and_nothing_is_lost(tmp_path: Path) -> None:
    tally = fuzz(300, 7, tmp_path)
    assert tally.cases >= 300
    assert tally.kept > 100
    assert len(tally.dropped) > 10
    assert len(tally.errors) == 3
