from __future__ import annotations

import errno
import gc
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import note_order
from fake_engine import TRAJECTORY, make_parameters, save
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dpo_scale import locks
from dpo_scale.locks import this_process
from dpo_scale.training import export
from dpo_scale.training.checkpoints import CheckpointError, digest_of
from dpo_scale.training.export import ExportError, ModelFolder, export_checkpoint, plan_shards
from dpo_scale.training.tensor_files import TensorEntry

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**(SIZES | changes))
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def source_folder(model: Any, folder: Path) -> Path:
    """The folder that training started from: other weights than the model now has, and a tokenizer."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"old weights")
    (folder / "README.md").write_text("another model's card")
    (folder / "LICENSE").write_text("free")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def checkpoint_of(model: Any, folder: Path, **fields: Any) -> Path:
    """A checkpoint by two ranks whose masters are the model's weights."""
    parameters = {
        name: [parameter.detach().float(), torch.ones(parameter.shape), torch.ones(parameter.shape)]
        for name, parameter in model.named_parameters()
    }
    values = {"architecture": type(model).__name__, "buffers": {}, "dtype": model.dtype} | fields
    path = save(folder, parameters, **values)[0]
    assert isinstance(path, Path), path
    return path


def beside(source: Path, **fields: Any) -> ModelFolder:
    """What an export of the fake engine's run holds beside its weights."""
    return ModelFolder(source, digest_of(TRAJECTORY), **fields)


def exported(model: Any, tmp_path: Path, **arguments: Any) -> Path:
    source = source_folder(model, tmp_path / "source")
    path = checkpoint_of(model, tmp_path / "checkpoints")
    export_checkpoint(path, tmp_path / "model", beside(source), **arguments)
    return tmp_path / "model"


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(tokens).logits


def test_an_export_reaches_the_disk_before_its_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = note_order(monkeypatch)
    exported(llama(), tmp_path)
    named = events.index("name model")
    assert "sync model.safetensors" in events[:named]
    assert events[named - 1 :] == ["sync .model.partial/", "name model", f"sync {tmp_path.name}/"]


# --- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_the_model_in_memory(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model = llama(dtype, tie_word_embeddings=tied)
    out = exported(model, tmp_path, max_shard_bytes=8000)
    loaded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert loaded.dtype == dtype
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_another_precision_is_the_cast_of_the_master_weights(tmp_path: Path) -> None:
    model = llama()
    loaded = load_file(exported(model, tmp_path, dtype=torch.bfloat16) / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name], parameter.detach().to(torch.bfloat16))
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == "bfloat16"


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    loaded = load_file(exported(llama(tie_word_embeddings=True), tmp_path) / "model.safetensors")
    assert "model.embed_tokens.weight" in loaded
    assert "lm_head.weight" not in loaded


