"""The exchanges of three ranks on CPUs, against the collectives of torch that they stand for."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dpo_scale.distributed.exchange import all_gather, reduce_scatter

RANKS = 3
PART = (5, 7)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("exchange")
    multiprocessing.spawn(_rank, args=(folder,), nprocs=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    timeout = timedelta(seconds=20)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timeout)
    found = {name: check() for name, check in CHECKS.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Whole numbers, which every order of summing gives exactly; other ones on every rank."""
    generator = torch.Generator().manual_seed(RANKS * seed + dist.get_rank())
    return torch.randint(-1000, 1000, shape, generator=generator).float()


def gathers() -> bool:
    part = _values(*PART)
    expected, gathered = torch.empty(RANKS * PART[0], PART[1]), torch.empty(RANKS * PART[0], PART[1])
    dist.all_gather_into_tensor(expected, part)
    assert all_gather(gathered, part) is None
    return torch.equal(gathered, expected)


def gathers_where_the_parts_lie() -> bool:
    part = _values(11)
    expected, gathered = torch.empty(RANKS * 11), torch.zeros(RANKS * 11)
    dist.all_gather_into_tensor(expected, part)
    own = gathered.chunk(RANKS)[dist.get_rank()]
    own.copy_(part)
    all_gather(gathered, own)
    return torch.equal(gathered, expected)


def keeps_gathers_apart_that_overlap() -> bool:
    """Two are on their way while a third operation runs, as when DeepSpeed fetches ahead in the backward pass."""
    parts = [_values(size, seed=size) for size in (70_000, 3)]
    expected = [torch.empty(RANKS * len(part)) for part in parts]
    for whole, part in zip(expected, parts, strict=True):
        dist.all_gather_into_tensor(whole, part)
    gathered = [torch.empty_like(whole) for whole in expected]
    on_their_way = [all_gather(*both, async_op=True) for both in zip(gathered, parts, strict=True)]
    summed, expected_sum = torch.empty(50_000), torch.empty(50_000)
    whole = _values(RANKS * 50_000, seed=9)
    reduce_scatter(summed, whole)
    for exchange in reversed(on_their_way):
        assert exchange is not None
        exchange.wait()
    dist.reduce_scatter_tensor(expected_sum, whole)
    same = [torch.equal(*both) for both in zip((*gathered, summed), (*expected, expected_sum), strict=True)]
    return all(same)


def survives_a_gather_that_nobody_waits_for() -> bool:
    """One that is late on a rank while the others have forgotten theirs; and one that is waited for twice."""
    part, gathered = _values(2_000_000), torch.empty(RANKS * 2_000_000)
    if dist.get_rank() == 0:
        time.sleep(0.5)
    all_gather(gathered, part, async_op=True)
    exchange = all_gather(gathered, part, async_op=True)
    assert exchange is not None
    exchange.wait()
    exchange.wait()
    expected = torch.empty_like(gathered)
    dist.all_gather_into_tensor(expected, part)
    return torch.equal(gathered, expected)


def reduces() -> bool:
    whole = _values(RANKS * PART[0], PART[1])
    before = whole.clone()
    expected, reduced = torch.empty(PART), torch.empty(PART)
    dist.reduce_scatter_tensor(expected, whole)
    work = reduce_scatter(reduced, whole, async_op=True)
    assert work is not None
    work.wait()
    return torch.equal(reduced, expected) and torch.equal(whole, before)


def reduces_where_the_values_lie() -> bool:
    whole = _values(RANKS * 13)
    expected = torch.empty(13)
    dist.reduce_scatter_tensor(expected, whole)
    own = whole.chunk(RANKS)[dist.get_rank()]
    reduce_scatter(own, whole)
    return torch.equal(own, expected)


def works_in_a_group() -> bool:
    """Of ranks 2 and 0, whose numbers in the group are not their own."""
    members = [2, 0]
    group = dist.new_group(members, sort_ranks=False)
    if dist.get_rank() not in members:
        return True
    part, gathered = _values(4), torch.empty(8)
    all_gather(gathered, part, group=group)
    expected = torch.empty(8)
    dist.all_gather_into_tensor(expected, part, group=group)
    reduced, summed = torch.empty(4), torch.empty(4)
    reduce_scatter(reduced, gathered * (1 + dist.get_rank()), group=group)
    dist.reduce_scatter_tensor(summed, expected * (1 + dist.get_rank()), group=group)
    return torch.equal(gathered, expected) and torch.equal(reduced, summed)


def refusals() -> list[str]:
    said = []
    for refused in (
        lambda: all_gather(torch.empty(10), torch.empty(3)),
        lambda: reduce_scatter(torch.empty(3), torch.empty(10)),
        lambda: all_gather(torch.empty(9), torch.empty(3, dtype=torch.bfloat16)),
        lambda: reduce_scatter(torch.empty(3), torch.empty(9), op=dist.ReduceOp.MAX),
    ):
        try:
            refused()
        except ValueError as error:
            said.append(str(error))
    return said


CHECKS = {
    check.__name__: check
    for check in (
        gathers,
        gathers_where_the_parts_lie,
        keeps_gathers_apart_that_overlap,
        survives_a_gather_that_nobody_waits_for,
        reduces,
        reduces_where_the_values_lie,
        works_in_a_group,
        refusals,
    )
}


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "refusals"])
def test_it_gives_what_the_collective_of_torch_gives(found: list[dict[str, Any]], check: str) -> None:
    assert [rank[check] for rank in found] == [True] * RANKS


def test_what_it_cannot_do_is_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        sizes, other_sizes, dtypes, op = rank["refusals"]
        assert sizes == other_sizes == "10 elements of torch.float32 are not 3 parts of 3 of torch.float32"
        assert dtypes == "9 elements of torch.float32 are not 3 parts of 3 of torch.bfloat16"
        assert "MAX" in op
