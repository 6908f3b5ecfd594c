"""Ranks wait for another one's work longer than a collective would, and not forever for one that is gone."""

from __future__ import annotations

import copy
import itertools
import threading
import time

import pytest
from torch.distributed import HashStore

from dpo_scale.distributed import patience
from dpo_scale.distributed.lockstep import once_a_machine
from dpo_scale.errors import DataError, UserError

COLLECTIVE_SECONDS, WORK_SECONDS = 1.0, 3.0


class ThreadRanks:
    """Two ranks of one machine as threads of this process, with collectives that do not wait for long."""

    shared: list
    barrier: threading.Barrier
    store: HashStore

    def __init__(self, rank: int) -> None:
        self.rank, self.is_local_main = rank, rank == 0

    def gather_objects(self, value):
        self.shared[self.rank] = copy.copy(value)  # as if it were sent
        self.barrier.wait(COLLECTIVE_SECONDS)
        values = list(self.shared)
        self.barrier.wait(COLLECTIVE_SECONDS)
        return values

    def on_local_mains(self, work) -> None:
        patience.work_and_wait(self.store, self.rank, [0], work)


@pytest.fixture(autouse=True)
def one_turn_for_both_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_turns", itertools.repeat(0))


def on_two_ranks(action) -> list:
    ThreadRanks.shared, ThreadRanks.barrier, ThreadRanks.store = [None, None], threading.Barrier(2), HashStore()
    outcomes: list = [None, None]

    def run(rank: int) -> None:
        try:
            outcomes[rank] = once_a_machine(ThreadRanks(rank), lambda: action(rank))
        except UserError as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return outcomes


def test_work_may_take_longer_than_a_collective() -> None:
    assert on_two_ranks(lambda rank: time.sleep(0 if rank else WORK_SECONDS) or "filled") == ["filled", "filled"]


def test_the_first_rank_of_a_machine_goes_first() -> None:
    order: list[int] = []

    def action(rank: int) -> str:
        order.append(rank)
        return f"rank {rank}"

    assert on_two_ranks(action) == ["rank 0", "rank 1"]
    assert order == [0, 1]


@pytest.mark.parametrize("clumsy", [0, 1])
def test_a_mistake_of_one_rank_is_raised_on_all(clumsy: int) -> None:
    def action(rank: int) -> str:
        if rank == clumsy:
            raise DataError("a bad row")
        return "fine"

    assert [str(outcome) for outcome in on_two_ranks(action)] == ["a bad row", "a bad row"]


def test_a_rank_that_falls_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MOST_SECONDS_OF_SILENCE", 0.3)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"rank 1 prepares data and has shown no sign of life"):
        patience.work_and_wait(HashStore(), 0, [0, 1], lambda: None)
    assert time.monotonic() - started > 0.3


def test_a_rank_that_works_is_waited_for_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "MOST_SECONDS_OF_SILENCE", 0.5)
    monkeypatch.setattr(patience, "SECONDS_BETWEEN_BEATS", 0.05)
    store = HashStore()
    worker = threading.Thread(target=lambda: patience.work_and_wait(store, 1, [1], lambda: time.sleep(2)))
    worker.start()
    started = time.monotonic()
    patience.work_and_wait(store, 0, [1], lambda: pytest.fail("rank 0 does not work"))
    worker.join()
    assert time.monotonic() - started > 1.5


def test_what_the_work_raises_is_raised_and_its_heart_stops() -> None:
    def fail() -> None:
        raise MemoryError

    threads = threading.active_count()
    with pytest.raises(MemoryError):
        patience.work_and_wait(HashStore(), 0, [0], fail)
    assert threading.active_count() == threads
