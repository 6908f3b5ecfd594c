"""Names and shapes of a model's tensors in published files, where they differ from those in memory.

transformers 5 fuses the experts of a mixture into one tensor when it loads a model. It reads fused
files too, but other programs expect what is published, so an export is split back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True, slots=True)
class HubNames:
    """How each parameter is published."""

    pieces: Mapping[str, Mapping[str, tuple[int, ...]]]
    """Parameter -> the tensors that it becomes, each with its shape."""
    split: Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]
    """A parameter's tensors, in the order of `pieces`."""


def hub_names(architecture: str, source_model: Path, parameters: Mapping[str, tuple[int, ...]]) -> HubNames:
    """The published form of a model's parameters; the form in memory if one cannot be derived.

    That is so for classes outside of transformers, and where a published tensor joins several
    parameters.
    """
    in_memory = HubNames(
        {name: {name: shape} for name, shape in parameters.items()},
        lambda name, tensor: {name: tensor},
    )
    model_class = getattr(transformers, architecture, None)
    if model_class is None:
        return in_memory
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_pretrained(source_model))
        whole = {name: torch.empty(shape) for name, shape in parameters.items()}

    def split(name: str, tensor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        pieces: Mapping[str, torch.Tensor] = revert_weight_conversion(model, {name: tensor})
        return pieces

    pieces = {name: _shapes(split(name, tensor)) for name, tensor in whole.items()}
    together = _shapes(revert_weight_conversion(model, whole))
    one_by_one = {name: shape for shapes in pieces.values() for name, shape in shapes.items()}
    return HubNames(pieces, split) if one_by_one == together else in_memory


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
