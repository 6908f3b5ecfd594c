"""The activations of a model, found by running the model itself, forward and backward, on tensors without storage.

On the meta device nothing is computed and nothing allocated, but every operation makes the tensors that it would make.
Their sizes and lifetimes are those of a real run, for any architecture, with or without checkpointing. Of decoder
layers that are alike one is run.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_scale.data.layouts import Layout, MicroBatch, PromptCompletions, collate
from dpo_scale.data.token_pairs import Lengths
from dpo_scale.errors import UserError
from dpo_scale.model.attention import ATTENTION, Kernel, register
from dpo_scale.model.fused import fuse
from dpo_scale.model.last_layer import decoder_layers, skip_unread_positions
from dpo_scale.model.loading import switch_dropout_off
from dpo_scale.model.log_probs import LogitTransform
from dpo_scale.operations.memory import Activations, Head, MicroBatchShape, UnitMemory
from dpo_scale.operations.zero_memory import Parameter, Unit


@dataclass(frozen=True)
class MetaModel:
    """A model without storage, and how its parameters follow each other."""

    model: nn.Module
    layers: nn.ModuleList
    units: tuple[Unit, ...]
    kinds: tuple[int, ...]
    """For each decoder layer, the first layer that is like it."""

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def build_meta_model(config: Any, dtype: torch.dtype, kernel: Kernel, *, trust_remote_code: bool = False) -> MetaModel:
    """The model of a configuration on the meta device, with the attention kernel of the machine that is planned for.

    Raises UserError where its layers are not found.
    """
    register(kernel)
    build = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, **build)
        except (KeyError, ValueError):  # models that look their attention up in a table of their own
            model = AutoModelForCausalLM.from_config(config, **build)
    switch_dropout_off(model)
    fuse(model)
    layers = decoder_layers(model)
    if layers is None:
        raise UserError(f"{type(model).__name__}: no list of its decoder layers is found in it; it cannot be planned")
    forms = [_form(layer) for layer in layers]
    if skip_unread_positions(model):
        forms[-1] = ("last", *forms[-1])
    return MetaModel(model, layers, _units(model, layers), tuple(forms.index(form) for form in forms))


def _form(layer: nn.Module) -> tuple[Any, ...]:
    return (type(layer), *((type(m), *(p.shape for p in m.parameters(recurse=False))) for m in layer.modules()))


def _units(model: nn.Module, layers: nn.ModuleList) -> tuple[Unit, ...]:
    keys = {id(parameter): number for number, parameter in enumerate(model.parameters())}

    def modules(of: Sequence[nn.Module]) -> tuple[tuple[Parameter, ...], ...]:
        own = ([Parameter(keys[id(p)], p.numel()) for p in module.parameters(recurse=False)] for module in of)
        return tuple(tuple(parameters) for parameters in own if parameters)

    def of_layer(layer: nn.Module) -> tuple[tuple[Parameter, ...], ...]:
        whole = modules(list(layer.modules()))
        # one leaf to ZeRO-3, see `distributed.engines.mark_leaves`
        return (sum(whole, ()),) if isinstance(layer, GradientCheckpointingLayer) else whole

    inside = {id(module) for module in layers.modules()}
    order = list(model.modules())
    first = next(number for number, module in enumerate(order) if module is layers)
    head = model.get_output_embeddings()  # type: ignore[operator]
    before = [module for module in order[:first] if module is not head]
    after = [module for module in order[first:] if id(module) not in inside and module is not head]
    return (
        Unit("embedding", modules(before)),
        *(Unit(f"layer {n}", of_layer(layer), recomputes=True) for n, layer in enumerate(layers)),
        Unit("norm and head", modules([*after, head])),
    )


def trace(meta: MetaModel, batch: MicroBatch, *, checkpointing: bool = False, training: bool = True) -> Activations:
    """Run a micro-batch, of which only the shape counts, through the decoder without computing anything.

    Args:
        checkpointing: recompute every layer in the backward pass.
        training: with a backward pass; else the forward keeps nothing.
    """
    model, layers = meta.model, meta.layers
    everything = list(layers)
    kept = sorted(set(meta.kinds))
    del layers[:]
    layers.extend(everything[n] for n in kept)
    batch = batch.to("meta")
    try:
        with _checkpointing(model, checkpointing), torch.set_grad_enabled(training):
            model.train(training)
            seen = _run(model, layers, batch)
    finally:
        del layers[:]
        layers.extend(everything)
    embedding, *by_kind, norm = seen
    of_kind = dict(zip(kept, by_kind, strict=True))
    return Activations(batch.input_ids.numel(), (embedding, *(of_kind[kind] for kind in meta.kinds), norm))


@contextmanager
def _checkpointing(model: nn.Module, wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of new names that transformers 5.17 does not have
        model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()  # type: ignore[operator]


def _run(model: nn.Module, layers: nn.ModuleList, batch: MicroBatch) -> list[UnitMemory]:
    """Forward and backward of the decoder; the memory of the embedding, of each layer in the list, and of the norm."""
    tracker = _Tracker(model, padded=batch.attention_mask is not None)
    handles = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter in model.parameters()]
    handles += [layer.register_forward_pre_hook(lambda _, inputs: tracker.next_unit(inputs)) for layer in layers]
    handles.append(layers[-1].register_forward_hook(lambda *call: tracker.next_unit(call[-1])))
    base = model.base_model
    decoder = model.model if base is model else base
    kwargs: dict[str, Any] = {"position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
    if batch.segments is not None:
        kwargs["segments"] = batch.segments
    try:
        with tracker, _fused_attention():
            output = decoder(input_ids=batch.input_ids, use_cache=False, **kwargs)  # type: ignore[operator]
            loss = _Loss.apply(output.last_hidden_state)  # type: ignore[no-untyped-call]
            del output
            tracker.end_forward()
            if torch.is_grad_enabled():
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return tracker.units()


def _drop_gradient(parameter: Tensor) -> None:
    """Whole gradients are ZeRO's, see `zero_memory.gradient_bytes`."""
    parameter.grad = None


