"""A layout is used only if it gives the model's own log-probs; what cannot be served falls back and says why."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import SERVED, VOCABULARY, WINDOW, save_tiny_model
from torch import Tensor

from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, Segment, Segments, collate
from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.errors import UserError
from dpo_scale.model import layout_check, log_probs
from dpo_scale.model.attention import register
from dpo_scale.model.layout_check import LayoutChoice, check_layout
from dpo_scale.model.loading import load_model
from dpo_scale.model.log_probs import CompletionLogProbs
from dpo_scale.recipe import ModelSection


class InProcess:
    """An engine without sharding; `seen` are the micro-batches that went through its fast path."""

    def __init__(self, model: CompletionLogProbs) -> None:
        self.model = model.eval()
        self.seen: list[MicroBatch] = []

    def __call__(self, batch: MicroBatch, *, plain: bool = False) -> Tensor:
        if not plain:
            self.seen.append(batch)
        result: Tensor = self.model(batch, plain=plain)
        return result


def _pairs(lengths: Sequence[tuple[int, int, int]] = ((9, 11, 7), (3, 2, 5), (14, 4, 12))) -> TokenPairs:
    rng = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return rng.integers(3, VOCABULARY, n).astype(np.int32)

    return TokenPairs.from_pairs(TokenPair(ids(p), ids(c), ids(r), f"row {n}") for n, (p, c, r) in enumerate(lengths))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., InProcess]:
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def load(model_type: str, dtype: str = "float32") -> InProcess:
        register("sdpa")
        folder = root / model_type
        if not folder.exists():
            save_tiny_model(folder, model_type, **UNSERVED.get(model_type, {}))
        return InProcess(load_model(folder, ModelSection(path=str(folder), dtype=dtype)))

    return load


def _check(engine: InProcess, wanted: str = "auto", pairs: TokenPairs | None = None) -> LayoutChoice:
    return check_layout(
        engine,
        pairs or _pairs(),
        wanted=wanted,
        dtype=next(engine.model.parameters()).dtype,
        device=torch.device("cpu"),
        pad_id=0,
    )


@pytest.mark.parametrize("model_type", SERVED)
def test_auto_takes_the_shared_layout(model_type: str, engine: Callable[..., InProcess]) -> None:
    actual = _check(engine(model_type))
    assert (actual.layout, actual.passed_over) == ("shared", ())
    assert actual.gap < 1e-5


@pytest.mark.parametrize("wanted", ["packed", "padded"])
def test_a_layout_that_is_asked_for_is_taken(wanted: Layout, engine: Callable[..., InProcess]) -> None:
    assert _check(engine("llama"), wanted).layout == wanted


UNSERVED: dict[str, dict[str, Any]] = {
    "gpt_oss": {"sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "llama4_text": {
        "attention_chunk_size": WINDOW,
        "num_local_experts": 2,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
    },
    "mamba": {"state_size": 4},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "bloom": {"n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize(
    ("model_type", "expected_reason"),
    [
        ("gpt_oss", "the model gives its attention 's_aux'"),
        ("llama4_text", f"attention is masked in spans of {WINDOW} tokens that are no sliding window"),
        ("mamba", "0 of 2 layers take the attention interface"),
        ("jamba", "1 of 2 layers take the attention interface"),
        ("bloom", "0 of 2 layers take the attention interface"),
    ],
)
def test_models_that_segments_cannot_serve_fall_back_with_a_reason(
    model_type: str, expected_reason: str, engine: Callable[..., InProcess]
) -> None:
    actual = _check(engine(model_type))
    assert actual.layout == "padded"
    assert [line.partition(": ")[0] for line in actual.passed_over] == ["shared", "packed"]
    assert all(expected_reason in line for line in actual.passed_over)
    lines = actual.describe("policy")
    assert len(lines) == 3
    assert lines[0].startswith("  not shared: ")
    assert "policy: padded" in lines[2]
    with pytest.raises(UserError, match=r"batch\.layout: shared does not give"):
        _check(engine(model_type), "shared")


def _later_positions(batch: MicroBatch) -> MicroBatch:
    """Positions of the rejected part of the first pair one too late."""
    positions = batch.position_ids.clone()
    segment = _second_segment(batch)
    positions[0, segment.start : segment.stop] += 1
    return replace(batch, position_ids=positions)


def _second_segment(batch: MicroBatch) -> Segment:
    assert batch.segments is not None
    return batch.segments.segments[1]


def _with_second_segment(batch: MicroBatch, **changes: int) -> MicroBatch:
    assert batch.segments is not None
    first, second, *rest = batch.segments.segments
    return replace(batch, segments=Segments.build([first, replace(second, **changes), *rest]))


def _shorter_prefix(batch: MicroBatch) -> MicroBatch:
    """The rejected part does not see the last token of its prompt."""
    return _with_second_segment(batch, prefix_stop=_second_segment(batch).prefix_stop - 1)


def _longer_prefix(batch: MicroBatch) -> MicroBatch:
    """The rejected part sees the first token of the chosen one."""
    return _with_second_segment(batch, prefix_stop=_second_segment(batch).prefix_stop + 1)


def _earlier_predictor(batch: MicroBatch) -> MicroBatch:
    predictors = batch.predictors.clone()
    predictors[3] -= 1
    return replace(batch, predictors=predictors)


MISTAKES = [_later_positions, _shorter_prefix, _longer_prefix, _earlier_predictor]


@pytest.fixture
def break_shared(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[MicroBatch], MicroBatch]], None]:
    def install(mistake: Callable[[MicroBatch], MicroBatch]) -> None:
        def broken(groups: Sequence[PromptCompletions], layout: Layout, pad_id: int = 0) -> MicroBatch:
            batch = collate(groups, layout, pad_id)
            return mistake(batch) if layout == "shared" else batch

        monkeypatch.setattr(layout_check, "collate", broken)

    return install


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("model_type", SERVED)
def test_off_by_one_makes_the_check_refuse(
    model_type: str, mistake: Any, engine: Callable[..., InProcess], break_shared: Any
) -> None:
    break_shared(mistake)
    actual = _check(engine(model_type))
    assert actual.layout == "packed"
    assert "a token's log-prob differs by" in actual.passed_over[0]
    with pytest.raises(UserError, match=r"batch\.layout: shared does not give this model's log-probs\n  shared: "):
        _check(engine(model_type), "shared")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_off_by_one_is_far_above_the_rounding_of_bfloat16(
    mistake: Any, engine: Callable[..., InProcess], break_shared: Any
) -> None:
    assert _check(engine("llama", "bfloat16")).layout == "shared"
    break_shared(mistake)
    assert _check(engine("llama", "bfloat16")).layout == "packed"


def test_log_probs_that_are_not_numbers_are_refused(engine: Callable[..., InProcess]) -> None:
    class Diverged(InProcess):
        def __call__(self, batch: MicroBatch, *, plain: bool = False) -> Tensor:
            return super().__call__(batch, plain=plain) * (1.0 if plain else float("nan"))

    with pytest.raises(UserError, match="auto does not give"):
        _check(Diverged(engine("llama").model))


def test_the_longest_sequence_is_among_the_samples(engine: Callable[..., InProcess]) -> None:
    """Not the pair with most tokens: windows and position limits count along one sequence."""
    most_tokens, longest_sequence = (2, 20, 20), (4, 29, 1)
    pairs = _pairs([(3, 2, 2), (4, 2, 2), (5, 2, 2), most_tokens, longest_sequence])
    probe = InProcess(engine("llama").model)
    _check(probe, "padded", pairs)
    assert probe.seen[0].input_ids.shape == (2 * 3, 33)


@pytest.mark.parametrize("takes_positions", [True, False])
def test_the_plain_form_takes_logits_of_completions_alone_where_the_model_can(
    takes_positions: bool, engine: Callable[..., InProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = engine("llama")
    monkeypatch.setattr(log_probs, "PLAIN_CHUNK", 3)  # tokens in fp32 at once
    monkeypatch.setattr(llama.model, "_takes_positions", takes_positions)
    shapes: list[torch.Size] = []
    head = llama.model.model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    assert _check(llama).gap < 1e-5
    handle.remove()
    tokens = [shape[-2] for shape in shapes if shape[-1] == VOCABULARY]
    of_completions = [4, 12, 11, 7, 2, 5]  # of the longest pair, then of the first two
    prompts = [14, 14, 9, 9, 3, 3]
    whole = [prompt + completion for prompt, completion in zip(prompts, of_completions, strict=True)]
    assert tokens == (of_completions if takes_positions else whole)


def test_a_window_that_only_the_longest_sequence_exceeds_shows(tmp_path: Path) -> None:
    """A window that attention does not hear of is found although the first pairs are shorter than it."""
    folder = save_tiny_model(tmp_path, "mistral", sliding_window=20)
    register("sdpa")
    probe = InProcess(load_model(folder, ModelSection(path=str(folder), dtype="float32")))
    for layer in probe.model.model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.sliding_window = None
        layer.self_attn.config = _without_window(layer.self_attn.config)
    actual = _check(probe, "auto", _pairs([(3, 2, 2), (3, 3, 2), (3, 4, 2), (15, 12, 2)]))
    assert actual.layout == "padded"
    assert "masked in spans of 20 tokens" in actual.passed_over[0]


def _without_window(config: Any) -> Any:
    return type(config)(**{**config.to_dict(), "sliding_window": None, "attn_implementation": "dpo_scale"})


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 32}),
    ],
)
def test_positions_that_depend_on_neighbours_are_refused_with_a_remedy(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """A short pair beside long ones has the long one's angles: no layout has those of the pair alone."""
    register("sdpa")
    save_tiny_model(tmp_path, model_type, **settings)
    model = InProcess(load_model(tmp_path, ModelSection(path=str(tmp_path), dtype="float32")))
    below = _check(model, pairs=_pairs(((20, 11, 7), (3, 2, 5))))
    assert below.layout == "shared"
    with pytest.raises(UserError, match=r"data\.max_length: 32 keeps all below"):
        _check(model, pairs=_pairs(((30, 20, 22), (31, 22, 15), (30, 21, 22), (3, 2, 5))))


