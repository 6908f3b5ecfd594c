"""Every pair once an epoch, the budget kept, ranks in lockstep and balanced, the same steps whatever the ranks."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_scale.data import planning
from dpo_scale.data.planning import (
    ATTENTION_SLOWNESS,
    CostModel,
    Costs,
    Schedule,
    StepPlan,
    check_budget,
    epoch_order,
    layout_costs,
    plan_pass,
    plan_step,
)
from dpo_scale.errors import DataError

LAYOUTS = ("shared", "packed", "padded")
COST = CostModel(per_token=3.0, per_scored_token=2.0, per_attended_position=0.01)

lengths_of_pairs = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=40
)
layouts = st.sampled_from(LAYOUTS)
world_sizes = st.integers(1, 9)
quick = settings(max_examples=60, deadline=None)


def _costs(lengths: list[tuple[int, int, int]], layout: str) -> Costs:
    return layout_costs(np.array(lengths, np.int64), layout, COST)


def _tokens_of(micro_batch: np.ndarray, lengths: list[tuple[int, int, int]], layout: str) -> int:
    """Tokens that a micro-batch occupies, from the definition of the layouts."""
    chosen = [lengths[int(i)] for i in micro_batch]
    if layout == "shared":
        return sum(p + c + r for p, c, r in chosen)
    if layout == "packed":
        return sum(p + c + p + r for p, c, r in chosen)
    return 2 * len(chosen) * max((p + max(c, r) for p, c, r in chosen), default=0)


def _all_pairs(plan: StepPlan) -> list[int]:
    return sorted(int(i) for round_ in plan.micro_batches for part in round_ for i in part)


def _plan(costs: Costs, world_size: int, rank_tokens: int, pairs: np.ndarray | None = None) -> StepPlan:
    pairs = np.arange(len(costs.tokens)) if pairs is None else pairs
    return plan_step(pairs, costs, world_size=world_size, rank_tokens=rank_tokens, step=3)


def _smallest_budget(lengths: list[tuple[int, int, int]], layout: str) -> int:
    return max(_tokens_of(np.array([i]), lengths, layout) for i in range(len(lengths)))


@quick
@given(lengths_of_pairs, layouts, world_sizes, st.floats(1.0, 6.0), st.booleans())
@example([(35, 16, 12), (44, 48, 57), (29, 31, 59)], "shared", 1, 176 / 149, False)  # the lightest has no room
def test_a_plan_holds_every_pair_once_under_the_budget_with_ranks_in_lockstep(
    lengths: list[tuple[int, int, int]], layout: str, world_size: int, slack: float, whole_pass: bool
) -> None:
    budget = int(_smallest_budget(lengths, layout) * slack)
    costs = _costs(lengths, layout)
    plan = (
        plan_pass(costs, world_size=world_size, rank_tokens=budget) if whole_pass else _plan(costs, world_size, budget)
    )
    assert _all_pairs(plan) == list(range(len(lengths)))
    assert plan.num_pairs == len(lengths)
    assert {len(round_) for round_ in plan.micro_batches} == {world_size}
    for round_ in plan.micro_batches:
        assert any(len(part) for part in round_)
        for part in round_:
            assert _tokens_of(part, lengths, layout) <= budget


def _first_fit_decreasing(lengths: list[tuple[int, int, int]], layout: str, budget: int) -> int:
    """Number of bins of the textbook heuristic (Johnson 1973)."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -_tokens_of(np.array([i]), lengths, layout)):
        for bin_ in bins:
            if _tokens_of(np.array([*bin_, item]), lengths, layout) <= budget:
                bin_.append(item)
                break
        else:
            bins.append([item])
    return len(bins)


@quick
@given(lengths_of_pairs, layouts, world_sizes, st.floats(1.0, 6.0))
@example([(46, 3, 53), (59, 18, 22), (4, 30, 54), (30, 35, 54)], "shared", 1, 211.5 / 119)  # balance needs 3
def test_micro_batches_are_never_more_than_first_fit_decreasing_needs(
    lengths: list[tuple[int, int, int]], layout: str, world_size: int, slack: float
) -> None:
    budget = int(_smallest_budget(lengths, layout) * slack)
    bound = math.ceil(_first_fit_decreasing(lengths, layout, budget) / world_size)
    assert len(_plan(_costs(lengths, layout), world_size, budget).micro_batches) <= bound


