"""Sizes under ZeRO-3, against sums that are done another way."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_scale.distributed.parameter_slices import SliceAddress
from dpo_scale.operations.zero_memory import (
    WORKSPACES_BYTES,
    Parameter,
    Unit,
    ZeroSettings,
    gathered,
    gradient_bytes,
    optimizer_step_bytes,
    parameters_of,
    pinned,
    shard_elements,
    states,
    sub_groups,
)

sizes = st.lists(st.integers(1, 3000), min_size=1, max_size=6)
models = st.lists(st.lists(sizes, min_size=1, max_size=4), min_size=1, max_size=5)
NOTHING_KEPT = ZeroSettings(
    reduce_bucket_size=1, prefetch_bucket_size=0, param_persistence_threshold=0, max_reuse_distance=0
)


def units_of(model: list[list[list[int]]]) -> list[Unit]:
    """Units of modules of parameter sizes, no weight tied."""
    keys = iter(range(10**6))
    return [
        Unit(str(n), tuple(tuple(Parameter(next(keys), size) for size in module) for module in unit), recomputes=True)
        for n, unit in enumerate(model)
    ]


@given(models, st.integers(1, 9))
def test_the_ranks_shards_are_the_slices_that_checkpoints_hold(model: list[list[list[int]]], ranks: int) -> None:
    parameters = parameters_of(units_of(model))
    slices = [SliceAddress.of_rank("w", (p.elements,), 0, ranks) for p in parameters]
    assert shard_elements(parameters, ranks) == sum(address.stop - address.start for address in slices)
    assert shard_elements(parameters, 1) == sum(p.elements for p in parameters)


@given(models)
def test_without_reuse_and_prefetch_one_module_is_whole_at_a_time(model: list[list[list[int]]]) -> None:
    units = units_of(model)
    total = sum(p.elements for p in parameters_of(units))
    whole = gathered(units, NOTHING_KEPT, recompute=False)
    # and the buffer that they came in, until they are used
    expected_peaks = tuple(2 * max(sum(module) for module in unit) for unit in model)
    # the last module of the forward is the first of the backward: its parameters are still there
    assert whole.forward == expected_peaks
    assert whole.backward == expected_peaks
    assert whole.fetched == 2 * total
    assert whole.fetched_again == total
    assert whole.gathers == 2 * sum(len(unit) for unit in model)


@given(models)
def test_a_model_within_the_reuse_distance_is_gathered_once(model: list[list[list[int]]]) -> None:
    units = units_of(model)
    total = sum(p.elements for p in parameters_of(units))
    keep = replace(NOTHING_KEPT, max_reuse_distance=10**9)
    whole = gathered(units, keep, recompute=False)
    assert whole.fetched == total
    assert whole.fetched_again == 0
    assert total < max(whole.forward) <= 2 * total


@given(models, st.integers(0, 10**4), st.integers(0, 10**4), st.booleans())
@example([[[1], [1], [1, 1], [1] * 6]], 0, 4, False)
def test_no_more_is_gathered_than_there_is(
    model: list[list[list[int]]], reuse: int, prefetch: int, recompute: bool
) -> None:
    units = units_of(model)
    total = sum(p.elements for p in parameters_of(units))
    zero = replace(NOTHING_KEPT, max_reuse_distance=reuse, prefetch_bucket_size=prefetch)
    whole = gathered(units, zero, recompute=recompute)
    largest = max(sum(module) for unit in model for module in unit)
    # Parameters, and the buffers that they came in: a buffer that waits for the last of them outlives those of its
    # parameters that are released, and may be there when they are fetched again.
    assert largest <= max(whole.forward) <= total + whole.fetched
    assert largest <= max(whole.backward) <= total + whole.fetched
    assert whole.fetched - whole.fetched_again == total


def test_small_parameters_stay_whole_and_are_not_gathered() -> None:
    units = units_of([[[100, 5]], [[50]]])
    zero = replace(NOTHING_KEPT, param_persistence_threshold=50)
    assert gathered(units, zero, recompute=False).fetched == 2 * 100
    assert states(parameters_of(units), zero, 4, 2, cpu=False).device["small weights, kept whole"] == 2 * 55


def test_a_tied_weight_is_one_parameter_whose_gradient_waits_for_its_last_use() -> None:
    shared = Parameter(0, 1000)
    units = [Unit("embedding", ((shared,),)), Unit("layer", ((Parameter(1, 10),),)), Unit("head", ((shared,),))]
    assert sum(p.elements for p in parameters_of(units)) == 1010
    gradients = gradient_bytes(units, replace(NOTHING_KEPT, reduce_bucket_size=100), 2, 2)
    assert gradients[1] == 2 * (1000 + 10)  # the head's, while the layer makes its own
    untied = [units[0], units[1], Unit("head", ((Parameter(2, 1000),),))]
    # a large one waits on its own until the next arrives, and is then reduced to fp32 halves
    assert gradient_bytes(untied, replace(NOTHING_KEPT, reduce_bucket_size=100), 2, 2)[1] == 2 * (1000 + 10) + 4 * 500


def test_a_bucket_that_is_reduced_where_it_lies_takes_no_copy() -> None:
    units = [Unit("embedding", ((Parameter(0, 60),),)), Unit("head", ((Parameter(1, 30),), (Parameter(2, 1000),)))]
    copying = replace(NOTHING_KEPT, reduce_bucket_size=100)
    in_place = replace(copying, reduce_scatter=False)
    assert ZeroSettings.of_config({"zero_optimization": {"reduce_scatter": False}}).reduce_scatter is False
    # the last bucket, of 60 and 30: a copy and fp32 halves beside it, or nothing
    assert gradient_bytes(units, copying, 2, 2)[0] == 2 * 90 + 4 * 45
    assert gradient_bytes(units, in_place, 2, 2)[0] == 2 * 60
    # three ranks have no equal parts of a single one
    alone = [Unit("embedding", ((Parameter(0, 1000),),))]
    assert gradient_bytes(alone, copying, 2, 2)[0] == 2 * 1000 + 4 * 500
    assert gradient_bytes(alone, copying, 3, 2)[0] == 2 * 2000 + 4 * 334
    # one that is larger than the bucket goes the other way in any case
    assert gradient_bytes(units, in_place, 2, 2)[1] == gradient_bytes(units, copying, 2, 2)[1] == 2 * 1030 + 4 * 500


def test_states_are_eighteen_bytes_in_bf16_and_twenty_in_fp32() -> None:
    parameters = [Parameter(0, 4000), Parameter(1, 96)]
    zero = replace(NOTHING_KEPT, reduce_bucket_size=0)
    for dtype_bytes, expected in ((2, 18), (4, 20)):
        held = states(parameters, zero, 4, dtype_bytes, cpu=False)
        assert sum(held.device.values()) == expected * 4096 // 4 + WORKSPACES_BYTES
        assert not held.host
        assert not held.nvme


def test_offload_moves_states_and_doubles_the_gradients() -> None:
    parameters = [Parameter(0, 4096)]
    zero = replace(NOTHING_KEPT, reduce_bucket_size=0, offload_optimizer="cpu", offload_param="cpu")
    held = states(parameters, zero, 4, 2, cpu=False)
    assert sum(held.device.values()) == WORKSPACES_BYTES
    assert sum(held.host.values()) == (2 + 4 + 8 + 4 + 4) * 1024
    only_optimizer = states(parameters, replace(zero, offload_param="none"), 4, 2, cpu=False)
    assert only_optimizer.device["weights"] == 2 * 1024
    on_disk = states(parameters, replace(zero, offload_optimizer="nvme", offload_param="nvme"), 4, 2, cpu=False)
    assert sum(on_disk.nvme.values()) == (2 + 4 + 8 + 4) * 1024
    assert optimizer_step_bytes(parameters, zero, 4) == 0


def test_what_travels_from_nvme_goes_through_buffers_of_the_host() -> None:
    """As many as the file says, each as large as the largest sub-group's fp32, or as the file says for weights."""
    parameters = [Parameter(n, 1000) for n in range(5)]
    config = {
        "sub_group_size": 2000,
        "offload_optimizer": {"device": "nvme", "buffer_count": 6},
        "offload_param": {"device": "nvme", "buffer_count": 3, "buffer_size": 500},
    }
    held = states(parameters, ZeroSettings.of_config({"zero_optimization": config}), 1, 2, cpu=False)
    assert held.host["optimizer's NVMe buffers"] == 6 * 2000 * 4
    assert held.host["weights' NVMe buffers"] == 3 * 500 * 2


