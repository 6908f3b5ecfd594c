"""Two kills of a reference pass; `python tests/faults/reference_kill.py --kills 20` does more of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reference_kill import check, kill_and_compare


@pytest.mark.launch
def test_a_pass_that_is_killed_twice_loses_no_committed_row_and_repeats_none(tmp_path: Path) -> None:
    with open(tmp_path / "pairs.jsonl", "w", encoding="utf-8") as file:
        for number in range(1500):
            answer = {"chosen": " Yes" + ", gladly" * (number % 5), "rejected": " No" + ", never" * (number % 7)}
            file.write(json.dumps({"prompt": f"{number}: may I come in?", **answer}) + "\n")
    outcome = kill_and_compare(tmp_path, tmp_path / "pairs.jsonl", kills=2, seed=1, rank_tokens=250)
    assert outcome.kills == 2
    assert outcome.rows_needed == 3000
    check(outcome)
