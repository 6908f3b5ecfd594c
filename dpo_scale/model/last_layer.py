"""The last decoder layer's feed-forward, at the positions whose output is read and nowhere else.

After the last attention no position sees another, and of a prompt only the last token predicts anything. A step of
mostly prompt saves most of that feed-forward, forward and backward, and what it would keep in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dpo_scale.model.fused import replace_forward, takes_hidden_states_alone


def decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    """The list of the model's decoder layers, or None if none is found in it."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(lists, None)


def skip_unread_positions(model: nn.Module) -> nn.Module | None:
    """Let the last layer's feed-forward give zeros where nothing is read; nobody sees them.

    It is what the layer holds that has parts and takes hidden states alone, a dense one or a mixture of experts.
    Returns it, or None if there is none. The start-up check compares with the plain form, which computes everything.
    """
    layers = decoder_layers(model)
    if layers is None:
        return None
    parts = [child for child in layers[-1].children() if any(child.children())]
    feed_forward = next((part for part in parts if takes_hidden_states_alone(part)), None)
    if feed_forward is None:
        return None
    _LastFeedForward(feed_forward, [part for part in parts if part is not feed_forward])
    return feed_forward


class _LastFeedForward:
    """The feed-forward, and what the attention before it says of the call that both are part of.

    The layer itself would not do: some versions of transformers call its hooks once, not again where it is recomputed.
    """

    def __init__(self, feed_forward: nn.Module, attention: list[nn.Module]) -> None:
        self._everywhere: Callable[[Tensor], Any] = feed_forward.forward
        self._attention_was_first = True
        self._noted = False
        self._read: Tensor | None = None
        for part in attention:
            part.register_forward_pre_hook(self._note, with_kwargs=True)
        replace_forward(feed_forward, self._where_read)

    def _note(self, module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
        segments = named.get("segments")
        self._noted, self._read = True, None if segments is None else segments.read

    def _where_read(self, module: nn.Module, hidden_1TH: Tensor) -> Any:
        self._attention_was_first &= self._noted
        if self._read is None or not self._attention_was_first:
            return self._everywhere(hidden_1TH)
        output = self._everywhere(hidden_1TH.index_select(1, self._read))
        if not isinstance(output, Tensor) or output.shape[2:] != hidden_1TH.shape[2:]:  # of experts, their routing too
            return self._everywhere(hidden_1TH)
        return output.new_zeros(hidden_1TH.shape).index_copy(1, self._read, output)