def test_hpz_holds_a_second_copy_of_the_weights_within_the_node() -> None:
    held = states([Parameter(0, 4096)], replace(NOTHING_KEPT, hpz_partition_size=8), 64, 2, cpu=False)
    assert held.device["second copy within the node"] == 2 * 4096 // 8


@given(sizes, st.integers(1, 4), st.integers(1, 5000))
def test_a_sub_group_ends_with_the_parameter_that_fills_it(elements: list[int], ranks: int, size: int) -> None:
    parameters = [Parameter(n, count) for n, count in enumerate(elements)]
    pieces = sub_groups(parameters, ranks, size)
    own = [-(-count // ranks) for count in elements]
    assert sum(pieces) == sum(own)
    assert all(size <= piece < size + max(own) for piece in pieces[:-1])
    assert 0 < pieces[-1] < size + max(own)


def test_pinned_gradients_of_an_offloaded_optimizer_are_rounded_piece_by_piece() -> None:
    """DeepSpeed pins one buffer of all gradients that a rank owns, and one for each sub-group's."""
    parameters = [Parameter(n, 1000) for n in range(5)]
    zero = ZeroSettings(offload_optimizer="cpu", pin_optimizer=True, sub_group_size=2000)
    held = states(parameters, zero, ranks=1, dtype_bytes=2, cpu=False).host
    assert held["accumulated gradients"] == 32768  # of 20,000 bytes
    assert held["gradients for the optimizer"] == 8192 + 8192 + 4096


@given(st.integers(0, 2**40))
@settings(max_examples=50)
def test_pinned_memory_comes_in_powers_of_two(size: int) -> None:
    taken = pinned(size)
    assert size <= taken < max(2, 2 * size)
    assert taken & (taken - 1) == 0


def test_a_deepspeed_json_is_read_with_deepspeeds_own_defaults() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    defaults, ours = DeepSpeedZeroConfig(), ZeroSettings.of_config({"zero_optimization": {"stage": 3}})
    for name in ("reduce_bucket_size", "sub_group_size", "prefetch_bucket_size", "param_persistence_threshold"):
        assert getattr(ours, name) == getattr(defaults, name), name
    for name in ("max_live_parameters", "max_reuse_distance"):
        assert getattr(ours, name) == getattr(defaults, name), name
    optimizer, param = DeepSpeedZeroOffloadOptimizerConfig(), DeepSpeedZeroOffloadParamConfig()
    assert ours.optimizer_buffers == optimizer.buffer_count
    assert (ours.param_buffers, ours.param_buffer_size) == (param.buffer_count, param.buffer_size)
    assert ours.hpz_partition_size == defaults.zero_hpz_partition_size
    read = ZeroSettings.of_config(
        {
            "zero_optimization": {
                "stage3_prefetch_bucket_size": 5e7,
                "reduce_bucket_size": "auto",
                "offload_optimizer": {"device": "cpu", "pin_memory": False},
            }
        }
    )
    assert (read.prefetch_bucket_size, read.reduce_bucket_size) == (50_000_000, ours.reduce_bucket_size)
    secondary = {"zero_optimization": {"zero_hpz_partition_size": "auto"}}
    assert ZeroSettings.of_config(secondary, ranks_per_node=8).hpz_partition_size == 8
    assert (read.offload_optimizer, read.offload_param, read.pin_optimizer) == ("cpu", "none", False)