class _Loss(torch.autograd.Function):
    """Any scalar: its backward makes the gradient of the hidden states, which nobody else holds."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.shape = hidden.shape
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0].new_empty(ctx.shape)


class _Tracker(TorchDispatchMode):
    """Bytes of all storages that are alive, at their most in each unit's forward and backward."""

    def __init__(self, model: nn.Module, *, padded: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._padded = padded
        self._live = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        given = (*model.parameters(), *model.buffers())
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._entered, self._left = [0], [0]
        self._forward, self._backward = [0], [0]
        self._unit, self._backwards = 0, False

    def next_unit(self, entering: Any) -> None:
        """Called between two units of the forward with what goes from one to the other.

        A recomputation in the backward pass is no new unit.
        """
        if self._backwards:
            return
        self._left[-1] = self._live
        for peaks in (self._entered, self._left, self._forward, self._backward):
            peaks.append(self._live)
        number = self._unit = len(self._entered) - 1

        def leave_backward(gradient: Tensor) -> None:
            self._unit = number - 1
            self._note()

        for value in tree_leaves(entering):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(leave_backward)  # its gradient is complete when the backward of what follows is

    def end_forward(self) -> None:
        """From here on the backward pass runs."""
        self._left[-1] = self._live
        self._backwards = True
        self._note()

    def units(self) -> list[UnitMemory]:
        """What was seen, in the order of the forward."""
        columns = zip(self._entered, self._left, self._forward, self._backward, strict=True)
        return [UnitMemory(left - start, fwd - start, bwd - start) for start, left, fwd, bwd in columns]

    def _note(self) -> None:
        peaks = self._backward if self._backwards else self._forward
        peaks[self._unit] = max(peaks[self._unit], self._live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Of values a decoder asks with a mask whether that masks nothing, and else whether positions never restart
            # within a row, to build masks that segments make needless.
            return not self._padded
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self._watch(value.untyped_storage())
        return output

    def _watch(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or key in self._given:
            return

        def forget(_: Any) -> None:
            self._live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, forget)
        self._live += size
        self._note()


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Scaled dot-product attention would make the matrix of scores on the meta device; inside, a stand-in does not.

    A function mode of torch's own is not in force where checkpointing recomputes.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        output: Tensor = _SavedByAttention.apply(query, key, value, attn_mask)  # type: ignore[no-untyped-call]
        return output

    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class _SavedByAttention(torch.autograd.Function):
    """What a fused kernel keeps: queries, keys, values, output and the log-sum-exp of each row of scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, lse, mask)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def micro_batch_shape(
    meta: MetaModel, lengths: Lengths, layout: Layout, checked_tokens: int, *, checkpointing: bool, training: bool
) -> MicroBatchShape:
    """What the memory of a micro-batch depends on.

    Its activations are the difference between twice its pairs and once: what remains are whole gradients, which are
    ZeRO's.

    Args:
        lengths: int64 [pairs, 3], tokens of prompt, chosen and rejected.
        checked_tokens: of the start-up check, see `memory.layout_check_bytes`.
    """
    once = [
        PromptCompletions(np.zeros(prompt, np.int32), (np.zeros(chosen, np.int32), np.zeros(rejected, np.int32)))
        for prompt, chosen, rejected in lengths.tolist()
    ]
    batch, twice = collate(once, layout, pad_id=0), collate(once * 2, layout, pad_id=0)
    head: Any = meta.model.get_output_embeddings()  # type: ignore[operator]
    vocabulary, hidden = head.weight.shape
    small, large = (trace(meta, b, checkpointing=checkpointing, training=training) for b in (batch, twice))
    capped = LogitTransform.of_config(meta.model.config.get_text_config()).softcap is not None  # type: ignore[union-attr, operator]
    return MicroBatchShape(large - small, Head(batch.targets.numel(), hidden, vocabulary, capped), checked_tokens)
