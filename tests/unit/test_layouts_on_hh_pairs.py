"""Every layout against the model's own forward over padded rows, on real dialogues, for every architecture served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import SERVED, save_tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from dpo_scale.data.layouts import Layout, PromptCompletions, collate
from dpo_scale.data.preferences import to_preferences
from dpo_scale.data.rows import RawRow
from dpo_scale.data.sources import read_blocks
from dpo_scale.model.attention import register
from dpo_scale.model.loading import load_model
from dpo_scale.model.log_probs import CompletionLogProbs
from dpo_scale.objectives import reduce_log_probs
from dpo_scale.recipe import DataSource, ModelSection

VOCABULARY, NUM_PAIRS, LONGEST = 512, 4, 400
LAYOUTS: tuple[Layout, ...] = ("shared", "packed", "padded")


@pytest.fixture(scope="module")
def hh_pairs(hh_pairs_path: Path) -> list[PromptCompletions]:
    """Four dialogues of at most 400 tokens each, spread over the lengths up to there; windows are far shorter."""
    texts = [
        (str(pair.prompt), str(pair.chosen), str(pair.rejected))
        for block in read_blocks(DataSource(path=str(hh_pairs_path), rows=60), seed=0)
        for row in block.rows()
        if isinstance(row, RawRow)
        for pair in to_preferences(row)
        if pair.chosen and pair.rejected and pair.chosen != pair.rejected
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text for three in texts for text in three), trainer)
    tokens = [[np.array(tokenizer.encode(text).ids, np.int32) for text in three] for three in texts]
    fitting = sorted((three for three in tokens if sum(map(len, three)) <= LONGEST), key=lambda x: sum(map(len, x)))
    spread = [fitting[int(place)] for place in np.linspace(0, len(fitting) - 1, NUM_PAIRS)]
    return [PromptCompletions(prompt, (chosen, rejected)) for prompt, chosen, rejected in spread]


def _sums_and_gradients(
    model: CompletionLogProbs, groups: list[PromptCompletions], layout: Layout, *, plain: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums [S] of fp32 log-probs, and the gradient of a weighted sum of them in which no two sequences count alike.

    They are added up in fp64: beyond 1,024 nats one unit of an fp32 sum is more than the tolerance.
    """
    model.zero_grad()
    batch = collate(groups, layout)
    token_logps_C = model(batch, plain=plain)
    assert token_logps_C.dtype == torch.float32
    sums_S = reduce_log_probs(token_logps_C.double(), batch.sequence_of_target, batch.lengths, "sum")
    (sums_S * torch.tensor([(-0.8) ** n for n in range(len(sums_S))])).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sums_S.detach(), gradients


@pytest.mark.parametrize("products", ["torch", "onednn"])
@pytest.mark.parametrize("model_type", SERVED)
def test_every_layout_gives_the_plain_sums_and_gradients(
    model_type: str, products: str, hh_pairs: list[PromptCompletions], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if products == "onednn":
        request.getfixturevalue("onednn")
    register("sdpa")
    size = {"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST, "n_positions": LONGEST}
    folder = save_tiny_model(tmp_path, model_type, initializer_range=0.1, **size)
    model = load_model(folder, ModelSection(path=str(folder), dtype="float32"))
    expected_sums, expected = _sums_and_gradients(model, hh_pairs, "padded", plain=True)
    for layout in LAYOUTS:
        actual_sums, actual = _sums_and_gradients(model, hh_pairs, layout)
        assert (actual_sums - expected_sums).abs().max() < 1e-4, layout
        assert actual.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm(), f"{layout}: {name}"