def test_a_mask_that_a_model_makes_itself_is_not_left_out(tmp_path: Path) -> None:
    register("sdpa")
    save_tiny_model(tmp_path, "llama")
    model = InProcess(load_model(tmp_path, ModelSection(path=str(tmp_path), dtype="float32")))
    for module in model.model.modules():
        if type(module).__name__ == "LlamaAttention":
            library = module.forward

            def forward(*inputs: Any, library: Any = library, **named: Any) -> Any:
                mask = torch.zeros(1, 1, 1, 1) if "segments" in named else named["attention_mask"]
                return library(*inputs, **{**named, "attention_mask": mask})

            module.forward = forward
    actual = _check(model)
    assert actual.layout == "padded"
    assert all("the model gives its attention a mask of its own" in line for line in actual.passed_over)


def test_weights_that_are_not_finite_are_not_taken_for_a_wrong_layout(tmp_path: Path) -> None:
    register("sdpa")
    save_tiny_model(tmp_path, "llama")
    model = InProcess(load_model(tmp_path, ModelSection(path=str(tmp_path), dtype="float32")))
    with torch.no_grad():
        next(model.model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="log-probs that are not finite: its weights are damaged"):
        _check(model)


def test_weights_that_a_folder_lacks_do_not_start_at_random(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    register("sdpa")
    with pytest.raises(UserError, match=r"weights are missing for model\.norm\.weight \(1 in all\)"):
        load_model(tmp_path, ModelSection(path=str(tmp_path), dtype="float32"))
