"""Reference log-probs in real launches: scored once, found again, whoever scored them and wherever they lie."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import ON_CPUS, Launched, Launcher, make_model
from safetensors.torch import load_file, save_file

from dpo_scale.cli import main
from dpo_scale.reference.cache import ReferenceStore, store_folder, store_folders
from dpo_scale.reference.fingerprint import read_fingerprint
from dpo_scale.reference.parts import Keys, Part

pytestmark = pytest.mark.launch

WORKER = Path(__file__).with_name("reference_worker.py")
NUM_PAIRS, NUM_ADDED, NUM_HELD_OUT = 45, 7, 11
IN_OPEN, IN_CLOEXEC, IN_NONBLOCK = 0x20, 0o2000000, 0o4000


@pytest.fixture(scope="module")
def folder(launcher: Launcher) -> Path:
    """Where the worker's models are, and its reports."""
    folder = launcher.workspace / "references"
    folder.mkdir()
    for name in ("moving", "other_weights"):
        make_model(folder / name, seed=7 + len(name))
    make_gpt2(folder / "gpt2")
    make_model(folder / "other_tokens")
    rename_a_token(folder / "other_tokens" / "tokenizer.json")
    return folder


def make_gpt2(folder: Path) -> None:
    """Another architecture over the same tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    make_model(folder)
    torch.manual_seed(3)
    config = GPT2Config(vocab_size=310, n_embd=24, n_layer=2, n_head=2, n_positions=256, bos_token_id=0, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)


def rename_a_token(path: Path) -> None:
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))


def make_large(folder: Path) -> None:
    """46 million parameters, 184 MB in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20_000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def break_a_token(source: Path, folder: Path, token: int) -> None:
    """A copy of a model whose embedding of one token is not a number."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def run_worker(
    launcher: Launcher, folder: Path, scenario: str, overrides: list[str], processes: int
) -> list[dict[str, Any]]:
    """What each rank found."""
    command = launcher.command("score", f"worker_{scenario}", [], processes)
    recipe = Path(command[-1])
    settings = launcher.base | {"data": {**launcher.base["data"], **dict(pair.split("=") for pair in overrides)}}
    settings["run"] = {**launcher.base["run"], "output_dir": str(folder)}
    recipe.write_text(json.dumps(settings))
    done = subprocess.run(
        [*command[:-3], str(WORKER), scenario, str(recipe), str(folder)],
        env=os.environ | ON_CPUS,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found: list[dict[str, Any]] = json.loads((folder / f"{scenario}.json").read_text())
    return found


@pytest.fixture(scope="module")
def two_ranks(launcher: Launcher, folder: Path) -> list[dict[str, Any]]:
    return run_worker(launcher, folder, "two_ranks", [], 2)


@pytest.fixture(scope="module")
def one_rank(launcher: Launcher, folder: Path, two_ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The same stores on one rank, with one more pair that holds a token of its own."""
    make_large(folder / "large")
    tilde = json.loads((folder / "moving" / "tokenizer.json").read_text())["model"]["vocab"]["~"]
    break_a_token(folder / "moving", folder / "broken", tilde)
    lines = (launcher.workspace / "train.jsonl").read_text()
    # Of middle length: the start-up check looks at the longest and the shortest pair.
    odd = json.dumps(
        {
            "prompt": "46: may I, please, or may I not?",
            "chosen": " Yes, you may.",
            "rejected": " ~ No, you may not, sorry!",
        }
    )
    (folder / "train.jsonl").write_text(lines + odd + "\n")
    return run_worker(launcher, folder, "one_rank", [f"train={folder / 'train.jsonl'}"], 1)[0]


def test_ranks_load_no_package_that_they_do_not_need(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["loaded_in_vain"] for rank in two_ranks] == [[], []]


def test_threads_of_a_rank_on_cpus_share_one_heap(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["heaps"] for rank in two_ranks] == [1, 1]


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this kernel has no transparent huge pages"
)
def test_ranks_on_cpus_ask_for_huge_pages(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["asks_for_huge_pages"] for rank in two_ranks] == [True, True]


def test_engines_gather_and_reduce_by_exchanges_on_cpus(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["exchanges"] for rank in two_ranks] == [[True, True]] * 2


def test_threads_beside_the_one_that_computes_take_no_cores_from_it(one_rank: dict[str, Any]) -> None:
    assert one_rank["threads"] == [2, 1]


def test_only_rows_that_were_never_scored_are_scored(two_ranks: list[dict[str, Any]]) -> None:
    """Learning rate, folder, epochs, seed, batch, layout, loss, schedule, offload and order are not in the key."""
    for rank in two_ranks:
        found = rank["settings_and_data"]
        assert found["first"]["computed"] == 2 * (NUM_PAIRS - NUM_ADDED)
        assert found["other_settings"]["computed"] == 0
        assert found["rows_added"]["computed"] == 2 * NUM_ADDED
        assert "Loading" not in found["other_settings"]["said"]
        assert "Reference, training: 90 rows, 76 cached, 14 to score" in found["rows_added"]["said"]


