"""The fingerprint changes with what changes a log-prob, and with nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo_scale.errors import UserError
from dpo_scale.files import sha256_of_file
from dpo_scale.reference import fingerprint as module
from dpo_scale.reference.fingerprint import (
    ReferenceFingerprint,
    explain_difference,
    fingerprint_model,
    weight_files,
)

_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "transformers_version": "5.17.0",
    "text_config": {"hidden_act": "silu", "use_cache": True},
}


def _model(folder: Path, num_shards: int = 1) -> Path:
    """A folder that looks like a saved model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    names = ["model.safetensors"]
    if num_shards > 1:
        names = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
        index = {"metadata": {}, "weight_map": {f"layer.{i}": name for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def _fingerprint(folder: Path, dtype: str = "bfloat16", **kwargs: bool) -> ReferenceFingerprint:
    digests = {path.name: sha256_of_file(path) for path in weight_files(folder)}
    return fingerprint_model(folder, dtype, digests, **kwargs)


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


RELEVANT: dict[str, Callable[[Path], object]] = {
    "weights": lambda folder: (folder / "model.safetensors").write_bytes(b"other weights...."),
    "rope": lambda folder: _edit_config(folder, rope_theta=500000.0),
    "tied head": lambda folder: _edit_config(folder, tie_word_embeddings=True),
    "nested": lambda folder: _edit_config(folder, text_config={"hidden_act": "gelu"}),
    "unknown key": lambda folder: _edit_config(folder, some_new_scaling=2.0),
    "quantization": lambda folder: _edit_config(folder, quantization_config={"bits": 8}),
}
IRRELEVANT: dict[str, Callable[[Path], object]] = {
    "saved by another version": lambda folder: _edit_config(folder, transformers_version="5.23.0"),
    "precision on disk is in the weights": lambda folder: _edit_config(folder, dtype="float32"),
    "old spelling of it": lambda folder: _edit_config(folder, torch_dtype="float32"),
    "order of keys": lambda folder: (folder / "config.json").write_text(json.dumps(dict(reversed(_CONFIG.items())))),
    "nested cache flag": lambda folder: _edit_config(folder, text_config={"hidden_act": "silu", "use_cache": False}),
    "generation settings": lambda folder: _edit_config(folder, temperature=0.6, eos_token_id=[1, 2]),
    "generation file": lambda folder: (folder / "generation_config.json").write_text("{}"),
    "tokenizer": lambda folder: (folder / "tokenizer.json").write_text('{"changed": true}'),
    "code that nobody runs": lambda folder: (
        _edit_config(folder, auto_map={"AutoModel": "m.M"}),
        (folder / "m.py").write_text("class M: ..."),
    ),
    "other files": lambda folder: (folder / "README.md").write_text("about"),
}


@pytest.mark.parametrize("change", RELEVANT.values(), ids=RELEVANT.keys())
def test_what_changes_a_log_prob_changes_the_key(tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = _model(tmp_path / "model")
    before = _fingerprint(folder)
    change(folder)
    after = _fingerprint(folder)
    assert after.key != before.key
    assert explain_difference(after, before)


@pytest.mark.parametrize("change", IRRELEVANT.values(), ids=IRRELEVANT.keys())
def test_what_cannot_change_a_log_prob_keeps_the_key(tmp_path: Path, change: Callable[[Path], object]) -> None:
    folder = _model(tmp_path / "model")
    before = _fingerprint(folder)
    change(folder)
    assert _fingerprint(folder).key == before.key


def test_the_key_follows_the_contents_to_another_folder(tmp_path: Path) -> None:
    here, there = _fingerprint(_model(tmp_path / "here")), _fingerprint(_model(tmp_path / "there"))
    assert here.source != there.source
    assert here.key == there.key
    assert here == there


def test_precision_and_scoring_version_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _model(tmp_path / "model")
    bfloat16, float32 = _fingerprint(folder), _fingerprint(folder, "float32")
    monkeypatch.setattr(module, "SCORING_VERSION", module.SCORING_VERSION + 1)
    assert len({bfloat16.key, float32.key, _fingerprint(folder).key}) == 3
    monkeypatch.undo()
    assert _fingerprint(folder, "torch.bfloat16").key == bfloat16.key


def test_the_key_stays_the_same_in_later_versions() -> None:
    """Else every store is scored again."""
    fingerprint = ReferenceFingerprint(1, "bfloat16", {"a": "b"}, {"hidden_size": 64}, {"m.py": "c"})
    assert fingerprint.key == "cd6c4d75c8d387a0413f8a0c03df79f7be44abb2cf5c1de74310995537e92adb"


def test_trusted_code_is_in_the_key_by_its_contents(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    _edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (folder / "modeling.py").write_text("scale = 1")
    before = _fingerprint(folder, trust_remote_code=True)
    (folder / "modeling.py").write_text("scale = 2")
    after = _fingerprint(folder, trust_remote_code=True)
    assert explain_difference(after, before) == ["model code differs in modeling.py"]
    assert after.key != before.key


def test_trusting_code_that_is_not_there_keeps_the_key(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    (folder / "convert.py").write_text("a script beside the weights")
    assert _fingerprint(folder, trust_remote_code=True).key == _fingerprint(folder).key


def test_near_misses_are_explained_in_words(tmp_path: Path) -> None:
    wanted = _fingerprint(_model(tmp_path / "a", num_shards=30), "float32")
    stored = replace(
        wanted,
        dtype="bfloat16",
        scoring_version=0,
        weights={**wanted.weights, "model-00003-of-00030.safetensors": "0" * 64},
        config={**wanted.config, "rope_theta": 5.0, "old": 1},
    )
    assert explain_difference(wanted, stored) == [
        f"scoring version {module.SCORING_VERSION}, store has 0",
        "precision float32, store has bfloat16",
        "weights differ in model-00003-of-00030.safetensors",
        "config.json old unset, store has 1",
        "config.json rope_theta 10000.0, store has 5.0",
    ]
    assert explain_difference(wanted, wanted) == []


def test_other_shards_are_explained_with_few_words(tmp_path: Path) -> None:
    sharded = _fingerprint(_model(tmp_path / "a", num_shards=30))
    single = _fingerprint(_model(tmp_path / "b"))
    assert explain_difference(single, sharded) == [
        "weight files model.safetensors, store has model-00001-of-00030.safetensors, "
        "model-00002-of-00030.safetensors and 28 more"
    ]


def test_json_brings_back_the_same_fingerprint(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model", num_shards=2)
    _edit_config(folder, time_step_limit=[0.0, float("inf")], auto_map={"AutoModel": "m.M"})  # as Mamba's config has it
    (folder / "m.py").write_text("class M: ...")
    expected = _fingerprint(folder, trust_remote_code=True)
    assert expected.code
    actual = ReferenceFingerprint.from_json(json.loads(json.dumps(expected.to_json())))
    assert (actual, actual.key, actual.source) == (expected, expected.key, expected.source)


@pytest.mark.parametrize("broken", [None, [], {}, {"key": "x"}, "text"])
def test_json_of_something_else_is_refused(broken: Any) -> None:
    with pytest.raises(UserError, match="not a reference fingerprint"):
        ReferenceFingerprint.from_json(broken)


def test_json_that_was_edited_is_refused(tmp_path: Path) -> None:
    value = _fingerprint(_model(tmp_path / "model")).to_json()
    with pytest.raises(UserError, match="edited"):
        ReferenceFingerprint.from_json({**value, "dtype": "float32"})


def test_a_hub_snapshot_is_named_by_repository_and_revision(tmp_path: Path) -> None:
    folder = _model(tmp_path / "models--org--name" / "snapshots" / ("0123456789ab" + "c" * 28))
    assert _fingerprint(folder).source == "org/name@0123456789ab"


def test_missing_digests_are_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        fingerprint_model(_model(tmp_path / "model", num_shards=2), "float32", {})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter; merge it"),
        (lambda folder: (folder / "config.json").unlink(), r"config.json: not there"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_with_the_reason(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = _model(tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        _fingerprint(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["model.safetensors"]}])
def test_an_index_that_names_no_weights_is_refused(index: dict[str, Any], tmp_path: Path) -> None:
    folder = _model(tmp_path / "model", num_shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no weight_map; the download or copy is damaged"):
        weight_files(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = _model(tmp_path / "model", num_shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors, which is not there"):
        weight_files(folder)


def test_weight_files_are_those_that_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert weight_files(tmp_path) == shards

    with torch.no_grad():
        model.lm_head.weight.fill_(0.5)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert weight_files(tmp_path) == shards  # a .bin is the last resort
    model.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight == 0.5).all()  # transformers took the single file as well


@pytest.mark.parametrize("num_shards", [1, 2])
def test_weights_that_the_config_names_are_those_that_are_hashed(num_shards: int, tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    named = _model(tmp_path / "named", num_shards)
    for file in named.glob("model*"):
        file.rename(folder / file.name.replace("model.safe", "named.safe"))
    ending = ".safetensors" if num_shards == 1 else ".safetensors.index.json"
    _edit_config(folder, transformers_weights=f"named{ending}")
    names = ["named"] if num_shards == 1 else ["model-00001-of-00002", "model-00002-of-00002"]
    assert weight_files(folder) == [folder / f"{name}.safetensors" for name in names]


@pytest.mark.parametrize("name", ["gone.safetensors", "../named.safetensors", "named.bin"])
def test_a_name_in_the_config_that_is_no_file_of_weights_is_refused(name: str, tmp_path: Path) -> None:
    folder = _model(tmp_path / "model")
    _edit_config(folder, transformers_weights=name)
    if "gone" not in name:
        (folder / name).write_bytes(b"weights")
    with pytest.raises(UserError, match=r"config\.json: transformers_weights is .*no safetensors file of this folder"):
        weight_files(folder)
