"""Planning and storing of a scoring pass, with ranks that are threads and a model that is arithmetic."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from fake_engine import ThreadRanks, on_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_scale.console import Console
from dpo_scale.data.layouts import Layout, MicroBatch
from dpo_scale.data.planning import CostModel
from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.errors import DataError
from dpo_scale.reference import cache, scoring
from dpo_scale.reference.cache import NonFiniteLogProbsError, ReferenceStore, part_paths
from dpo_scale.reference.fingerprint import ReferenceFingerprint
from dpo_scale.reference.scoring import FreshRows, Presence, ReferenceRows, ScoringPlan, group_rows, plan_scoring, score

T = TypeVar("T")

FINGERPRINT = ReferenceFingerprint(scoring_version=1, dtype="float32", weights={"model.safetensors": "0"}, config={})
BAD_TOKEN = 99


def pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], row: str = "f:1") -> TokenPair:
    arrays = (np.array(tokens, np.int32) for tokens in (prompt, chosen, rejected))
    return TokenPair(*arrays, row=row)


def some_pairs(count: int, seed: int = 0) -> TokenPairs:
    """Few prompts and completions, so that both recur, in pairs and across them."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, 50, n) for n in (3, 9, 4)]
    completions = [rng.integers(1, 50, n) for n in (1, 2, 5, 7)]
    pick = rng.integers
    return TokenPairs.from_pairs(
        pair(prompts[pick(3)], completions[pick(4)], completions[pick(4)], f"f.jsonl:{n + 1}") for n in range(count)
    )