def test_buffers_are_stored_too_and_wide_types_come_first(tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    buffers = {"steps": torch.tensor(3), "mask": torch.tensor([True]), "scale": torch.rand(3)}
    path = checkpoint_of(model, tmp_path / "checkpoints", buffers=buffers)
    source = source_folder(model, tmp_path / "source")
    export_checkpoint(path, tmp_path / "model", beside(source))
    loaded = load_file(tmp_path / "model/model.safetensors")
    for name, buffer in buffers.items():
        assert torch.equal(loaded[name], buffer)
    assert torch.equal(loaded["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4)),
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=6)
        ),
    ],
    ids=["mixtral", "qwen3_moe"],
)
def test_fused_experts_are_published_as_the_model_family_publishes_them(tmp_path: Path, make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    out = exported(model, tmp_path, max_shard_bytes=8000)
    model.save_pretrained(tmp_path / "by_transformers")
    expected = load_file(tmp_path / "by_transformers/model.safetensors")
    actual = {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    assert actual.keys() == expected.keys()
    assert any(".experts.3." in name for name in actual)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(model))


# --- shards


def test_shards_stay_below_the_bound_and_the_index_names_every_tensor_once(tmp_path: Path) -> None:
    model = llama()
    out = exported(model, tmp_path, max_shard_bytes=8000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    expected = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
        total = sum(tensor.nbytes for tensor in held.values())
        assert total <= 8000 or len(held) == 1
        expected |= dict.fromkeys(held, shard.name)
    assert index["weight_map"] == expected
    assert expected.keys() == {name for name, _ in model.named_parameters()}
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())


def test_a_tensor_larger_than_the_bound_gets_a_shard_of_its_own() -> None:
    entries = [TensorEntry(str(size), torch.uint8, (size,)) for size in (3, 4, 20, 5, 5, 1)]
    shards = plan_shards(entries, max_bytes=10)
    assert [[entry.bytes for entry in shard] for shard in shards] == [[3, 4], [20], [5, 5], [1]]


def test_memory_stays_far_below_one_shard(tmp_path: Path) -> None:
    """Parameters of 1 MB, shards of 24 MB, a model of 64 MB."""
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        pytest.skip("needs Linux's /proc to reset the peak of memory")
    count = 64
    parameters = make_parameters({f"layer.{i}.weight": (512, 512) for i in range(count)})
    source = source_folder(llama(), tmp_path / "source")
    path = save(tmp_path / "checkpoints", parameters, architecture="Unknown", buffers={})[0]
    del parameters
    gc.collect()
    export_checkpoint(path, tmp_path / "warm_up", beside(source))
    peak.write_text("5")
    before = _memory("VmRSS")
    export_checkpoint(path, tmp_path / "model", beside(source), max_shard_bytes=24_000_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 3
    assert _memory("VmHWM") - before < 12_000_000


def _memory(field: str) -> int:
    """Bytes, from the kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise AssertionError(field)


# --- the folder


def test_everything_but_the_weights_comes_from_the_source(tmp_path: Path) -> None:
    model = llama(torch.bfloat16)
    source = source_folder(model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"torch_dtype": "float32", "architectures": ["LlamaModel"], "extra": 7}
    (source / "config.json").write_text(json.dumps(config))
    path = checkpoint_of(model, tmp_path / "checkpoints", step=9)
    export_checkpoint(path, tmp_path / "out/model", beside(source, provenance={"recipe": "r"}))
    out = tmp_path / "out/model"
    assert sorted(file.name for file in out.iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "provenance.json",
        "tokenizer_config.json",
    ]
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == "bfloat16"
    assert "torch_dtype" not in written
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["extra"] == 7
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["recipe"] == "r"
    assert provenance["step"] == 9
    assert provenance["trajectory_digest"] == digest_of(TRAJECTORY)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".model.lock", "model"}


@pytest.mark.parametrize("max_shard_bytes", [export.MAX_SHARD_BYTES, 8000])
def test_a_source_that_names_its_file_of_weights_exports_to_one_that_loads(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    model = llama()
    source = source_folder(model, tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"transformers_weights": "theirs.safetensors"}
    (source / "config.json").write_text(json.dumps(config))
    path = checkpoint_of(model, tmp_path / "checkpoints")
    export_checkpoint(path, tmp_path / "model", beside(source), max_shard_bytes=max_shard_bytes)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()), logits(model))


def test_an_export_without_a_tokenizer_is_refused_before_it_writes_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "write_tensors", lambda *arguments: pytest.fail("weights are written"))
    model = llama()
    source = source_folder(model, tmp_path / "source")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (source / name).unlink()
    with pytest.raises(ExportError, match="the tokenizer is gone"):
        export_checkpoint(checkpoint_of(model, tmp_path / "checkpoints"), tmp_path / "model", beside(source))


def test_only_an_export_of_the_same_run_is_replaced(tmp_path: Path) -> None:
    model = llama()
    out = exported(model, tmp_path)
    path = checkpoint_of(model, tmp_path / "checkpoints", step=2)
    export_checkpoint(path, out, beside(tmp_path / "source"))
    assert json.loads((out / "provenance.json").read_text())["step"] == 2
    other = checkpoint_of(model, tmp_path / "others", trajectory={"of": "another run"})
    with pytest.raises(ExportError, match="something else than an export of this run"):
        export_checkpoint(other, out, ModelFolder(tmp_path / "source", digest_of({"of": "another run"})))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("keep")
    with pytest.raises(ExportError, match="name another folder"):
        export_checkpoint(path, mine, beside(tmp_path / "source"))
    assert (mine / "notes.txt").read_text() == "keep"


def test_a_disk_that_fills_up_leaves_the_earlier_export_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    out = exported(model, tmp_path)
    before = (out / "model.safetensors").read_bytes()
    calls = iter(range(99))

    def full(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(*arguments)

    written = export.write_tensors
    monkeypatch.setattr(export, "write_tensors", full)
    path = checkpoint_of(model, tmp_path / "checkpoints", step=2)
    with pytest.raises(ExportError, match="No space left on device"):
        export_checkpoint(path, out, beside(tmp_path / "source"), max_shard_bytes=8000)
    assert (out / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.glob(".*")] == [".model.lock"]


def writing(monkeypatch: pytest.MonkeyPatch, then: Callable[[Path], None]) -> None:
    """Let something happen each time that a file of weights was written."""

    def write(path: Path, *arguments: Any) -> Any:
        record = written(path, *arguments)
        then(path)
        return record

    written = export.write_tensors
    monkeypatch.setattr(export, "write_tensors", write)


def test_a_second_export_to_a_folder_is_refused_and_the_first_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def export_again(shard: Path) -> None:
        monkeypatch.undo()
        with pytest.raises(ExportError) as caught:
            export_checkpoint(checkpoint_of(model, tmp_path / "again"), tmp_path / "model", beside(tmp_path / "source"))
        refused.append(str(caught.value))

    model = llama()
    writing(monkeypatch, export_again)
    out = exported(model, tmp_path)
    assert refused == [f"{out}: {this_process()} is exporting to it; wait for its end, or name another folder"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out).eval()), logits(model))


def test_the_lock_that_a_lost_host_left_on_an_export_is_worth_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a job that lost its node while it exported would not be queued again, with all of its training done."""
    path = tmp_path / ".model.lock"
    monkeypatch.setattr(export, "take", partial(locks.take, lease_s=0.05))
    with locks.take(path) as held:
        held.seek(0)
        held.truncate()
        held.write("process 7 on a-lost-node\n")
        held.flush()
        with pytest.raises(ExportError) as caught:
            exported(llama(), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'model'}: process 7 on a-lost-node is exporting to it; wait for its end, or name another folder. "
        f"If that host is lost and stays away, remove {path}"
    )
    assert caught.value.may_pass


def test_a_folder_beside_which_no_lock_can_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with pytest.raises(ExportError) as caught:
        exported(llama(), tmp_path)
    path = tmp_path / ".model.lock"
    assert str(caught.value) == f"{tmp_path / 'model'}: no lock can be had at {path}: No locks available"


def test_another_users_idle_lock_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    lock = tmp_path / ".model.lock"
    lock.touch()
    monkeypatch.setattr(export, "take", refuse)
    with pytest.raises(ExportError) as caught:
        exported(llama(), tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'model'}: no lock can be had at {lock}: Permission denied; "
        "name another folder, or remove the lock if its owner is done exporting"
    )


