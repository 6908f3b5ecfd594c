"""What a run keeps of the model that it starts from, for its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from dpo_scale.errors import UserError
from dpo_scale.recipe import Recipe
from dpo_scale.training import model_files
from dpo_scale.training.provenance import provenance

OLD_TEMPLATES = {"default": "old", "tool_use": "old, with tools"}


def make_recipe(source: Path, tokenizer: Path | None = None, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": str(source), "revision": "main", "tokenizer": tokenizer and str(tokenizer)},
            "data": {"train": str(source.parent / "pairs.jsonl"), **data},
            "batch": {"global_pairs": 1, "rank_tokens": 100},
            "loss": {"beta": 1.0},
            "optim": {"learning_rate": 1e-6},
            "run": {"output_dir": str(source.parent / "run")},
        }
    )


def make_tokenizer(folder: Path, words: str = "a", **settings: Any) -> None:
    vocabulary = {word: number for number, word in enumerate((*words, "<unk>"))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>", **settings).save_pretrained(folder)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model's folder, its weights a file of one byte."""
    folder = tmp_path / "source"
    LlamaConfig(vocab_size=2).save_pretrained(folder)
    make_tokenizer(folder)
    for name in ("model.safetensors", "generation_config.json", "modeling_own.py", "LICENSE.txt"):
        (folder / name).write_text("{}")
    (folder / "LICENSES").mkdir()
    (folder / "NOTICE").symlink_to(folder / "gone")
    return folder


def test_all_but_weights_is_kept_whatever_becomes_of_the_source(source: Path, tmp_path: Path) -> None:
    kept, out = tmp_path / "run" / "model_files", tmp_path / "out"
    model_files.keep(kept, make_recipe(source), source)
    shutil.rmtree(source)
    names = {path.name for path in kept.iterdir()}
    assert names >= {"config.json", "generation_config.json", "modeling_own.py", "LICENSE.txt", "tokenizer.json"}
    assert "model.safetensors" not in names
    assert [path.name for path in kept.parent.iterdir()] == ["model_files"]
    model_files.copy(kept, out)
    assert {path.name for path in out.iterdir()} == names - {"config.json"}
    assert AutoTokenizer.from_pretrained(out).encode("a") == [0]
    for path in kept.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="the tokenizer is gone"):
        model_files.check(kept)


def test_a_later_start_keeps_its_own(source: Path, tmp_path: Path) -> None:
    kept = tmp_path / "model_files"
    model_files.keep(kept, make_recipe(source), source)
    (source / "modeling_own.py").unlink()
    make_tokenizer(source, "ba")
    model_files.keep(kept, make_recipe(source), source)
    assert not (kept / "modeling_own.py").exists()
    assert AutoTokenizer.from_pretrained(kept).encode("a") == [1]


def test_a_tokenizer_of_its_own_takes_the_place_of_the_source_s(source: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "another", "ba")
    (tmp_path / "another" / "generation_config.json").write_text("not this one")
    model_files.keep(tmp_path / "model_files", make_recipe(source, tmp_path / "another"), source)
    assert AutoTokenizer.from_pretrained(tmp_path / "model_files").encode("a") == [1]
    assert (tmp_path / "model_files" / "generation_config.json").read_text() == "{}"


@pytest.mark.parametrize("where", ["one in the configuration", "named in the configuration", "files", "legacy file"])
def test_the_template_of_the_training_is_the_only_one(source: Path, tmp_path: Path, where: str) -> None:
    if where == "files":
        make_tokenizer(source, chat_template=OLD_TEMPLATES)
    config = json.loads((source / "tokenizer_config.json").read_text())
    if where == "one in the configuration":
        config["chat_template"] = "old"
    elif where == "named in the configuration":
        config["chat_template"] = [{"name": name, "template": text} for name, text in OLD_TEMPLATES.items()]
    elif where == "legacy file":
        (source / "chat_template.json").write_text('{"chat_template": "old"}')
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "new.jinja").write_text("new")
    kept = tmp_path / "model_files"
    model_files.keep(kept, make_recipe(source, chat_template=str(tmp_path / "new.jinja")), source)
    assert AutoTokenizer.from_pretrained(kept).chat_template == "new"
    assert [str(file) for file in kept.rglob("*") if file.is_file() and "old" in file.read_text("latin-1")] == []
    assert list(kept.glob("*chat_template*")) == [kept / "chat_template.jinja"]
    written = json.loads((kept / "tokenizer_config.json").read_text())
    assert written == {name: value for name, value in config.items() if name != "chat_template"}


def test_the_provenance_tells_names_and_no_folders(source: Path) -> None:
    told = provenance(make_recipe(source), "meta-llama/Llama")
    assert told["source_model"] == "meta-llama/Llama"
    assert told["recipe"]["model"]["path"] == "source"
    assert told["recipe"]["model"]["revision"] == "main"
    assert told["recipe"]["data"]["train"][0]["path"] == "pairs.jsonl"
    assert told["recipe"]["run"]["output_dir"] == "run"
    assert str(source.parent) not in json.dumps(told)
