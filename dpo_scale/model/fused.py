"""Norms, gated feed-forwards, rotary embeddings and projections as one autograd function each: less is kept for the
backward pass, fewer passes over memory are made, and the host has less to do, than with the library's code.

Names only nominate what is replaced: a module is, if on random numbers it gives what ours gives; plain `nn.Linear` is
by its type. The plain form, which the start-up check compares with, runs the library's own code; see `library_code`.
On a GPU each pass is one kernel of `triton_kernels`; what is written here is what they compute, and runs elsewhere.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_scale.model import products

Forward = Callable[[Any, Tensor], Tensor]
"""What a module computes of hidden states [..., H]."""

_as_in_library = False


@contextmanager
def library_code() -> Iterator[None]:
    """Inside, every module runs the code that its class has."""
    global _as_in_library
    before, _as_in_library = _as_in_library, True
    try:
        yield
    finally:
        _as_in_library = before


def kernels_for(x: Tensor) -> ModuleType | None:
    """The kernels, if they take this tensor and run on this machine."""
    return _kernels()[0] if x.is_cuda and x.dtype != torch.float64 else None


def why_no_kernels(device: torch.device) -> str:
    """Why a GPU here runs one operation after the other; empty where it does not, and on CPUs."""
    return _kernels()[1] if device.type == "cuda" else ""


@cache
def _kernels() -> tuple[ModuleType | None, str]:
    try:
        from dpo_scale.model import triton_kernels  # loads Triton, which only builds for GPUs have

        triton_kernels.try_out()
    except Exception as error:  # whatever an import, a compiler, a driver or a cache folder may raise
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return triton_kernels, ""


def fuse(model: nn.Module) -> list[str]:
    """Replace the forward of every module that is served; parameters, their names and the module's class stay.

    Returns the names of those modules.
    """
    fused = []
    for name, module in model.named_modules():
        ours = _norm_like(module) or _feed_forward_like(module) or (_project if type(module) is nn.Linear else None)
        if ours is not None:
            replace_forward(module, ours)
        if ours is not None or _rotates_by_ours(module):
            fused.append(name)
    return fused


def replace_forward(module: nn.Module, ours: Forward) -> None:
    """Let the module compute ours, but for what runs inside of `library_code`."""
    library_forward = module.forward

    def forward(*inputs: Tensor, **named: Tensor) -> Tensor:
        (hidden,) = (*inputs, *named.values())
        output: Tensor = library_forward(hidden) if _as_in_library else ours(module, hidden)
        return output

    module.forward = forward


def _twin(module: nn.Module) -> nn.Module:
    """A module of the same class and settings, still without parameters and children; its own may be sharded."""
    twin: nn.Module = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    for name, value in vars(module).items():
        twin.__dict__.setdefault(name, value)
    return twin


def _agree(ours: Forward, twin: nn.Module, hidden: Tensor) -> bool:
    """Whether ours is what the class computes, in fp32 and, nearly everywhere to the last bit, in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        twin.to(dtype)
        with torch.no_grad():
            try:
                expected, actual = twin(hidden.to(dtype)), ours(twin, hidden.to(dtype))
            except Exception:  # whatever a class of which nothing is known may raise without what was left out
                return False
        if not isinstance(expected, Tensor) or expected.shape != actual.shape or expected.dtype != actual.dtype:
            return False
        if dtype == torch.float32 and not torch.allclose(actual, expected, rtol=1e-5, atol=1e-6):
            return False
        if (actual != expected).float().mean() > 0.02 and dtype == torch.bfloat16:
            return False
    return True


def takes_hidden_states_alone(module: nn.Module) -> bool:
    """Whether the forward of the module's class has one argument beside the module."""
    inputs = inspect.signature(type(module).forward).parameters.values()
    return [each.kind for each in inputs] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2


# --- norms -------------------------------------------------------------------------------------


def _norm_like(module: nn.Module) -> Forward | None:
    """The norm that the module computes, or None if it is not one of ours."""
    parameters = dict(module.named_parameters(recurse=False))
    settings = [name for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)]
    if set(parameters) != {"weight"} or not settings or not takes_hidden_states_alone(module):
        return None
    epsilon: float = getattr(module, settings[0])
    random = torch.Generator().manual_seed(0)
    twin = _twin(module)
    twin.weight = nn.Parameter(torch.randn(64, generator=random, device="cpu"))
    hidden = torch.randn(8, 50, 64, generator=random, device="cpu")
    for offset, rounds_first in ((0.0, True), (0.0, False), (1.0, False)):

        def norm(module: Any, hidden: Tensor, *, offset: float = offset, rounds_first: bool = rounds_first) -> Tensor:
            output: Tensor = RMSNorm.apply(hidden, module.weight, epsilon, offset, rounds_first)  # type: ignore[no-untyped-call]
            return output

        if _agree(norm, twin, hidden):
            return norm
    return None