@pytest.mark.parametrize("name", ["model", ".model.replaced"])
def test_another_users_export_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be renamed in a shared folder, but its files not be removed from there."""
    out = exported(llama(), tmp_path)
    theirs = tmp_path / name
    theirs.mkdir(exist_ok=True)
    writing(monkeypatch, lambda shard: pytest.fail("weights were written"))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != theirs)
    with pytest.raises(ExportError, match=f"{theirs}: another user's export, which you may not remove; name another"):
        export_checkpoint(tmp_path / "checkpoints/step-00000001", out, beside(tmp_path / "source"))
    assert theirs.exists()


def test_an_export_that_a_kill_left_aside_makes_way(tmp_path: Path) -> None:
    out = exported(llama(), tmp_path)
    os.replace(out, tmp_path / ".model.replaced")
    export_checkpoint(tmp_path / "checkpoints/step-00000001", out, beside(tmp_path / "source"))
    assert (out / "model.safetensors").exists()
    assert not (tmp_path / ".model.replaced").exists()


def test_weights_that_are_gone_before_the_end_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing(monkeypatch, Path.unlink)
    with pytest.raises(ExportError, match=r"model\.safetensors: changed or removed by another process"):
        exported(llama(), tmp_path)
    assert not (tmp_path / "model").exists()


def test_an_interrupted_export_leaves_the_earlier_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(shard: Path) -> None:
        raise KeyboardInterrupt

    model = llama()
    out = exported(model, tmp_path)
    writing(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(checkpoint_of(model, tmp_path / "checkpoints"), out, beside(tmp_path / "source"))
    assert (out / "model.safetensors").exists()
    assert [path.name for path in tmp_path.glob(".*")] == [".model.lock"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "large disk" / "kept")
    model = llama()
    out = exported(model, tmp_path)
    export_checkpoint(checkpoint_of(model, tmp_path / "checkpoints", step=2), out, beside(tmp_path / "source"))
    assert out.is_symlink()
    assert json.loads((tmp_path / "large disk" / "kept" / "provenance.json").read_text())["step"] == 2
    assert {path.name for path in (tmp_path / "large disk").iterdir()} == {".kept.lock", "kept"}


def test_the_current_folder_is_one_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    source, path = source_folder(model, tmp_path / "source"), checkpoint_of(model, tmp_path / "checkpoints")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export_checkpoint(path, Path(), beside(source))
    assert (tmp_path / "here" / "model.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=f"{tmp_path} holds something else"):
        export_checkpoint(path, Path(), beside(source))


def test_the_root_of_all_folders_is_refused_in_a_line(tmp_path: Path) -> None:
    model = llama()
    path = checkpoint_of(model, tmp_path / "checkpoints")
    with pytest.raises(ExportError, match=r"\A/: a file system is mounted there and cannot be replaced; .*\Z"):
        export_checkpoint(path, Path("/"), beside(source_folder(model, tmp_path / "source")))


def test_a_checkpoint_with_a_flipped_byte_is_not_exported(tmp_path: Path) -> None:
    model = llama()
    source = source_folder(model, tmp_path / "source")
    path = checkpoint_of(model, tmp_path / "checkpoints")
    with (path / "rank-00001-of-00002.safetensors").open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-40, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=r"damaged: rank-00001-of-00002.safetensors: its contents changed"):
        export_checkpoint(path, tmp_path / "model", beside(source))
    assert not (tmp_path / "model").exists()


def save_tokenizer(folder: Path, **settings: Any) -> None:
    """A tokenizer of two words."""
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, **settings).save_pretrained(folder)


def test_an_exported_tokenizer_can_be_loaded(tmp_path: Path) -> None:
    model = llama()
    source = source_folder(model, tmp_path / "source")
    save_tokenizer(source, chat_template="{{ messages[0] }}")
    path = checkpoint_of(model, tmp_path / "checkpoints")
    export_checkpoint(path, tmp_path / "model", beside(source))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.encode("a") == [0]
    assert tokenizer.chat_template == "{{ messages[0] }}"
