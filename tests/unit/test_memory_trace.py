"""A model on the meta device, against the same model at work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import COMMON, SERVED
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

import dpo_scale.model.products
from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, collate
from dpo_scale.model.attention import ATTENTION, register
from dpo_scale.model.fused import fuse
from dpo_scale.model.last_layer import skip_unread_positions
from dpo_scale.model.log_probs import ChunkedLogProbs, CompletionLogProbs, LogitTransform
from dpo_scale.operations.memory import CPU, Head, head_memory, scoring_moments, training_moments
from dpo_scale.operations.memory_trace import build_meta_model, micro_batch_shape, trace
from dpo_scale.operations.zero_memory import ZeroSettings, parameters_of

WIDE = {**COMMON, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}


@pytest.fixture(autouse=True)
def _products_as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is of GPUs: it leaves out the slices and transposed copies of oneDNN's products."""
    monkeypatch.setattr(dpo_scale.model.products, "_onednn", lambda: None)


def batch_of(layout: Layout, pairs: int = 6, size: int = 40) -> MicroBatch:
    ids = np.ones(size, np.int32)
    return collate([PromptCompletions(ids, (ids, ids[: size // 2])) for _ in range(pairs)], layout, 0)


def peak_of_allocator(run: Any) -> int:
    """Most bytes that torch's CPU allocator gave out at once while something ran, by torch's own profiler."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("kind", list(SERVED))
def test_parameters_are_counted_as_in_the_model_itself(kind: str) -> None:
    config = AutoConfig.for_model(kind, **{**COMMON, **SERVED[kind]})
    meta = build_meta_model(config, torch.float32, "sdpa")
    expected = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    assert meta.num_parameters == expected
    assert sum(p.elements for p in parameters_of(meta.units)) == expected
    assert len(meta.units) == COMMON["num_hidden_layers"] + 2  # type: ignore[operator]


@pytest.mark.parametrize("kernel", ["varlen", "sdpa"])
@pytest.mark.parametrize("kind", list(SERVED))
def test_every_served_architecture_is_traced_with_and_without_checkpointing(kind: str, kernel: Any) -> None:
    config = AutoConfig.for_model(kind, **{**COMMON, **SERVED[kind]})
    meta = build_meta_model(config, torch.bfloat16, kernel)
    plain = trace(meta, batch_of("shared"))
    recomputed = trace(meta, batch_of("shared"), checkpointing=True)
    frozen = trace(meta, batch_of("shared"), training=False)
    for number, unit in enumerate(plain.units[1:-1], start=1):
        assert recomputed.units[number].saved < unit.saved <= unit.forward
        assert frozen.units[number].saved <= recomputed.units[number].saved
        assert frozen.units[number].forward < unit.forward
    assert len(meta.layers) == COMMON["num_hidden_layers"]


def test_layers_that_differ_are_traced_apart() -> None:
    config = AutoConfig.for_model("qwen3_moe", **{**COMMON, **SERVED["qwen3_moe"], "mlp_only_layers": [0]})
    meta = build_meta_model(config, torch.bfloat16, "varlen")
    assert meta.kinds == (0, 1)
    first, second = trace(meta, batch_of("shared")).units[1:-1]
    assert first != second


def test_the_last_feed_forward_keeps_what_it_has_of_positions_that_are_read() -> None:
    meta = build_meta_model(AutoConfig.for_model("llama", **WIDE), torch.bfloat16, "varlen")
    batch = batch_of("shared")
    units = trace(meta, batch).units
    unread = batch.input_ids.numel() - len(batch.predictors.unique())
    of_a_token = 2 * (2 * WIDE["intermediate_size"])  # gate and up
    kept_anew = 2 * WIDE["hidden_size"] * len(batch.predictors.unique()) + 8 * batch.input_ids.numel()
    less = units[-3].saved - units[-2].saved
    assert less == pytest.approx(unread * of_a_token, abs=kept_anew)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_without_gradients_is_in_proportion_to_tokens(checkpointing: bool) -> None:
    meta = build_meta_model(AutoConfig.for_model("llama", **WIDE), torch.bfloat16, "varlen")
    traces = [trace(meta, batch_of("shared", pairs), checkpointing=checkpointing) for pairs in (6, 12, 24)]
    expected, scaled = traces[2] - traces[1], (traces[1] - traces[0]).of(traces[2].tokens - traces[1].tokens)
    for wanted, actual in zip(expected.units, scaled.units, strict=True):
        assert actual.saved == pytest.approx(wanted.saved, rel=0.01)
        assert actual.forward == pytest.approx(wanted.forward, rel=0.01)
        assert actual.backward == pytest.approx(wanted.backward, rel=0.01)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_what_is_kept_is_what_autograd_saves(layout: Layout) -> None:
    config = AutoConfig.for_model("llama", **WIDE)
    batch = batch_of(layout)
    units = trace(build_meta_model(config, torch.float32, "sdpa"), batch).units
    expected_saved = sum(unit.saved for unit in units)

    register("sdpa")
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    fuse(model)
    skip_unread_positions(model)
    given = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        kept = model.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **({} if batch.segments is None else {"segments": batch.segments}),
        )
    assert kept.last_hidden_state.requires_grad
    # masks and positions, which are small, are the model's inputs to us
    assert expected_saved == pytest.approx(sum(saved.values()), rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_peak_of_forward_and_backward_is_that_of_torchs_allocator(checkpointing: bool) -> None:
    config = AutoConfig.for_model("llama", **{**WIDE, "vocab_size": 50})  # the head is done before the peak
    meta = build_meta_model(config, torch.float32, "sdpa")
    units = trace(meta, batch_of("shared", pairs=12), checkpointing=checkpointing).units
    kept, expected = 0, 0
    for unit in units:
        expected = max(expected, kept + unit.forward, kept + unit.backward)
        kept += unit.saved

    register("sdpa")
    model = CompletionLogProbs(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION))
    model.train()
    model.model.config.use_cache = False  # type: ignore[union-attr]
    if checkpointing:
        model.model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def run() -> None:
        model(batch_of("shared", pairs=12)).sum().backward()

    run()  # whatever is made once and kept
    assert expected == pytest.approx(peak_of_allocator(run), rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(50, 3000), (3000, 9000)], ids=["one chunk", "many chunks"])
def test_the_head_takes_what_torchs_allocator_gives_it(
    dtype: torch.dtype, rows: int, vocabulary: int, softcap: float | None
) -> None:
    head = Head(rows, 48, vocabulary, softcap is not None)
    memory = head_memory(head, dtype.itemsize, CPU)
    weight = torch.randn(vocabulary, 48).to(dtype).requires_grad_()
    source = torch.randn(rows, 48).to(dtype).requires_grad_()
    targets = torch.zeros(rows, dtype=torch.int64)
    given = rows * 8 * 2  # targets and predictors are made beforehand
    loss: list[torch.Tensor] = []

    def forward() -> None:
        logps = ChunkedLogProbs.apply(source + 0, weight, None, targets, LogitTransform(1.0, softcap))  # type: ignore[no-untyped-call]
        loss[:] = [logps]

    def backward() -> None:
        loss.pop().backward(torch.ones(rows))

    assert memory.forward - given == pytest.approx(peak_of_allocator(forward), rel=0.05)
    assert memory.backward == pytest.approx(memory.saved + peak_of_allocator(backward), rel=0.05)


@pytest.mark.parametrize(
    ("ranks", "offload_param", "gathers"), [(1, "none", False), (1, "cpu", True), (2, "none", True)]
)
def test_a_rank_with_all_weights_on_its_device_gathers_nothing(ranks: int, offload_param: str, gathers: bool) -> None:
    """As measured: training_step.py of 1B on one H200, 37,505 MiB where 37,504 are planned."""
    meta = build_meta_model(AutoConfig.for_model("llama", **WIDE), torch.bfloat16, "varlen")
    shape = micro_batch_shape(meta, np.full((4, 3), 20), "shared", 40, checkpointing=False, training=True)
    zero = ZeroSettings(param_persistence_threshold=0, offload_param=offload_param)
    moments = training_moments(meta.units, shape, zero, ranks=ranks, dtype_bytes=2, checkpointing=False)
    scoring = scoring_moments(meta.units, shape, zero, ranks=ranks, dtype_bytes=2)
    for each in (moments[:-1], scoring):
        assert any(moment.gathered for moment in each) == gathers