@quick
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 3), st.integers(1, 3))
def test_every_pair_comes_once_an_epoch(num_pairs: int, global_pairs: int, seed: int, epochs: int) -> None:
    schedule = Schedule(num_pairs, global_pairs, seed, epochs)
    seen: dict[int, list[int]] = {}
    for step in range(schedule.num_steps):
        pairs = schedule.pairs_of(step)
        assert 1 <= len(pairs) <= global_pairs
        seen.setdefault(schedule.epoch_of(step), []).extend(int(i) for i in pairs)
    assert list(seen) == list(range(epochs))
    assert all(sorted(pairs) == list(range(num_pairs)) for pairs in seen.values())


@quick
@given(lengths_of_pairs, st.integers(1, 10), world_sizes, layouts, st.floats(1.0, 6.0))
def test_membership_of_a_step_depends_on_neither_ranks_nor_budget(
    lengths: list[tuple[int, int, int]], global_pairs: int, world_size: int, layout: str, slack: float
) -> None:
    schedule = Schedule(len(lengths), global_pairs, seed=5, epochs=2)
    budget = int(_smallest_budget(lengths, layout) * slack)
    for step in range(schedule.num_steps):
        pairs = schedule.pairs_of(step)
        actual = _all_pairs(_plan(_costs(lengths, layout), world_size, budget, pairs))
        assert actual == sorted(int(i) for i in pairs)


def test_max_steps_ends_a_schedule_early_and_never_prolongs_it() -> None:
    assert Schedule(10, 4, seed=0, epochs=2).num_steps == 6
    assert Schedule(10, 4, seed=0, epochs=2, max_steps=5).num_steps == 5
    assert Schedule(10, 4, seed=0, epochs=2, max_steps=7).num_steps == 6


@quick
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 3), st.integers(1, 12))
def test_the_pairs_that_a_schedule_reaches_are_those_of_its_steps(
    num_pairs: int, global_pairs: int, epochs: int, max_steps: int
) -> None:
    schedule = Schedule(num_pairs, global_pairs, seed=4, epochs=epochs, max_steps=max_steps)
    taken = {int(index) for step in range(schedule.num_steps) for index in schedule.pairs_of(step)}
    assert schedule.pairs_reached().tolist() == sorted(taken)


