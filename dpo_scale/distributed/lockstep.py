"""Work on files that all ranks finish, or that fails with the same error on all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dpo_scale.errors import UserError

T = TypeVar("T")


class Ranks(Protocol):
    """Who this process is, and the collectives: of a process group (`runtime.Ranks`), or of one process."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def is_main(self) -> bool: ...
    @property
    def is_local_main(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    def barrier(self) -> None: ...
    def gather_objects(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        ...

    def sum(self, values: Tensor) -> Tensor: ...
    def max(self, values: Tensor) -> Tensor: ...
    def on_local_mains(self, work: Callable[[], None]) -> None:
        """Work that one rank of every machine does while the others wait, however long it takes."""
        ...


@dataclass(frozen=True, slots=True)
class OneProcess:
    """The ranks of a command that runs alone."""

    rank: int = 0
    world_size: int = 1
    is_main: bool = True
    is_local_main: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def gather_objects(self, value: T) -> list[T]:
        return [value]

    def barrier(self) -> None: ...

    def sum(self, values: Tensor) -> Tensor:
        return values

    def max(self, values: Tensor) -> Tensor:
        return values

    def on_local_mains(self, work: Callable[[], None]) -> None:
        work()


def together(ranks: Ranks, action: Callable[[], T], error: type[UserError]) -> list[T]:
    """Every rank's result, on every rank; if one fails, the same error on all at once."""
    result, failure = None, None
    try:
        result = action()
    except (OSError, RuntimeError, ValueError) as caught:
        failure = str(caught) or type(caught).__name__
    outcomes = ranks.gather_objects((result, failure))
    ranks_by_failure: dict[str, list[int]] = {}
    for rank, (_, why) in enumerate(outcomes):
        if why is not None:
            ranks_by_failure.setdefault(why, []).append(rank)
    if ranks_by_failure:
        raise error("\n".join(f"  {_named(failed, len(outcomes))}: {why}" for why, failed in ranks_by_failure.items()))
    return [result for result, _ in outcomes]  # type: ignore[misc]


def _named(failed: list[int], world_size: int) -> str:
    if len(failed) == 1:
        return f"rank {failed[0]}"
    return "all ranks" if len(failed) == world_size else f"ranks {', '.join(map(str, failed))}"


def on_main(ranks: Ranks, action: Callable[[], T], error: type[UserError]) -> T:
    """The main rank's result, on every rank; if it fails, the same error on all at once."""
    result = together(ranks, lambda: action() if ranks.is_main else None, error)[0]
    return result  # type: ignore[return-value]


def by_main(ranks: Ranks, action: Callable[[], T]) -> T | None:
    """Let the main rank act: its result there and None elsewhere; a mistake that it finds is raised on all ranks."""
    result, mistake = None, None
    if ranks.is_main:
        try:
            result = action()
        except UserError as error:
            mistake = error
    mistake = ranks.gather_objects(mistake)[0]
    if mistake is not None:
        raise mistake
    return result


def once_a_machine(ranks: Ranks, action: Callable[[], T]) -> T:
    """The result of an action that fills a cache: first on one rank of every machine, then on the others.

    The first turn may take hours; the second finds the cache filled. A mistake that one rank finds is raised on all
    of them.
    """
    results: list[T] = []
    mistakes: list[UserError] = []

    def attempt() -> None:
        try:
            results.append(action())
        except UserError as error:
            mistakes.append(error)

    def raise_mistakes() -> None:
        found = [mistake for others in ranks.gather_objects(mistakes) for mistake in others]
        if found:
            raise found[0]

    ranks.on_local_mains(attempt)
    raise_mistakes()
    if not ranks.is_local_main:
        attempt()
    raise_mistakes()
    return results[0]
