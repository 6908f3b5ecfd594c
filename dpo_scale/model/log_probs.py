"""Token ids -> log-probs of completion tokens. The one path that scoring, training and evaluation share.

The LM head runs on the hidden states that predict completion tokens and on nothing else, in chunks, inside one
autograd function. Matrix products accumulate in fp32 and everything after them is fp32. Of the [tokens, vocabulary]
matrix no more than a chunk exists at once.

Shape suffixes: B rows, T tokens of a row, C completion tokens, c those of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpo_scale.data.layouts import MicroBatch
from dpo_scale.model import products
from dpo_scale.model.fused import fuse, kernels_for, library_code
from dpo_scale.model.last_layer import skip_unread_positions

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits in a chunk, by device type: 64 MiB and 512 MiB of fp32."""

PLAIN_CHUNK = 1024
"""Tokens whose logits the plain form turns into fp32 log-probs at once."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its head's output: `softcap * tanh(scale * x / softcap)`, or only the scale."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of_config(cls, config: Any) -> LogitTransform:
        """Read the settings under which Hugging Face models scale or cap logits (Cohere, Granite, Gemma, ...)."""
        scale = 1.0
        for name in ("logit_scale", "lm_head_multiplier"):
            scale *= getattr(config, name, None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def forward(self, logits: Tensor) -> Tensor:
        """Transform raw logits, in place."""
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def backward(self, grad: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient of the raw logits from that of the transformed ones, in place; overwrites the logits."""
        if self.softcap:
            assert logits is not None
            grad *= logits.div_(self.softcap).square_().neg_().add_(1)
        if self.scale != 1.0:
            grad *= self.scale
        return grad