class RMSNorm(torch.autograd.Function):
    """`x / sqrt(mean(x^2) + eps) * (offset + weight)` over the last dimension (Zhang & Sennrich 2019, equation 4).

    It is computed in fp32 at least; `rounds_first` rounds to the dtype of x before the weight is applied (Llama), else
    after (Gemma). The backward pass keeps x and one number a row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float, rounds_first: bool) -> Tensor:
        ctx.offset = offset
        if kernels := kernels_for(x):
            output: Tensor
            output, scale = kernels.rms_norm(x, weight, epsilon, offset, rounds_first)
            ctx.save_for_backward(x, weight, scale)
            return output
        fp32 = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=fp32)
        scale = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normal: Tensor = x * scale
        if rounds_first:
            rounded = normal.to(x.dtype)
            return rounded.mul_(weight) if weight.dtype == x.dtype else rounded * weight
        return normal.mul_(weight.to(fp32) + offset).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        x, weight, scale = ctx.saved_tensors
        if kernels := kernels_for(x):
            return *kernels.rms_norm_backward(grad, x, weight, scale, ctx.offset), None, None, None
        factor = weight.to(scale.dtype) + ctx.offset
        scaled = grad * scale
        product = scaled * x
        grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        mean = (product @ factor).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = scaled.mul_(factor).addcmul_(x.to(scale.dtype), mean.mul_(scale.square()), value=-1)
        return grad_x.to(x.dtype), grad_weight, None, None, None


# --- projections -------------------------------------------------------------------------------


def _project(module: Any, hidden: Tensor) -> Tensor:
    return cast("Tensor", Projection.apply(hidden, module.weight, module.bias))  # type: ignore[no-untyped-call]


class Projection(torch.autograd.Function):
    """`x W^T + b`.

    What is kept is the parameter, which ZeRO-3 gathers again for the backward pass; torch's own would keep a gathered
    copy. DeepSpeed's function for that reads its own signature at every call.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        grad_weight, grad_bias = _weight_and_bias_grads(grad, x, ctx.needs_input_grad[2])
        return products.matmul(grad, weight), grad_weight, grad_bias