def _splitmix64_of_one(state: int) -> int:
    """Java's SplittableRandom.mix64 of the state after one increment, in Python's integers."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_order_is_the_same_for_ever() -> None:
    """A resumed run on another machine or library version must find the pairs that it has not seen yet."""
    assert _splitmix64_of_one(1234567) == 6457827717110365317  # the published test vector
    for seed, epoch in ((0, 0), (7, 3)):
        start = _splitmix64_of_one(_splitmix64_of_one(seed) ^ epoch)
        keys = [_splitmix64_of_one((start + index) & (2**64 - 1)) for index in range(50)]
        expected = sorted(range(50), key=lambda index: keys[index])
        assert epoch_order(50, seed, epoch).tolist() == expected
    assert epoch_order(12, 0, 0).tolist() == GOLDEN_SEED_0_EPOCH_0
    assert epoch_order(12, 0, 1).tolist() == GOLDEN_SEED_0_EPOCH_1
    assert epoch_order(12, 1, 0).tolist() == GOLDEN_SEED_1_EPOCH_0


GOLDEN_SEED_0_EPOCH_0 = [4, 8, 0, 1, 7, 6, 11, 2, 10, 5, 3, 9]
GOLDEN_SEED_0_EPOCH_1 = [4, 11, 10, 0, 1, 8, 5, 7, 9, 3, 2, 6]
GOLDEN_SEED_1_EPOCH_0 = [3, 5, 2, 4, 10, 1, 9, 0, 6, 11, 8, 7]


def test_the_order_differs_between_epochs_and_seeds() -> None:
    orders = {tuple(epoch_order(100, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def _real_like_lengths(num_pairs: int, seed: int = 0) -> np.ndarray:
    """Prompts and completions with a long tail, as chat data has: medians of 120 and 200 tokens, at most 1,500."""
    rng = np.random.default_rng(seed)
    medians = np.array([120, 200, 200])
    return np.clip(medians * rng.lognormal(0, 0.8, (num_pairs, 3)), 2, 1500).astype(np.int64)


@pytest.mark.parametrize(("global_pairs", "most_over_mean"), [(64, 1.10), (128, 1.05), (512, 1.02)])
def test_eight_ranks_get_similar_work(global_pairs: int, most_over_mean: float) -> None:
    lengths = _real_like_lengths(global_pairs)
    cost = CostModel(per_token=6.5e9, per_scored_token=5e8, per_attended_position=2.6e5)  # of a 7B model
    costs = layout_costs(lengths, "shared", cost)
    plan = plan_step(np.arange(global_pairs), costs, world_size=8, rank_tokens=16384, step=0)
    work = np.array([[costs.work[part].sum() for part in round_] for round_ in plan.micro_batches])
    ratio = work.sum(0).max() / work.sum(0).mean()
    waited = work.max(1).sum() / work.mean(1).sum()  # ranks wait for each other in every micro-batch
    print(f"{global_pairs} pairs: heaviest rank {ratio:.3f} of the mean, with waiting {waited:.3f}")
    assert ratio < most_over_mean
    assert waited < most_over_mean


def test_costs_of_many_items_are_worked_out_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = _real_like_lengths(1000)
    cost = CostModel(per_token=3.0, per_scored_token=2.0, per_attended_position=0.5)
    whole = [layout_costs(lengths, layout, cost) for layout in LAYOUTS]
    monkeypatch.setattr(planning, "ITEMS_AT_ONCE", 300)
    for layout, expected in zip(LAYOUTS, whole, strict=True):
        costs = layout_costs(lengths, layout, cost)
        np.testing.assert_array_equal(costs.tokens, expected.tokens)
        np.testing.assert_array_equal(costs.work, expected.work)


def test_what_balance_leaves_no_room_for_is_packed_to_the_last_token() -> None:
    costs = Costs(tokens=np.array([6, 4, 5, 5]), work=np.array([1.0, 1.0, 10.0, 10.0]))
    plan = _plan(costs, world_size=1, rank_tokens=10)
    assert sorted(part.tolist() for (part,) in plan.micro_batches) == [[0, 1], [2, 3]]


def test_a_micro_batch_without_room_for_one_pair_takes_a_smaller_one() -> None:
    costs = Costs(tokens=np.array([2, 8, 7, 2]), work=np.array([10.0, 8.0, 3.0, 1.0]))
    plan = _plan(costs, world_size=1, rank_tokens=10)
    assert sorted(part.tolist() for (part,) in plan.micro_batches) == [[0, 2], [1, 3]]


def test_the_heavier_of_two_micro_batches_goes_to_the_rank_that_is_behind() -> None:
    costs = Costs(tokens=np.array([9, 9, 9, 9]), work=np.array([10.0, 6.0, 4.0, 1.0]))
    plan = _plan(costs, world_size=2, rank_tokens=9)
    totals = [sum(costs.work[part].sum() for part in ranks) for ranks in zip(*plan.micro_batches, strict=True)]
    assert totals == [11.0, 10.0]


def test_costs_are_those_of_the_layouts() -> None:
    lengths = np.array([[10, 4, 6], [3, 5, 0], [5, 1, 1]])
    cost = CostModel(per_token=1.0, per_scored_token=100.0, per_attended_position=10000.0)
    shared, packed, padded = (layout_costs(lengths, layout, cost) for layout in LAYOUTS)
    assert shared.tokens.tolist() == [20, 8, 7]
    assert packed.tokens.tolist() == [30, 8, 12]
    assert padded.tokens.tolist() == [16, 8, 6]
    assert (shared.padded_rows, packed.padded_rows, padded.padded_rows) == (0, 0, 2)
    # prompt^2/2 + prompt*completion + completion^2/2 for each completion
    assert shared.work[0] == 20 + 1000 + 10000 * (50 + 40 + 8 + 60 + 18)
    assert packed.work[0] == 30 + 1000 + 10000 * (14**2 / 2 + 16**2 / 2)


def test_a_pair_over_the_budget_is_named_with_what_to_do() -> None:
    lengths = [(10, 5, 5), (100, 50, 60), (90, 50, 60), (1, 1, 1)]
    rows = ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    check_budget(_costs(lengths, "shared"), 210, rows, "batch.rank_tokens")
    with pytest.raises(DataError) as caught:
        check_budget(_costs(lengths, "shared"), 199, rows, "batch.rank_tokens")
    assert str(caught.value) == (
        "a.jsonl:2: this pair takes 210 tokens and batch.rank_tokens is 199 (2 such pairs); "
        "raise batch.rank_tokens to 210, or lower data.max_length"
    )
    with pytest.raises(DataError, match="this pair takes 320 tokens"):
        check_budget(_costs(lengths, "padded"), 319, rows, "batch.rank_tokens")


def test_planning_a_pair_that_fits_nowhere_fails_instead_of_searching_for_ever() -> None:
    with pytest.raises(AssertionError, match="over the budget"):
        _plan(_costs([(100, 50, 60)], "shared"), world_size=2, rank_tokens=209)


def test_a_pass_over_many_items_is_planned_in_seconds() -> None:
    lengths = _real_like_lengths(300_000)
    costs = layout_costs(lengths, "shared", COST)
    started = time.perf_counter()
    plan = plan_pass(costs, world_size=32, rank_tokens=65536)
    print(f"300,000 items planned in {time.perf_counter() - started:.1f} s")
    together = np.concatenate([part for round_ in plan.micro_batches for part in round_])
    assert np.array_equal(np.sort(together), np.arange(300_000))
    work = np.array([sum(costs.work[part].sum() for part in ranks) for ranks in zip(*plan.micro_batches, strict=True)])
    assert work.max() / work.mean() < 1.02


def test_a_pass_begins_with_its_largest_micro_batch() -> None:
    """So that a budget too large for the memory shows at once."""
    costs = layout_costs(_real_like_lengths(2000), "shared", COST)
    plan = plan_pass(costs, world_size=4, rank_tokens=8192)
    work = [sum(costs.work[part].sum() for part in round_) for round_ in plan.micro_batches]
    assert work == sorted(work, reverse=True)


def test_a_pass_fills_its_micro_batches_to_the_last_token() -> None:
    costs = Costs(tokens=np.array([4, 4, 4]), work=np.array([3.0, 2.0, 1.0]))
    plan = plan_pass(costs, world_size=1, rank_tokens=8)
    assert [[part.tolist() for part in round_] for round_ in plan.micro_batches] == [[[0, 1]], [[2]]]


def test_a_pass_over_nothing_has_no_micro_batches() -> None:
    assert plan_pass(_costs([(1, 1, 1)], "shared"), world_size=2, rank_tokens=9).num_pairs == 1
    nothing = Costs(np.zeros(0, np.int64), np.zeros(0))
    assert plan_pass(nothing, world_size=2, rank_tokens=9).micro_batches == ()


def test_a_long_pair_is_planned_by_the_time_its_attention_takes() -> None:
    """The rank that has it gets fewer others than multiply-accumulates alone would give it."""
    lengths = np.array([[900, 400, 400], *[[90, 40, 40]] * 31])
    cost = CostModel(1.0, 0.0, 1e-3)
    by_macs, by_time = (layout_costs(lengths, "shared", each) for each in (cost, cost.in_time()))
    attention = by_macs.work - layout_costs(lengths, "shared", CostModel(1.0)).work
    assert np.allclose(by_time.work, by_macs.work + (ATTENTION_SLOWNESS - 1) * attention)

    def pairs_beside_the_long_one(costs: Costs) -> int:
        plan = plan_step(np.arange(32), costs, world_size=2, rank_tokens=16384, step=0)
        return next(len(indices) for indices in plan.micro_batches[0] if 0 in indices) - 1

    assert pairs_beside_the_long_one(by_time) < pairs_beside_the_long_one(by_macs)