class ChunkedLogProbs(torch.autograd.Function):
    """fp32 log-probs [C] of `targets_C` under the head, with exact gradients of hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_C: Tensor,
        transform: LogitTransform,
    ) -> Tensor:
        dtype = torch.promote_types(hidden_CH.dtype, torch.float32)
        logps_C = hidden_CH.new_empty(len(targets_C), dtype=dtype)
        lse_C = torch.empty_like(logps_C)
        head = _Head(weight_VH, bias_V, transform)
        kernels = head.kernels
        # All chunks share the memory of the first: fresh memory for each costs a CPU a tenth of the time.
        chunk_cV, highest_c = None, None
        for rows in _chunks(len(targets_C), len(weight_VH), hidden_CH.device):
            values_cV = head.logits(hidden_CH[rows], chunk_cV)
            chunk_cV = values_cV if chunk_cV is None else chunk_cV
            if kernels is not None:
                logps_C[rows], lse_C[rows] = kernels.log_softmax_at(values_cV, targets_C[rows])
                continue
            target_c = values_cV.gather(1, targets_C[rows, None])[:, 0]
            highest_c = values_cV.amax(1)
            # In place, from logits to softmax up to the factor exp(highest - lse).
            values_cV.sub_(highest_c[:, None]).exp_()
            log_sum_c = values_cV.sum(1).log_()
            lse_C[rows] = highest_c + log_sum_c
            logps_C[rows] = (target_c - highest_c) - log_sum_c
        # The weight is saved as the parameter that it is: ZeRO-3 gathers it again before the backward pass.
        ctx.save_for_backward(hidden_CH, weight_VH, bias_V, targets_C, lse_C)
        # The backward pass begins with the last chunk: kept, it costs no more memory than its like there, and saves a
        # product. Autograd would hold a saved tensor beside the chunks that follow, so it is the context's own.
        keeps = any(ctx.needs_input_grad) and not transform.softcap
        ctx.last_chunk = (chunk_cV, highest_c) if keeps else (None, None)
        ctx.transform = transform
        return logps_C

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_C,) = grad_outputs
        hidden_CH, weight_VH, bias_V, targets_C, lse_C = ctx.saved_tensors
        head = _Head(weight_VH, bias_V, ctx.transform)
        grad_hidden_CH = torch.empty_like(hidden_CH)
        chunks = _chunks(len(targets_C), len(weight_VH), hidden_CH.device)
        wants_weight = ctx.needs_input_grad[1]
        # fp32 over all chunks: sums of bf16 chunks would lose what small gradients add
        empty = torch.empty_like if chunks else torch.zeros_like
        grad_weight_VH = empty(weight_VH, dtype=grad_C.dtype) if wants_weight else None
        grad_bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=grad_C.dtype)
        chunk_cV, highest_c = ctx.last_chunk
        ctx.last_chunk = None, None  # its gradient takes its place: another backward pass computes it anew
        is_kept = chunk_cV is not None
        for number, rows in enumerate(chunks[::-1] if is_kept else chunks):  # without the last, the largest comes first
            hidden_cH = hidden_CH[rows]
            values_cV = chunk_cV[: len(hidden_cH)] if is_kept else head.logits(hidden_cH, chunk_cV)
            chunk_cV = values_cV if chunk_cV is None else chunk_cV
            # d logp / d logits = one_hot(target) - softmax(logits) = -scale_c * residual_cV. Factors of whole rows are
            # applied to hidden states, of which there are fewer than logits.
            if head.kernels is not None:
                residual_cV = head.kernels.softmax_less_target(values_cV, targets_C[rows], lse_C[rows], weight_VH.dtype)
                factor_c = -grad_C[rows] * ctx.transform.scale
            else:
                residual_cV, scale_c = _residual(values_cV, targets_C[rows], lse_C[rows], highest_c, ctx.transform)
                factor_c = -grad_C[rows] * scale_c
            if grad_bias_V is not None:
                grad_bias_V += factor_c @ residual_cV
            residual_cV = head.operand(residual_cV)
            grad_hidden_CH[rows] = head.back_to_hidden(residual_cV).mul_(factor_c[:, None])
            if grad_weight_VH is not None:
                head.add_weight_grad(grad_weight_VH, residual_cV, factor_c[:, None] * hidden_cH, is_first=number == 0)
            del residual_cV  # else a GPU's, in the model's dtype, would lie beside the next chunk's
            is_kept, highest_c = False, None
        return grad_hidden_CH, grad_weight_VH, grad_bias_V, None, None


def _residual(
    values_cV: Tensor, targets_c: Tensor, lse_c: Tensor, highest_c: Tensor | None, transform: LogitTransform
) -> tuple[Tensor, Tensor]:
    """`(softmax(logits) - one_hot(target)) / scale_c` with the slope of the transform, and scale_c; fp32, in place.

    Args:
        values_cV: `exp(logits - highest_c)` of the forward pass; without `highest_c`, logits.
    """
    logits_cV = None
    if highest_c is None:
        logits_cV = values_cV.clone() if transform.softcap else None
        values_cV.sub_(lse_c[:, None]).exp_()
        scale_c = torch.ones_like(lse_c)
    else:
        scale_c = torch.exp(highest_c - lse_c)
    values_cV.scatter_add_(1, targets_c[:, None], -scale_c.reciprocal()[:, None])
    return transform.backward(values_cV, logits_cV), scale_c


class _Head:
    """Matrix products of the head with operands in the model's dtype and results in fp32.

    A GPU does that natively; a CPU gets the weight converted once a call.
    """

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, transform: LogitTransform) -> None:
        self._native = weight_VH.device.type == "cuda" and weight_VH.dtype != torch.float32
        self._weight_VH = weight_VH if self._native else _at_least_fp32(weight_VH)
        self._bias_V = None if bias_V is None else _at_least_fp32(bias_V)
        self.transform = transform
        one_pass = self._native and bias_V is None and not transform.softcap
        self.kernels: ModuleType | None = kernels_for(weight_VH) if one_pass else None
        """What goes over the logits in one pass, where it can."""

    def logits(self, hidden_cH: Tensor, chunk_cV: Tensor | None) -> Tensor:
        """Logits, in the first rows of the chunk, where there is one."""
        out_cV = None if chunk_cV is None else chunk_cV[: len(hidden_cH)]
        logits_cV = self._product(hidden_cH, self._weight_VH.t(), out_cV)
        if self._bias_V is not None:
            logits_cV += self._bias_V
        return self.transform.forward(logits_cV)

    def operand(self, values: Tensor) -> Tensor:
        """As a factor of the products."""
        return values.to(self._weight_VH.dtype)

    def back_to_hidden(self, residual_cV: Tensor) -> Tensor:
        return self._product(residual_cV, self._weight_VH)

    def add_weight_grad(self, total_VH: Tensor, residual_cV: Tensor, hidden_cH: Tensor, *, is_first: bool) -> None:
        """Add a chunk's gradient to the total, which the first one begins."""
        hidden_cH = self.operand(hidden_cH)
        if is_first:
            self._product(residual_cV.t(), hidden_cH, total_VH)
        elif self._native:
            torch.addmm(total_VH, residual_cV.t(), hidden_cH, out_dtype=total_VH.dtype, out=total_VH)
        else:
            products.matmul_into(total_VH, residual_cV.t(), hidden_cH, add=True)

    def _product(self, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
        if self._native:
            return torch.mm(left, right, out_dtype=torch.float32, out=out)
        if out is None:
            return products.matmul(_at_least_fp32(left), right)
        products.matmul_into(out, _at_least_fp32(left), right)
        return out


def _at_least_fp32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def chunk_tokens(num_tokens: int, vocabulary: int, elements: int) -> int:
    """Tokens of a chunk: chunks are as few as hold no more than that many logits, and as even as they can be."""
    most = max(16, elements // vocabulary)
    number = max(1, -(-num_tokens // most))
    return max(1, -(-num_tokens // number))


def _chunks(num_tokens: int, vocabulary: int, device: torch.device) -> list[slice]:
    size = chunk_tokens(num_tokens, vocabulary, CHUNK_ELEMENTS.get(device.type, 2**27))
    return [slice(start, start + size) for start in range(0, num_tokens, size)]


class CompletionLogProbs(nn.Module):
    """A causal language model whose forward takes a `MicroBatch` and gives completion log-probs, fp32 [C].

    The head is called as the module that it is, so that ZeRO-3's hooks gather and release its weight.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        base = model.base_model
        # Some classes (Llama 4) name a base that they do not have, and so give themselves.
        decoder = model.model if base is model else base
        self._decoder = cast("tuple[nn.Module]", (decoder,))  # in a tuple: no second name for the parameters
        transform = LogitTransform.of_config(model.config.get_text_config())  # type: ignore[union-attr, operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
        self._takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
        fuse(model)
        skip_unread_positions(model)
        plain_forward = head.forward

        def forward(hidden: Tensor, targets_C: Tensor | None = None) -> Tensor:
            if targets_C is None:
                logits: Tensor = plain_forward(hidden)
                return logits
            logps_C: Tensor = ChunkedLogProbs.apply(  # type: ignore[no-untyped-call]
                hidden, head.weight, getattr(head, "bias", None), targets_C, transform
            )
            return logps_C

        head.forward = forward

    def forward(self, batch: MicroBatch, *, plain: bool = False) -> Tensor:
        """Completion log-probs, fp32 [C].

        `plain` takes the library's own code and its logits, the oracle of the start-up check.
        """
        kwargs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        kwargs["position_ids"] = batch.position_ids
        kwargs["attention_mask"] = batch.attention_mask
        if batch.segments is not None:
            kwargs["segments"] = batch.segments
        if plain:
            with library_code():
                return self._plain(kwargs, batch)
        hidden_BTH = self._decoder[0](**kwargs).last_hidden_state
        hidden_CH = hidden_BTH.flatten(0, 1).index_select(0, batch.predictors)
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        logps_C: Tensor = head(hidden_CH, batch.targets)
        return logps_C

    def _plain(self, kwargs: dict[str, Any], batch: MicroBatch) -> Tensor:
        # Of a long sequence and a large vocabulary, all logits would need more memory than a training step.
        if self._takes_positions and len(batch.input_ids) == 1:
            logits_CV = self.model(**kwargs, logits_to_keep=batch.predictors).logits[0]
        else:
            logits_CV = self.model(**kwargs).logits.flatten(0, 1)[batch.predictors]
        chunks = zip(logits_CV.split(PLAIN_CHUNK), batch.targets.split(PLAIN_CHUNK), strict=True)
        return torch.cat(
            [logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0] for logits, targets in chunks]
        )
