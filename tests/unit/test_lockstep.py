"""Failures of some ranks, told by all."""

from __future__ import annotations

import pytest
from fake_engine import on_ranks

from dpo_scale.distributed.lockstep import Ranks, together
from dpo_scale.errors import RecipeError


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ({1: "full"}, "  rank 1: full"),
        ({0: "full", 1: "full", 2: "full"}, "  all ranks: full"),
        ({0: "full", 2: "full"}, "  ranks 0, 2: full"),
        ({0: "full", 1: "read-only", 2: "full"}, "  ranks 0, 2: full\n  rank 1: read-only"),
    ],
)
def test_what_several_ranks_say_is_said_once(failures: dict[int, str], told: str) -> None:
    def work(ranks: Ranks) -> str:
        def act() -> None:
            if ranks.rank in failures:
                raise OSError(failures[ranks.rank])

        with pytest.raises(RecipeError) as caught:
            together(ranks, act, RecipeError)
        return str(caught.value)

    assert on_ranks(3, work) == [told] * 3
