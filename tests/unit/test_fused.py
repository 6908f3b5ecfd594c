"""One function each for norms, gated feed-forwards and rotary embeddings: the same values, and less that is kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SERVED, save_tiny_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.qwen2.modeling_qwen2 import Qwen2Config

import dpo_scale.model as model_package
from dpo_scale.data.layouts import PromptCompletions, collate
from dpo_scale.model.attention import register
from dpo_scale.model.fused import (
    FeedForward,
    Projection,
    RMSNorm,
    Rotation,
    _kernels,
    _stand_in,
    fuse,
    library_code,
    why_no_kernels,
)
from dpo_scale.model.layout_check import LayoutChoice
from dpo_scale.model.loading import checkpoint_activations, load_model
from dpo_scale.recipe import ModelSection

WITHOUT = {"gemma2": {"mlp"}, "gemma3_text": {"mlp"}, "phi3": {"mlp"}, "mixtral": {"mlp"}, "qwen3_moe": {"mlp"}}
"""Other activations, one projection for gate and up, experts."""
LAYER_NORMS = ("gpt_neox", "gpt2", "phi")


def _norm(kind: type[nn.Module] = LlamaRMSNorm, size: int = 24) -> nn.Module:
    norm = kind(size, eps=1e-5)
    nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    return norm


def _feed_forward(activation: str = "silu") -> nn.Module:
    torch.manual_seed(0)
    return LlamaMLP(Qwen2Config(hidden_size=16, intermediate_size=40, hidden_act=activation, mlp_bias=True))


def _written_out(module: Any, hidden: Tensor) -> Tensor:
    """What a module computes, in the precision of its weights: the library's norms never go beyond fp32."""
    if isinstance(module, LlamaMLP | nn.Linear):
        output: Tensor = module(hidden)
        return output
    offset = 1.0 if isinstance(module, Gemma2RMSNorm) else 0.0
    normal: Tensor = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (offset + module.weight) * normal


def _values_and_gradients(module: nn.Module, hidden: Tensor, run: Any = None) -> list[Tensor]:
    hidden = hidden.clone().requires_grad_()
    output = run(module, hidden) if run is not None else module(hidden)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    gradients = torch.autograd.grad((output * weights).sum(), [hidden, *module.parameters()])
    return [output.detach(), *gradients]


@pytest.mark.parametrize("kind", list(SERVED))
def test_what_is_served_is_found_in_every_architecture(kind: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path, kind))
    fused = set(fuse(model))
    norms = {name for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")}
    feed_forwards = {name for name, module in model.named_modules() if name.endswith("mlp")}
    served = feed_forwards if kind not in {*WITHOUT, *LAYER_NORMS} else set()
    attention = {name for name, _ in model.named_modules() if name.endswith(("self_attn", "attention"))}
    if kind in ("gpt2", "cohere"):  # without rotation; of neighbours, not of halves
        attention = set()
    projections = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert fused == norms | served | attention | projections
    assert bool(norms) == (kind not in (*LAYER_NORMS, "cohere"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        _norm,
        lambda: _norm(Gemma2RMSNorm),
        _feed_forward,
        lambda: nn.Linear(16, 24),
        lambda: nn.Linear(16, 24, bias=False),
    ],
    ids=["llama norm", "gemma norm", "feed-forward", "projection with bias", "projection"],
)
def test_values_and_gradients_are_the_librarys(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = make().to(dtype)
    size = next(iter(module.parameters())).shape[-1]
    hidden = 3 * torch.randn(2, 30, size, dtype=dtype)
    exact = make().double()
    exact.load_state_dict(module.state_dict())
    exact_values = _values_and_gradients(exact, hidden.double(), _written_out)
    expected = _values_and_gradients(module, hidden)
    assert fuse(module)[0] == ""
    actual = _values_and_gradients(module, hidden)
    for ours, library, true in zip(actual, expected, exact_values, strict=True):
        assert ours.dtype == library.dtype == dtype
        error = (ours.double() - true).norm() / true.norm()
        assert error <= 1.1 * (library.double() - true).norm() / true.norm() + 1e-7


class RoundsLast(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * normal).to(hidden_states.dtype)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, RoundsLast, Gemma2RMSNorm])
def test_a_norm_rounds_where_its_class_does(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    norm = _norm(kind).bfloat16()
    hidden = torch.randn(400, 24, dtype=torch.bfloat16)
    library = norm(hidden)
    assert fuse(norm) == [""]
    assert (norm(hidden) == library).float().mean() > 0.999


@pytest.mark.parametrize(("offset", "rounds_first"), [(0.0, True), (0.0, False), (1.0, False)])
def test_gradients_of_the_norm_are_exact(offset: float, rounds_first: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 0.1, offset, rounds_first), (x, weight))