def _weight_and_bias_grads(grad: Tensor, x: Tensor, has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Of a projection, from the gradient of what it gave and what it took."""
    grad_TO = _rows(grad)
    return products.matmul(grad_TO.t(), _rows(x)), grad_TO.sum(0) if has_bias else None


def _rows(x: Tensor) -> Tensor:
    """All but the last dimension as one, which a vector has too."""
    return x.reshape(-1, x.shape[-1])


# --- gated feed-forwards -----------------------------------------------------------------------

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def takes_weights_of_children(module: nn.Module) -> bool:
    """Whether the module's forward was replaced by one that reads its children's weights without calling them."""
    return "_takes_weights_of_children" in vars(module)


def _feed_forward_like(module: nn.Module) -> Forward | None:
    """The gated feed-forward that the module computes, or None if it is not ours."""
    children = dict(module.named_children())
    is_gated = set(children) - {"act_fn"} == set(PROJECTIONS) and takes_hidden_states_alone(module)
    if not is_gated or any(type(children[name]) is not nn.Linear for name in PROJECTIONS):
        return None
    random = torch.Generator().manual_seed(0)
    twin = _twin(module)
    twin.act_fn = module.act_fn
    for name in PROJECTIONS:
        projection = nn.Linear(32, 32, bias=False, device="meta")
        projection.weight = nn.Parameter(torch.randn(32, 32, generator=random, device="cpu"))
        setattr(twin, name, projection)
    if not _agree(_feed_forward, twin, torch.randn(8, 50, 32, generator=random, device="cpu")):
        return None
    vars(module)["_takes_weights_of_children"] = True
    return _feed_forward


def _feed_forward(module: Any, hidden: Tensor) -> Tensor:
    projections = [getattr(module, name) for name in PROJECTIONS]
    operands = [operand for each in projections for operand in (each.weight, each.bias)]
    return cast("Tensor", FeedForward.apply(hidden, *operands))  # type: ignore[no-untyped-call]


class FeedForward(torch.autograd.Function):
    """`W_down (silu(W_gate x) * W_up x)`, with biases where there are (Shazeer 2020, equation 6).

    The backward pass keeps x and the two projections, and computes their product again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *operands: Any) -> Tensor:
        gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias = operands
        gate, up = products.linear(x, gate_weight, gate_bias), products.linear(x, up_weight, up_bias)
        ctx.save_for_backward(x, gate, up, gate_weight, up_weight, down_weight)
        kernels = kernels_for(gate)
        gated = kernels.swiglu(gate, up) if kernels else F.silu(gate).mul_(up)
        return products.linear(gated, down_weight, down_bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        x, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        _, _, has_gate_bias, _, has_up_bias, _, has_down_bias = ctx.needs_input_grad
        kernels = kernels_for(gate)
        backward = kernels.swiglu_backward if kernels else _swiglu_backward
        gated, grad_gate, grad_up = backward(products.matmul(grad, down_weight), gate, up)
        of_down = _weight_and_bias_grads(grad, gated, has_down_bias)
        del gated
        of_gate = _weight_and_bias_grads(grad_gate, x, has_gate_bias)
        of_up = _weight_and_bias_grads(grad_up, x, has_up_bias)
        grad_x = products.matmul(_rows(grad_up), up_weight)
        products.matmul_into(grad_x, _rows(grad_gate), gate_weight, add=True)
        return grad_x.view_as(x), *of_gate, *of_up, *of_down


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`silu(gate) * up` again, and the gradients of gate and up; overwrites the gradient of the product."""
    activated = F.silu(gate)
    gated = activated * up
    grad_up = activated.mul_(grad)
    grad_gate = torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad)
    return gated, grad_gate, grad_up


# --- rotary embeddings -------------------------------------------------------------------------

ROTATE = "apply_rotary_pos_emb"
"""The library's name, in each of its files of a model, for what rotates queries and keys."""


def _rotates_by_ours(module: nn.Module) -> bool:
    """Let ours rotate the queries and keys of an attention module. Returns whether it will.

    The function that rotates belongs to a file, not to a module. Ours stands in for it there, and rotates by angles
    that the attention of a fused model was given; to any other it is the library's.
    """
    if not _takes_angles(module) or any(_takes_angles(child) for child in module.modules() if child is not module):
        return False
    file = sys.modules[type(module).__module__]
    library = getattr(file, ROTATE, None)
    if library is None:
        return False
    if not hasattr(library, "stands_in_for"):
        if not _rotates_halves(library):
            return False
        setattr(file, ROTATE, _stand_in(library))
    # Here, not where the angles are made: ZeRO-3 hands on other tensors than a module returns.
    module.register_forward_pre_hook(_mark_angles, with_kwargs=True)
    return True


def _takes_angles(module: nn.Module) -> bool:
    return "position_embeddings" in inspect.signature(module.forward).parameters


def _mark_angles(module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
    angles = named.get("position_embeddings")
    if isinstance(angles, tuple):
        angles[0].of_fused_model = not _as_in_library


def _stand_in(library: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> Any:
        same = query.dtype == cos.dtype and query.shape[-1] == cos.shape[-1]
        if rest or options or not same or not getattr(cos, "of_fused_model", False):
            return library(query, key, cos, sin, *rest, **options)
        cos_B1TD, sin_B1TD = cos.unsqueeze(1), sin.unsqueeze(1)
        return tuple(Rotation.apply(states, cos_B1TD, sin_B1TD) for states in (query, key))  # type: ignore[no-untyped-call]

    rotate.stands_in_for = library  # type: ignore[attr-defined]
    return rotate


def _rotates_halves(library: Callable[..., Any]) -> bool:
    random = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
    query, key, cos, sin = (torch.randn(size, generator=random, device="cpu") for size in sizes)
    try:
        expected = library(query, key, cos, sin)
    except Exception:  # as above
        return False
    cos.of_fused_model = True  # type: ignore[attr-defined]
    pairs = zip(_stand_in(library)(query, key, cos, sin), expected, strict=True)
    return all(torch.allclose(actual, wanted, rtol=1e-5, atol=1e-6) for actual, wanted in pairs)


class Rotation(torch.autograd.Function):
    """`x cos + (-x2, x1) sin` for the halves x1, x2 of the last dimension (Su et al. 2021, equation 34, with the pairs
    of dimensions half a head apart). The backward pass keeps the angles alone.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        if kernels := kernels_for(x):
            rotated: Tensor = kernels.rotate(x, cos, sin)
            return rotated
        (x1, x2), (sin1, sin2) = x.chunk(2, -1), sin.chunk(2, -1)
        output: Tensor = x * cos
        output1, output2 = output.chunk(2, -1)
        output1.addcmul_(x2, sin1, value=-1)
        output2.addcmul_(x1, sin2)
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        cos, sin = ctx.saved_tensors
        if kernels := kernels_for(grad):
            return kernels.rotate(grad, cos, sin, transposed=True), None, None
        (grad1, grad2), (sin1, sin2) = grad.chunk(2, -1), sin.chunk(2, -1)
        output = grad * cos
        output1, output2 = output.chunk(2, -1)
        output1.addcmul_(grad2, sin2)
        output2.addcmul_(grad1, sin1, value=-1)
        return output, None, None
