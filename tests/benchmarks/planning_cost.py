"""What grows with the number of pairs: python planning_cost.py PAIRS, one JSON line."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from measuring import memory_mib, peak_memory_mib

from dpo_scale.data.planning import CostModel, epoch_order, layout_costs, plan_pass, plan_step
from dpo_scale.data.report import describe
from dpo_scale.data.token_pairs import TokenPairs
from dpo_scale.data.token_store import RowPlaces
from dpo_scale.reference.scoring import ReferenceRows

COST = CostModel(per_token=4.3e6, per_scored_token=2e6, per_attended_position=3e3)
RANKS, RANK_TOKENS, STEP_PAIRS, STEPS = 64, 16384, 512, 20
MEAN_TOKENS = (120, 45, 45)


def main(count: int) -> None:
    """Pairs of the lengths of short dialogues, steps of 512 pairs over 64 ranks."""
    baseline = memory_mib()
    random = np.random.default_rng(0)
    lengths = random.poisson(MEAN_TOKENS, (count, 3)).astype(np.int64) + 1
    tokens = random.integers(0, 8000, int(lengths.sum()), dtype=np.int32)
    places = RowPlaces(["file.jsonl"], np.zeros(count, np.int32), np.arange(1, count + 1))
    pairs = TokenPairs(tokens, lengths, places)
    store = memory_mib()
    figures: dict[str, float] = {"pairs": count}

    started = time.perf_counter()
    describe(pairs, ())
    figures["data report"] = time.perf_counter() - started
    started = time.perf_counter()
    ReferenceRows.of_pairs(pairs)
    figures["reference keys"] = time.perf_counter() - started
    started = time.perf_counter()
    costs = layout_costs(lengths, "shared", COST)
    order = epoch_order(count, 0, 0)
    figures["epoch order"] = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(STEPS):
        members = order[step * STEP_PAIRS : (step + 1) * STEP_PAIRS]
        if len(members):
            plan_step(members, costs, world_size=RANKS, rank_tokens=RANK_TOKENS, step=step)
    figures["plan of a step"] = (time.perf_counter() - started) / min(STEPS, -(-count // STEP_PAIRS))
    started = time.perf_counter()
    plan_pass(costs, world_size=RANKS, rank_tokens=RANK_TOKENS)
    figures["plan of a pass"] = time.perf_counter() - started
    figures["pairs MiB"] = store - baseline
    figures["peak MiB"] = peak_memory_mib()
    print(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]))