def test_gradients_of_the_rotation_are_exact() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 2, 1, 4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: Rotation.apply(x, cos, sin), (x,))


def _renewed(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


class Calls:
    """Counts the calls of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.count = function, 0

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        return self.function(*arguments)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fused_model_alone_is_rotated_by_ours(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's function belongs to a file, and another model of that file is none of ours."""
    stand_in = modeling_llama.apply_rotary_pos_emb
    library = Calls(getattr(stand_in, "stands_in_for", stand_in))
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", library)
    register("sdpa")
    folder = save_tiny_model(tmp_path, "llama")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = load_model(folder, ModelSection(path=str(folder), dtype="float32"))
    stand_in = modeling_llama.apply_rotary_pos_emb
    model.train()
    if checkpointing:
        checkpoint_activations(model, dropout=False)
    for module in model.modules():  # as ZeRO-3 does, which hands on other tensors than a module returns
        module.register_forward_hook(lambda _, inputs, output: tree_map_only(Tensor, _renewed, output))
    ours = Calls(Rotation.forward)
    monkeypatch.setattr(Rotation, "forward", ours)
    library.count = 0
    ids = torch.arange(3, 12).numpy().astype("int32")
    batch = collate([PromptCompletions(ids, (ids[:4], ids[2:]))], "shared")

    model(batch).sum().backward()
    layers = 2
    assert (ours.count, library.count) == (2 * layers * (1 + checkpointing), 0), "queries and keys of each layer"
    ours.count = 0
    with torch.no_grad():
        model(batch, plain=True)
        assert (ours.count, library.count) == (0, layers)
        plain(batch.input_ids)
        assert (ours.count, library.count) == (0, 2 * layers)
    load_model(folder, ModelSection(path=str(folder), dtype="float32"))
    assert modeling_llama.apply_rotary_pos_emb is stand_in, "one a file"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_rotates_as_the_library_does(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 7, 8, dtype=dtype), torch.randn(1, 2, 7, 8, dtype=dtype)
    cos, sin = torch.randn(2, 1, 7, 8).to(dtype)
    library = getattr(modeling_llama.apply_rotary_pos_emb, "stands_in_for", modeling_llama.apply_rotary_pos_emb)
    rotate = _stand_in(library)
    expected = rotate(query, key, cos, sin)
    cos.of_fused_model = True  # type: ignore[attr-defined]
    for ours, theirs in zip(rotate(query, key, cos, sin), expected, strict=True):
        assert ours.dtype == dtype
        assert torch.allclose(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_angles_of_another_precision_are_left_to_the_library() -> None:
    """OLMo 2 rotates in fp32, and goes back to bf16."""
    rotate = _stand_in(
        getattr(modeling_olmo2.apply_rotary_pos_emb, "stands_in_for", modeling_olmo2.apply_rotary_pos_emb)
    )
    query = torch.randn(1, 4, 7, 8, dtype=torch.bfloat16)
    cos, sin = torch.randn(2, 1, 7, 8)
    cos.of_fused_model = True  # type: ignore[attr-defined]
    assert rotate(query, query, cos, sin)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("biased", ["", "gate", "up", "down"])
def test_gradients_of_projections_and_feed_forwards_are_exact(biased: str) -> None:
    torch.manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def weight_and_bias(name: str, outputs: int, inputs: int) -> tuple[Tensor, Tensor | None]:
        return randn(outputs, inputs), randn(outputs) if name == biased else None

    assert torch.autograd.gradcheck(Projection.apply, (randn(2, 3, 4), *weight_and_bias("gate", 5, 4)))
    assert torch.autograd.gradcheck(Projection.apply, (randn(4), *weight_and_bias("gate", 5, 4)))
    gate, up, down = weight_and_bias("gate", 5, 4), weight_and_bias("up", 5, 4), weight_and_bias("down", 4, 5)
    assert torch.autograd.gradcheck(FeedForward.apply, (randn(2, 3, 4), *gate, *up, *down))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_what_a_projection_gives_may_be_changed_in_place(lead: tuple[int, ...], bias: bool) -> None:
    """As Llama 4 does with the output of its shared expert."""
    projection = nn.Linear(4, 5, bias=bias)
    hidden = torch.randn(*lead, 4)
    expected = torch.autograd.grad(projection(hidden).mul_(2).sum(), projection.weight)
    fuse(projection)
    actual = torch.autograd.grad(projection(hidden).mul_(2).sum(), projection.weight)
    assert torch.allclose(actual[0], expected[0])


@pytest.mark.parametrize("module", [nn.Linear(16, 16), nn.Linear(16, 16, bias=False), _feed_forward()])
def test_an_expert_without_tokens_computes_nothing(module: nn.Module) -> None:
    assert "" in fuse(module)
    output = module(torch.zeros(0, 16))
    assert output.shape == (0, 16)
    output.sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


class Shifted(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = super().forward(hidden_states) + 1e-4
        return output


class NeedsMore(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = super().forward(hidden_states) * self.gain
        return output


class Adapted(nn.Linear):
    """A projection with something of its own."""


def _adapted_feed_forward() -> nn.Module:
    feed_forward = _feed_forward()
    feed_forward.up_proj = Adapted(16, 40)  # type: ignore[assignment]
    return feed_forward


class Gated(LlamaRMSNorm):  # type: ignore[misc]
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(
    "make",
    [
        lambda: _norm(Shifted),
        lambda: _norm(NeedsMore),
        lambda: _norm(Gated),
        lambda: nn.LayerNorm(24, bias=False),
        lambda: _feed_forward("gelu"),
        _adapted_feed_forward,
        lambda: Adapted(16, 24),
    ],
    ids=[
        *("another value", "what is unknown", "two inputs", "layer norm", "another activation"),
        *("another projection inside", "another projection"),
    ],
)
def test_what_computes_something_else_stays_as_it_is(make: Callable[[], nn.Module]) -> None:
    module = make()
    assert "" not in fuse(module)
    assert "forward" not in vars(module)


def test_the_search_draws_no_random_numbers_and_touches_no_weight() -> None:
    model = nn.ModuleList([_norm(), _feed_forward()])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert fuse(model) == ["0", "1", "1.gate_proj", "1.up_proj", "1.down_proj"]
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _saved_bytes(module: nn.Module, hidden: Tensor) -> int:
    """Bytes that the backward pass finds again, parameters and input apart."""
    given = {tensor.data_ptr() for tensor in (hidden, *module.parameters())}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in given:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = module(hidden)
    assert output.requires_grad
    return sum(saved.values())


def test_less_is_kept_for_the_backward_pass() -> None:
    hidden = torch.randn(1, 100, 24, requires_grad=True)
    norm = _norm()
    library = _saved_bytes(norm, hidden)
    fuse(norm)
    assert library > hidden.nbytes
    assert _saved_bytes(norm, hidden) == 100 * 4, "one number a row"

    hidden = torch.randn(1, 100, 16, requires_grad=True)
    feed_forward = _feed_forward()
    fuse(feed_forward)
    inner = 100 * 40 * 4
    with library_code():
        assert _saved_bytes(feed_forward, hidden) == 4 * inner
    assert _saved_bytes(feed_forward, hidden) == 2 * inner, "gate and up, not their product"


def test_the_plain_form_runs_the_librarys_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the start-up check, which compares with it, sees a mistake in ours."""
    register("sdpa")
    model = load_model(save_tiny_model(tmp_path, "llama"), ModelSection(path=str(tmp_path), dtype="float32"))
    ids = torch.arange(3, 12).numpy().astype("int32")
    batch = collate([PromptCompletions(ids, (ids[:4], ids[2:]))], "padded")
    right = model(batch)
    plain_forward = RMSNorm.forward

    def wrong(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, *rest: Any) -> Tensor:
        return plain_forward(ctx, x, weight, epsilon + 0.1, *rest)

    monkeypatch.setattr(RMSNorm, "forward", wrong)
    assert not torch.allclose(model(batch), right, atol=1e-2)
    assert torch.allclose(model(batch, plain=True), right, atol=1e-5)


def test_a_machine_without_triton_or_a_gpu_says_why_its_gpu_would_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything may go wrong, from a missing package to a missing compiler: training goes on without kernels."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "dpo_scale.model.triton_kernels", raising=False)
    monkeypatch.delattr(model_package, "triton_kernels", raising=False)
    _kernels.cache_clear()
    try:
        assert _kernels()[0] is None
        assert why_no_kernels(torch.device("cuda")).startswith("ModuleNotFoundError: ")
        assert why_no_kernels(torch.device("cpu")) == ""
    finally:
        _kernels.cache_clear()


def test_what_keeps_triton_from_running_is_said_with_the_layout() -> None:
    lines = LayoutChoice("shared", 0.0, (), "RuntimeError: no C compiler").describe("policy")
    assert lines[1] == "  slower than it could be, Triton does not run: RuntimeError: no C compiler"
    assert len(LayoutChoice("shared", 0.0, (), "").describe("policy")) == 1
