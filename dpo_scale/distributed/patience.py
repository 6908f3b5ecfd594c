"""Waiting for the long work of some ranks outside of collectives, whose time-out would end the run.

The ranks that work show through the rendezvous store that they live; the others look there now and then. So work may
take hours, and a rank that is gone is noticed in minutes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from dpo_scale.errors import UserError

SECONDS_BETWEEN_BEATS = 5.0
MOST_SECONDS_OF_SILENCE = 300.0
"""Without a sign of life; far more than a machine under load needs between two."""
_LONGEST_PAUSE = 1.0
_DONE = b"done"

_turns = itertools.count()
"""Numbers of the calls, equal on all ranks: no turn sees the signs of an earlier one."""


class Store(Protocol):
    """What torch's rendezvous store offers."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def work_and_wait(store: Store, rank: int, workers: Sequence[int], work: Callable[[], None]) -> None:
    """Do the work if this rank is one of `workers`; return when all of them are done. All ranks call it.

    Raises UserError where a worker shows no sign of life; what the work itself raises, on its own rank.
    """
    turn = next(_turns)
    if rank in workers:
        key = _key(turn, rank)
        with _heartbeat(store, key):
            work()
        store.set(key, _DONE.decode())
    for worker in workers:
        _wait_for(store, _key(turn, worker), worker)


def _key(turn: int, rank: int) -> str:
    return f"dpo_scale/turn-{turn}/rank-{rank}"


@contextmanager
def _heartbeat(store: Store, key: str) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        for number in itertools.count():
            store.set(key, str(number))
            if ended.wait(SECONDS_BETWEEN_BEATS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _wait_for(store: Store, key: str, worker: int) -> None:
    pause, last, heard = 0.01, b"", time.monotonic()
    while True:
        sign = store.get(key) if store.check([key]) else b""
        if sign == _DONE:
            return
        if sign != last:
            last, heard = sign, time.monotonic()
        elif time.monotonic() - heard > MOST_SECONDS_OF_SILENCE:
            raise UserError(
                f"rank {worker} prepares data and has shown no sign of life for {MOST_SECONDS_OF_SILENCE:.0f} s; "
                "its log says what became of it"
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