def test_a_run_that_ends_early_scores_what_its_steps_take(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        found = rank["ends_early"]
        assert found["short"]["computed"] == 2 * 8
        assert found["all_of_its_steps"]
        assert found["whole"]["computed"] == 2 * (NUM_PAIRS - 8)
    assert "Reference, training: 16 rows, 0 cached, 16 to score" in two_ranks[0]["ends_early"]["short"]["said"]
    assert "Reference, training: 90 rows, 16 cached, 74 to score" in two_ranks[0]["ends_early"]["whole"]["said"]


def test_another_number_of_ranks_finds_all_rows(one_rank: dict[str, Any]) -> None:
    assert "Reference, training: 92 rows, 90 cached, 2 to score" in one_rank["other_world"]["said"]
    assert one_rank["other_world"]["computed"] == 2


def test_a_checkpoint_that_was_overwritten_in_place_shares_no_row(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        found = rank["overwritten"]
        assert found["before"]["computed"] == found["after"]["computed"] == found["differing"] == found["rows"] == 90
    said = two_ranks[0]["overwritten"]["after"]["said"]
    assert "Reference, training: 90 rows, 0 cached, 90 to score" in said
    assert "weights differ in model.safetensors" in said


def test_nothing_is_resident_between_forwards(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert rank["engine"]["resident"] == [0] * 5
        assert rank["engine"]["shards_on"] == ["cpu"]


def test_shards_are_pinned_only_where_they_fit(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert rank["engine"]["pinned"] == [[False, True], False]


def test_a_released_reference_is_dead(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert rank["engine"]["alive"] == []


def test_the_memory_of_a_released_reference_comes_back(one_rank: dict[str, Any]) -> None:
    _, measured = one_rank["memory"]["measured"]
    model = measured["model"]
    assert measured["loaded"] - measured["before"] > 0.9 * model, measured
    assert measured["after"] - measured["before"] < 0.05 * model, measured


def test_rows_that_are_not_finite_are_named_and_the_others_kept(one_rank: dict[str, Any]) -> None:
    found = one_rank["not_finite"]
    assert "1 sequences have log-probs that are not finite (" in found["error"]
    assert "train.jsonl:46 rejected)" in found["error"]


def test_a_reference_of_another_architecture_is_scored_as_it_scores_itself(
    two_ranks: list[dict[str, Any]], launcher: Launcher, folder: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "gpt2", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    expected = []
    for row in map(json.loads, (launcher.workspace / "train.jsonl").read_text().splitlines()):
        prompt = tokenizer(row["prompt"]).input_ids
        for side in ("chosen", "rejected"):
            completion = [*tokenizer(row[side], add_special_tokens=False).input_ids, 1]
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            expected.append(logits.log_softmax(-1)[range(len(completion)), completion].sum().item())
    for rank in two_ranks:
        assert rank["architectures"]["sums"] == pytest.approx(expected, rel=1e-5)


def test_a_reference_with_other_tokens_is_refused(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert "has another tokenizer (2 tokens differ" in rank["architectures"]["refusal"]


def test_disks_that_are_not_shared_all_get_every_row_once_scored(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        found = rank["disks"]
        assert found["rows"] == found["needed"] == 90
        assert found["computed"] == found["needed"] - found["seeded"]
        assert found["largest_gap"] < 1e-6


def test_rows_of_a_step_are_readable_at_once_and_written_together(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        found = rank["per_batch"]
        assert found["files"][:5] == [0] * 5
        assert 1 <= found["files"][5] <= 2  # one a rank
        assert found["computed"] == [18, 36, 54, 72, 90, 90]
        assert found["held"] == 0
        assert found["largest_gap"] < 1e-6
        assert found["said"].count("Reference, training: 90 rows, 0 cached, 90 to score") == 1


def only_store(cache_dir: Path) -> Path:
    (store,) = store_folders(cache_dir)
    return store


@pytest.fixture(scope="module")
def shared_store(launcher: Launcher, undisturbed: Launched) -> Path:
    """The store of the undisturbed run, in a folder where launches of other references have theirs."""
    fingerprint = read_fingerprint(undisturbed.folder)
    assert fingerprint is not None
    return store_folder(launcher.workspace / "cache", fingerprint)


def stored_rows(store: Path) -> dict[bytes, np.ndarray]:
    """All rows of a store, read part by part."""
    rows: dict[bytes, np.ndarray] = {}
    for path in sorted(store.glob("part-*")):
        part = Part(path, None)
        values = part.log_probs(np.arange(part.num_rows, dtype=np.int32))
        for key, row in zip(part.keys(), values, strict=True):
            assert key.tobytes() not in rows, "a row is stored twice"
            rows[key.tobytes()] = row
    return rows


def assert_same_rows(actual: dict[bytes, np.ndarray], expected: dict[bytes, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for key, row in expected.items():
        np.testing.assert_allclose(actual[key], row, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def standalone(launcher: Launcher) -> Path:
    """The cache of a scoring job of its own, on one rank, for a reference in a folder of its own."""
    shutil.copytree(launcher.workspace / "model", launcher.workspace / "reference_model")
    cache = launcher.workspace / "standalone_cache"
    overrides = [f"reference.path={launcher.workspace / 'reference_model'}", f"reference.cache_dir={cache}"]
    run = launcher("standalone", overrides, stage="score", processes=1)
    assert run.returncode == 0, run.output
    assert "Done: 112 rows scored" in run.output
    return cache


def test_all_schedules_store_the_same_values(
    launcher: Launcher, undisturbed: Launched, shared_store: Path, standalone: Path
) -> None:
    upfront = stored_rows(shared_store)
    assert len(upfront) == 2 * (NUM_PAIRS + NUM_HELD_OUT)
    assert_same_rows(stored_rows(only_store(standalone)), upfront)
    cache = launcher.workspace / "per_batch_cache"
    overrides = ["reference.schedule=per_batch", f"reference.cache_dir={cache}", "run.epochs=1"]
    run = launcher("per_batch", overrides)
    assert run.returncode == 0, run.output
    assert "Reference, training: 90 rows, 0 cached, 90 to score" in run.output
    assert_same_rows(stored_rows(only_store(cache)), upfront)
    expected = undisturbed.training_lines()[0]
    assert run.training_lines()[0]["rewards/margin"] == pytest.approx(expected["rewards/margin"], abs=1e-6)


def test_equal_micro_batches_give_equal_bits_in_every_schedule(
    folder: Path, shared_store: Path, two_ranks: list[dict[str, Any]]
) -> None:
    """Two ranks each: upfront inside training, a pass of its own, and a step that holds every pair."""
    upfront = stored_rows(shared_store)
    for schedule in ("whole", "one_step"):
        actual = stored_rows(only_store(folder / schedule))
        common = actual.keys() & upfront.keys()
        assert len(common) == 2 * NUM_PAIRS
        assert all(np.array_equal(actual[key], upfront[key]) for key in common), schedule


@contextmanager
def opened(path: Path) -> Iterator[Callable[[], int]]:
    """Count how often any process opens a file, by asking the kernel."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
    assert libc.inotify_add_watch(descriptor, os.fsencode(path), IN_OPEN) >= 0

    def count() -> int:
        try:
            events = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return 0
        return len(events) // struct.calcsize("iIII")

    yield count
    os.close(descriptor)


def test_a_full_store_needs_no_weight_of_the_reference(launcher: Launcher, standalone: Path) -> None:
    weights = launcher.workspace / "reference_model" / "model.safetensors"
    overrides = [f"reference.path={weights.parent}", f"reference.cache_dir={standalone}", "run.max_steps=1"]
    with opened(weights) as count:
        weights.read_bytes()
        assert count() == 1, "the watch sees nothing"
        run = launcher("second", overrides)
        assert run.returncode == 0, run.output
        assert count() == 0
    assert "Reference, training: 20 rows, 20 cached, 0 to score" in run.output


def poison(store: Path, poisoned: Path) -> None:
    """The same rows in the same store, each log-prob 2 nats lower."""
    fingerprint = read_fingerprint(store)
    assert fingerprint is not None
    rows = stored_rows(store)
    keys: Keys = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
    ReferenceStore.open(poisoned, fingerprint).append(keys, [row - np.float32(2) for row in rows.values()])


def test_wrong_values_in_the_store_stop_the_run_at_its_first_step(launcher: Launcher, shared_store: Path) -> None:
    poisoned = launcher.workspace / "poisoned_cache"
    poison(shared_store, poisoned)
    run = launcher("poisoned", [f"reference.cache_dir={poisoned}", "evaluate.at_start=false"])
    assert run.returncode != 0
    assert "step 1: policy and reference start from" in run.output
    assert "differ by 2 nats" in run.output
    assert list(run.folder.glob("checkpoints/*")) == []


def test_verify_rescores_rows_and_finds_wrong_ones(
    launcher: Launcher, shared_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(launcher.workspace / "undisturbed.yaml")
    cache, store = str(shared_store.parent), shared_store.name
    assert main(["cache", "--dir", cache, "verify", store, "--recipe", recipe, "--rows", "25"]) == 0
    assert "25 rows" in capsys.readouterr().out
    poisoned = launcher.workspace / "poisoned_cache_to_verify"
    poison(shared_store, poisoned)
    assert main(["cache", "--dir", str(poisoned), "verify", store, "--recipe", recipe, "--rows", "25"]) == 1
    assert "largest gap 2" in capsys.readouterr().out
    assert main(["cache", "--dir", cache, "verify", store, "--recipe", recipe, "model.dtype=bfloat16"]) == 2
    assert "precision bfloat16, store has float32" in capsys.readouterr().err