def on_machines(machines: Sequence[int], action: Callable[[ThreadRanks], T]) -> list[T]:
    """What an action returns on each rank, `machines[rank]` naming its machine; errors are raised here."""
    found = on_ranks(len(machines), action, machines)
    errors = [outcome for outcome in found if isinstance(outcome, Exception)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return found


def expected_row(prompt: np.ndarray, completion: np.ndarray) -> np.ndarray:
    """What the model below gives: a number of the token, the one before it, and its position."""
    tokens = np.concatenate([prompt, completion]).astype(np.float32)
    positions = np.arange(len(prompt), len(tokens), dtype=np.float32)
    return -(tokens[len(prompt) :] + tokens[len(prompt) - 1 : -1] / 8 + positions / 64)


class Model:
    """A scorer made of arithmetic on tokens and positions, that counts what it is given."""

    def __init__(self) -> None:
        self.sequences = 0
        self.batches = 0
        self.largest_batch = 0
        self.tokens = 0

    def __call__(self, batch: MicroBatch) -> torch.Tensor:
        self.sequences += len(batch.lengths)
        self.batches += 1
        self.largest_batch = max(self.largest_batch, batch.input_ids.numel())
        self.tokens += batch.input_ids.numel()
        inputs = batch.input_ids.flatten()[batch.predictors].float()
        positions = batch.position_ids.flatten()[batch.predictors].float() + 1
        values = -(batch.targets.float() + inputs / 8 + positions / 64)
        return torch.where(batch.targets == BAD_TOKEN, torch.nan, values)


def run_pass(
    pairs: TokenPairs,
    store: ReferenceStore,
    ranks: Any,
    *,
    layout: Layout = "shared",
    rank_tokens: int = 40,
    settle: bool = True,
) -> tuple[Model, FreshRows, ScoringPlan]:
    """Score whatever no rank has, as a run does."""
    needed, model, fresh = ReferenceRows.of_pairs(pairs), Model(), FreshRows(store, ranks)
    indices = np.arange(len(pairs))
    keys = needed.of(indices)
    presence = Presence.agreed(store.contains(keys), ranks)
    plan = plan_scoring(needed, indices, presence.missing, layout=layout, rank_tokens=rank_tokens, cost=CostModel())
    console = Console(open("/dev/null", "w"), is_main=False)  # noqa: SIM115
    if plan.micro_batches:
        score(plan, model, fresh, ranks, console, layout=layout, pad_id=0)
    fresh.share(keys)
    if settle:
        fresh.settle()
    return model, fresh, plan


def assert_holds_all(store: ReferenceStore, pairs: TokenPairs) -> None:
    needed = ReferenceRows.of_pairs(pairs)
    actual = store.lookup(needed.of(np.arange(len(pairs))))
    for number, item in enumerate(pairs):
        np.testing.assert_array_equal(actual[2 * number], expected_row(item.prompt, item.chosen))
        np.testing.assert_array_equal(actual[2 * number + 1], expected_row(item.prompt, item.rejected))


def distinct_rows(pairs: TokenPairs) -> int:
    rows = {(p.prompt.tobytes(), c.tobytes()) for p in pairs for c in (p.chosen, p.rejected)}
    return len(rows)


def rows_stored(store: ReferenceStore) -> int:
    """Rows in the files of a store, repeated ones counted as often as they are there."""
    from dpo_scale.reference.commands import summarize

    return summarize(store.folder).rows


@given(
    count=st.integers(1, 40),
    seed=st.integers(0, 9),
    layout=st.sampled_from(["shared", "packed", "padded"]),
    rank_tokens=st.integers(20, 90),
)
@settings(max_examples=40, deadline=None)
def test_a_plan_takes_each_missing_row_once_and_keeps_to_the_budget(
    count: int, seed: int, layout: Layout, rank_tokens: int
) -> None:
    pairs = some_pairs(count, seed)
    needed = ReferenceRows.of_pairs(pairs)
    indices = np.random.default_rng(seed).permutation(count)[: max(1, count - 3)]
    missing = np.random.default_rng(seed + 1).random(2 * len(indices)) < 0.7
    plan = plan_scoring(needed, indices, missing, layout=layout, rank_tokens=rank_tokens, cost=CostModel())
    wanted = {(int(i), side) for n, i in enumerate(indices) for side in (0, 1) if missing[2 * n + side]}
    expected = {(pairs[i].prompt.tobytes(), (pairs[i].chosen, pairs[i].rejected)[s].tobytes()) for i, s in wanted}
    actual = []
    groups, tokens = plan.groups, plan.costs.tokens
    for group in np.concatenate([[], *plan.micro_batches]).astype(int):
        item = groups.completions(group)
        actual += [(item.prompt.tobytes(), completion.tobytes()) for completion in item.completions]
        assert groups.lengths()[group].sum() <= max(rank_tokens, len(item.prompt) + len(item.completions[0]))
        assert len(item.completions) == len(groups.keys(group)) == len(groups.names(group))
        assert layout == "shared" or len(item.completions) == 1
    assert len(actual) == len(set(actual)) == plan.num_rows
    assert set(actual) == expected
    for batch in plan.micro_batches if layout != "padded" else []:
        assert tokens[batch].sum() <= rank_tokens


def rows_of(plan: ScoringPlan) -> list[list[int]]:
    """The rows of each micro-batch, in its order."""
    groups = plan.groups
    spans = [[groups.rows[groups.starts[group] : groups.starts[group + 1]] for group in b] for b in plan.micro_batches]
    return [np.concatenate(span).tolist() for span in spans]


@given(done=st.sets(st.integers(0, 7), max_size=6), layout=st.sampled_from(["shared", "packed", "padded"]))
@settings(max_examples=30, deadline=None)
def test_an_interrupted_pass_goes_on_with_the_micro_batches_that_it_had(done: set[int], layout: Layout) -> None:
    """Products of other shapes round otherwise, and a run would not end with the same weights."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 50, n) for n in rng.integers(2, 30, 12)]
    pairs = TokenPairs.from_pairs(
        pair(prompts[n % 12], rng.integers(1, 50, 3 + n % 5), rng.integers(1, 50, 2 + n % 9)) for n in range(30)
    )
    needed, indices = ReferenceRows.of_pairs(pairs), rng.permutation(30)

    def batches(missing: np.ndarray) -> list[list[int]]:
        return rows_of(plan_scoring(needed, indices, missing, layout=layout, rank_tokens=60, cost=CostModel()))

    rows = (2 * indices[:, None] + [0, 1]).ravel()
    whole = batches(np.ones(60, np.bool_))
    assert len(whole) >= 8
    scored = [row for n in done for row in whole[n]]
    assert batches(~np.isin(rows, scored)) == [batch for n, batch in enumerate(whole) if n not in done]
    one_more = next(n for n in range(len(whole)) if n not in done and len(whole[n]) > 1)
    rest = batches(~np.isin(rows, [*scored, whole[one_more][0]]))
    assert rest[:-1] == [batch for n, batch in enumerate(whole) if n not in {*done, one_more}]
    assert sorted(rest[-1]) == sorted(whole[one_more][1:])


def test_completions_of_one_prompt_are_scored_together_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MOST_COMPLETIONS_OF_A_PROMPT", 4)
    pairs = TokenPairs.from_pairs(pair([1, 2, 3], [10 + n], [30 + n, 5]) for n in range(5))
    groups = group_rows(ReferenceRows.of_pairs(pairs), np.arange(10), layout="shared", rank_tokens=1000)
    assert np.diff(groups.starts).tolist() == [4, 4, 2]
    np.testing.assert_array_equal(groups.lengths(), [[3, 1, 2, 1, 2], [3, 1, 2, 1, 2], [3, 1, 2, 0, 0]])


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_a_pass_stores_the_models_values(tmp_path: Path, layout: Layout) -> None:
    pairs = some_pairs(30)
    model, _, _ = run_pass(pairs, ReferenceStore.open(tmp_path, FINGERPRINT), OneProcess(), layout=layout)
    assert model.sequences == distinct_rows(pairs) < 60
    assert model.largest_batch <= 40
    reopened = ReferenceStore.open(tmp_path, FINGERPRINT)
    assert_holds_all(reopened, pairs)
    assert len(part_paths(reopened.folder)) == 1


def test_a_second_pass_over_more_pairs_scores_the_new_rows_alone(tmp_path: Path) -> None:
    pairs = some_pairs(30)
    run_pass(pairs[:20], ReferenceStore.open(tmp_path, FINGERPRINT), OneProcess())
    more = TokenPairs.from_pairs([*pairs, *some_pairs(20, seed=5)])
    model, _, _ = run_pass(more, ReferenceStore.open(tmp_path, FINGERPRINT), OneProcess())
    assert model.sequences == distinct_rows(more) - distinct_rows(pairs[:20])


@pytest.mark.parametrize(
    ("machines", "disks"),
    [
        ([0, 0, 0], ["all"] * 3),
        ([0, 1, 2], ["a", "b", "c"]),
        ([0, 0, 1], ["a", "a", "b"]),
        ([0, 1, 2], ["shared", "shared", "own"]),
    ],
    ids=["one disk", "a disk each", "two machines", "two of three machines share"],
)
def test_every_disk_gets_every_row_and_none_is_scored_twice(
    tmp_path: Path, machines: list[int], disks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "ROWS_IN_AN_EXCHANGE", 5)
    pairs = some_pairs(25)
    found = on_machines(
        machines, lambda ranks: run_pass(pairs, ReferenceStore.open(tmp_path / disks[ranks.rank], FINGERPRINT), ranks)
    )
    assert len({model.batches for model, _, _ in found}) == 1, "all ranks run as many forwards"
    for disk in set(disks):
        store = ReferenceStore.open(tmp_path / disk, FINGERPRINT)
        assert_holds_all(store, pairs)
        assert rows_stored(store) == distinct_rows(pairs), "a row is stored twice"


def test_a_rank_without_work_computes_the_least_there_is(tmp_path: Path) -> None:
    pairs = TokenPairs.from_pairs(pair([1] * length, [2, 3], [4]) for length in (30, 20, 5))

    def tokens(ranks: ThreadRanks) -> int:
        store = ReferenceStore.open(tmp_path, FINGERPRINT)
        return run_pass(pairs, store, ranks, rank_tokens=33)[0].tokens  # room for the first, and for the others

    assert sorted(on_machines([0, 0, 0, 0], tokens)) == [6, 6, 21 + 6, 31]


def test_what_one_disk_has_is_sent_and_not_scored_again(tmp_path: Path) -> None:
    pairs = some_pairs(25)
    run_pass(pairs[:15], ReferenceStore.open(tmp_path / "1", FINGERPRINT), OneProcess())

    def scored(ranks: ThreadRanks) -> int:
        return run_pass(pairs, ReferenceStore.open(tmp_path / str(ranks.rank), FINGERPRINT), ranks)[2].num_rows

    expected = distinct_rows(pairs) - distinct_rows(pairs[:15])
    assert on_machines([0, 1], scored) == [expected, expected]
    assert_holds_all(ReferenceStore.open(tmp_path / "0", FINGERPRINT), pairs)


def test_rows_are_readable_on_all_ranks_before_they_are_written(tmp_path: Path) -> None:
    pairs = some_pairs(12)

    def read_then_settle(ranks: ThreadRanks) -> tuple[int, int]:
        store = ReferenceStore.open(tmp_path, FINGERPRINT)
        _, fresh, _ = run_pass(pairs, store, ranks, settle=False)
        assert_holds_all(store, pairs)
        before = len(part_paths(store.folder))
        ranks.barrier()
        fresh.settle()
        assert_holds_all(store, pairs)
        return before, len(store.held)

    assert on_machines([0, 0], read_then_settle) == [(0, 0), (0, 0)]
    assert rows_stored(ReferenceStore.open(tmp_path, FINGERPRINT)) == distinct_rows(pairs)


def test_a_long_pass_commits_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no time between commits, each micro-batch is a part, and a failure loses none before it."""
    monkeypatch.setattr(scoring, "SECONDS_BETWEEN_COMMITS", -1.0)
    pairs = some_pairs(30)
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    model, _, _ = run_pass(pairs, store, OneProcess(), rank_tokens=20, settle=False)
    assert len(part_paths(store.folder)) == model.batches > 2
    assert len(store.held) == 0


def test_a_pass_leaves_one_part_of_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each micro-batch is a part, and merged with those before now and then, and with the last ones in the end."""
    monkeypatch.setattr(scoring, "SECONDS_BETWEEN_COMMITS", -1.0)
    monkeypatch.setattr(scoring, "PARTS_BEFORE_A_MERGE", 3)
    pairs = TokenPairs.from_pairs(pair([n], [n, 1], [n, 2]) for n in range(3, 93))
    part, opened = cache.Part, []
    monkeypatch.setattr(cache, "Part", lambda path, key: opened.append(path) or part(path, key))

    def most_parts(ranks: ThreadRanks) -> int:
        store = ReferenceStore.open(tmp_path, FINGERPRINT)
        needed, model, fresh, counts = ReferenceRows.of_pairs(pairs), Model(), FreshRows(store, ranks), [0]
        missing = np.ones(180, np.bool_)
        plan = plan_scoring(needed, np.arange(90), missing, layout="shared", rank_tokens=20, cost=CostModel())
        console = Console(open("/dev/null", "w"), is_main=False)  # noqa: SIM115
        count = lambda: counts.append(len(part_paths(store.folder)))  # noqa: E731
        score(plan, model, fresh, ranks, console, layout="shared", pad_id=0, between_batches=count)
        assert model.batches > 8
        fresh.settle()
        assert_holds_all(store, pairs)
        return max(counts)

    assert max(on_machines([0, 0], most_parts)) <= 2 * 4  # three and, until they are deleted, the merged one
    left = part_paths(ReferenceStore.open(tmp_path, FINGERPRINT).folder)
    assert len(left) == 2
    assert set(opened) == set(left), "another rank has opened a part that was merged"
    assert rows_stored(ReferenceStore.open(tmp_path, FINGERPRINT)) == distinct_rows(pairs)


def test_rows_that_are_not_finite_are_named_and_the_others_are_kept(tmp_path: Path) -> None:
    good = some_pairs(20)
    bad = [pair([1, 2], [3], [BAD_TOKEN], "f.jsonl:21"), pair([4], [BAD_TOKEN], [5], "f.jsonl:22")]
    store = ReferenceStore.open(tmp_path, FINGERPRINT)
    with pytest.raises(NonFiniteLogProbsError) as caught:
        run_pass(TokenPairs.from_pairs([*good, *bad]), store, OneProcess(), rank_tokens=1000)
    assert sorted(caught.value.rows) == ["f.jsonl:21 rejected", "f.jsonl:22 chosen"]
    assert_holds_all(ReferenceStore.open(tmp_path, FINGERPRINT), good)


def test_a_row_over_the_budget_is_named(tmp_path: Path) -> None:
    pairs = TokenPairs.from_pairs([pair([1], [2], [3]), pair([1] * 30, [2] * 9, [3] * 12, "f.jsonl:2")])
    with pytest.raises(DataError, match=r"f.jsonl:2 rejected: .* 42 tokens and reference.rank_tokens is 40"):
        run_pass(pairs, ReferenceStore.open(tmp_path, FINGERPRINT), OneProcess(), rank_tokens=40)


def test_pairs_over_the_budget_are_scored_apart_if_each_row_fits(tmp_path: Path) -> None:
    pairs = TokenPairs.from_pairs([pair([1] * 20, [2] * 15, [3] * 16)])
    model, _, _ = run_pass(pairs, ReferenceStore.open(tmp_path, FINGERPRINT), OneProcess(), rank_tokens=40)
    assert model.batches == 2
    assert_holds_all(ReferenceStore.open(tmp_path, FINGERPRINT), pairs)
