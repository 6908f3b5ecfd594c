"""What ZeRO-3 gathers as one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from deepspeed.utils import z3_leaf_module
from torch import nn
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from dpo_scale.distributed.engines import check_buffers, mark_leaves
from dpo_scale.errors import RecipeError
from dpo_scale.model.fused import fuse

CONFIG = LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2)


class Block(nn.Module):
    """A decoder layer that is none of the library's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = LlamaRMSNorm(16), LlamaMLP(CONFIG)


@pytest.mark.parametrize(
    ("module", "leaves"),
    [(LlamaDecoderLayer(CONFIG, 0), {""}), (Block(), {"mlp"}), (nn.Sequential(Block()), {"0.mlp"})],
    ids=["decoder layer", "feed-forward that is served", "further inside"],
)
def test_layers_and_what_reads_weights_of_its_children_are_leaves(module: nn.Module, leaves: set[str]) -> None:
    fuse(module)
    mark_leaves(module)
    assert {name for name, child in module.named_modules() if z3_leaf_module(child)} == leaves


def test_a_model_on_nvme_needs_few_buffers_and_is_refused_without_them() -> None:
    """Of its layers only what must be a leaf is one: seven matrices at once would take as many buffers."""
    swapper = SimpleNamespace(param_buffer_count=3, swappable_tensor=lambda parameter: parameter.dim() == 2)
    model = nn.ModuleDict({"layer": LlamaDecoderLayer(CONFIG, 0)})
    for parameter in model.parameters():
        parameter.nvme_swapper = swapper
    fuse(model)
    mark_leaves(model)
    assert {name for name, child in model.named_modules() if z3_leaf_module(child)} == {"layer.mlp"}
    check_buffers(model)
    swapper.param_buffer_count = 2
    with pytest.raises(RecipeError, match=r"nvme: layer\.mlp needs 3 matrices at once, and .* has 2 buffers; use cpu"):
        check_buffers(model)
