"""What every stage needs of data and model before weights are loaded, and what it refuses."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import on_ranks
from launching import make_model, make_pairs
from transformers import AutoTokenizer

from dpo_scale import inputs
from dpo_scale.console import Console
from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.errors import DataError, UserError
from dpo_scale.inputs import Data, agreed_digest, check_budgets, hoped_layout, prepare_data
from dpo_scale.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    paths = {name: make_pairs(tmp_path / f"{name}.jsonl", 8, seed) for seed, name in enumerate(("train", "evaluate"))}
    return Recipe.model_validate(
        {
            "model": {"path": str(make_model(tmp_path / "model")), "dtype": "float32"},
            "data": {**{name: str(path) for name, path in paths.items()}, "cache_dir": str(tmp_path / "tokens")},
            "batch": {"global_pairs": 4},
            "loss": {"beta": 2.0},
            "run": {"output_dir": str(tmp_path / "run")},
        }
    )


def prepare(recipe: Recipe) -> tuple[Data, str]:
    said = io.StringIO()
    return prepare_data(recipe, OneProcess(), Console(said)), said.getvalue()  # type: ignore[arg-type]


def change_config(recipe: Recipe, **settings: Any) -> None:
    file = Path(recipe.model.path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_the_policy_is_asked_for_in_its_revision(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    def resolve(path: str, revision: str | None, *, weights: bool) -> Path:
        seen.append((path, revision))
        raise UserError("seen")

    monkeypatch.setattr(inputs, "resolve_folder", resolve)
    model = recipe.model.model_copy(update={"path": "someone/policy", "revision": "v2"})
    with pytest.raises(UserError, match="seen"):
        prepare(recipe.model_copy(update={"model": model}))
    assert seen == [("someone/policy", "v2")]


@pytest.mark.parametrize("held_out", [False, True])
def test_tokens_that_the_model_does_not_embed_are_refused(held_out: bool, recipe: Recipe) -> None:
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    change_config(recipe, vocab_size=len(tokenizer))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(recipe.model.path)
    prepare(recipe)
    row = {"prompt": "x", "chosen": "<new>", "rejected": "y"}
    source = (recipe.data.evaluate if held_out else recipe.data.train)[0]
    Path(source.path).write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=f"token id {len(tokenizer) - 1}, but the model embeds only"):
        prepare(recipe)


def test_padding_is_an_id_that_the_model_embeds(recipe: Recipe) -> None:
    """Many a tokenizer's pad token was added to it alone; nothing looks at what padding holds."""
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path)
    change_config(recipe, vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "<pad of its own>"})
    tokenizer.save_pretrained(recipe.model.path)
    assert prepare(recipe)[0].pad_id == 0
    change_config(recipe, vocab_size=len(tokenizer))
    assert prepare(recipe)[0].pad_id == len(tokenizer) - 1


def test_sequences_longer_than_the_model_was_made_for_are_told(recipe: Recipe) -> None:
    data, _ = prepare(recipe)
    longest = max(int((p.lengths[:, 0] + p.lengths[:, 1:].max(axis=1)).max()) for p in (data.train, data.evaluate))
    change_config(recipe, max_position_embeddings=longest)
    assert "max_position_embeddings" not in prepare(recipe)[1]
    change_config(recipe, max_position_embeddings=longest - 1)
    said = " ".join(prepare(recipe)[1].split())
    assert f"The longest sequence has {longest} tokens, the model was made for {longest - 1}" in said


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_a_pair_over_the_budget_is_named_whether_it_is_trained_on_or_held_out(name: str, recipe: Recipe) -> None:
    row = {"prompt": "x" * 300, "chosen": "y", "rejected": "z"}
    with open(getattr(recipe.data, name)[0].path, "a") as file:
        file.write(json.dumps(row) + "\n")
    data, _ = prepare(recipe)
    most = int(data.costs(getattr(data, name), "shared").tokens.max())

    def check(rank_tokens: int) -> None:
        batch = recipe.batch.model_copy(update={"rank_tokens": rank_tokens})
        check_budgets(recipe.model_copy(update={"batch": batch}), data, hoped_layout(recipe))

    check(most)
    with pytest.raises(DataError, match=rf"{name}\.jsonl:9: this pair takes {most} tokens"):
        check(most - 1)


@pytest.mark.parametrize(("differs", "told"), [("train", "data.train"), ("evaluate", "data.evaluate"), ("", "")])
def test_machines_with_other_pairs_are_found_before_their_ranks_score_them(differs: str, told: str) -> None:
    ids = np.arange(9, dtype=np.int32)
    pairs, others = (TokenPairs.from_pairs([TokenPair(ids, ids[:3], ids[:stop], "row")]) for stop in (4, 5))
    nothing: Any = None
    same = Data(pairs, pairs, nothing, 0, nothing, nothing, {})

    def agree(ranks: Any) -> str:
        return agreed_digest(replace(same, **{differs: others}) if differs and ranks.rank >= 4 else same, ranks)

    found = on_ranks(6, agree, machines=[0, 0, 1, 1, 2, 2])
    if not differs:
        assert found == [pairs.digest()] * 6
        return
    assert {str(error) for error in found} == {
        f"{told}: the machine of rank 4 read other pairs than that of rank 0; give all machines the same files and "
        "tokenizer"
    }
    assert all(isinstance(error, DataError) for error in found)


def test_held_out_rows_are_the_same_for_every_seed(recipe: Recipe) -> None:
    """A sweep over seeds is compared by them; training rows are drawn anew, and by `check` too."""
    half = [{"path": recipe.data.evaluate[0].path, "weight": 0.5}]
    few = [{"path": recipe.data.train[0].path, "rows": 4}]
    found = []
    for seed in (1, 2):
        run = recipe.run.model_copy(update={"seed": seed})
        data = Recipe.model_validate({**recipe.model_dump(), "data": {"train": few, "evaluate": half}}).data
        found.append(prepare(recipe.model_copy(update={"data": data, "run": run}))[0])
    first, second = found
    assert 0 < len(first.evaluate) < 8
    assert first.evaluate.digest() == second.evaluate.digest()
    assert first.report["evaluate"]["digest"] == first.evaluate.digest()[:12]
    assert first.train.digest() != second.train.digest()
