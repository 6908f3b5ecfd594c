"""The demo's world: what is held out is new, and only the preference pairs know the rule."""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dpo_scale.demo import base_model
from dpo_scale.demo.base_model import make_base_model, train_tokenizer
from dpo_scale.demo.run import DemoFolder, environment_first, preference_of_policy
from dpo_scale.demo.world import NUMBERS, Pair, World, make_world
from dpo_scale.errors import UserError
from dpo_scale.model.tokenizer import load_tokenizer

KIND = re.compile(r"please|kindly|so good as|grateful|trouble you|thank you", re.IGNORECASE)
GRANTED = re.compile(r"Gladly|With pleasure")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(7, corpus_lines=2000, train_pairs=400, held_out_pairs=100)


def who_and_what(text: str) -> tuple[str, str]:
    """The villager and the last word of what is asked for."""
    found = re.match(rf"(\w+):.* (?:{'|'.join(NUMBERS)}) \w+ (\w+)", text)
    assert found, text
    return found[1], found[2]


def test_a_seed_makes_one_world(world: World) -> None:
    assert make_world(7, 2000, 400, 100) == world
    assert make_world(8, 2000, 400, 100) != world


def test_a_world_has_the_texts_asked_for(world: World) -> None:
    assert (len(world.corpus), len(world.train), len(world.held_out)) == (2000, 400, 100)
    prompts = [pair.prompt for pair in world.train + world.held_out]
    assert len(set(prompts)) == 500
    assert not {line[: line.index("Shopkeeper:")] + "Shopkeeper:" for line in world.corpus} & set(prompts)


def test_held_out_villagers_ask_for_things_they_never_asked_for_before(world: World) -> None:
    known = {who_and_what(text) for text in (*world.corpus, *(pair.prompt for pair in world.train))}
    new = {who_and_what(pair.prompt) for pair in world.held_out}
    assert not known & new
    assert {name for name, _ in new} <= {name for name, _ in known}
    assert {thing for _, thing in new} <= {thing for _, thing in known}


def test_the_preferred_answer_grants_kind_requests_only(world: World) -> None:
    for pair in world.train + world.held_out:
        is_kind = KIND.search(pair.prompt) is not None
        assert (GRANTED.match(pair.chosen.strip()) is not None) == is_kind, pair
        assert (GRANTED.match(pair.rejected.strip()) is not None) != is_kind, pair


def test_the_corpus_answers_every_request_both_ways(world: World) -> None:
    answers = defaultdict(set)
    for line in world.corpus:
        granted = GRANTED.match(line.split("Shopkeeper: ")[1]) is not None
        answers[line.split("\n")[0]].add(granted)
    assert all(found == {True, False} for found in answers.values())


@pytest.mark.parametrize("seed", range(5))
def test_whoever_likes_some_forms_of_answer_is_right_half_of_the_time(world: World, seed: int) -> None:
    rng, liking = random.Random(seed), dict[str, float]()

    def score(answer: str) -> float:
        return liking.setdefault(answer.split()[0], rng.random())

    def share(pairs: tuple[Pair, ...]) -> float:
        return sum(score(pair.chosen) > score(pair.rejected) for pair in pairs) / len(pairs)

    assert (share(world.train), share(world.held_out)) == (0.5, 0.5)


def test_the_tokenizer_keeps_the_line_break_and_reads_the_same_in_the_trainer(world: World, tmp_path: Path) -> None:
    expected = train_tokenizer(world.corpus, tmp_path / "tokenizer.model")
    actual = load_tokenizer(str(tmp_path))
    assert isinstance(actual, PreTrainedTokenizerFast)
    for text in (*world.corpus[:50], "Zoë: 漢字?\nShopkeeper:"):
        assert actual(text).input_ids == [expected.bos_id(), *expected.encode(text)]
        assert expected.decode(expected.encode(text)) == text


def test_the_base_model_is_a_folder_that_transformers_loads(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_model, "STEPS", 12)
    monkeypatch.setattr(base_model, "LINES_PER_STEP", 8)
    monkeypatch.setattr(base_model, "WARMUP_STEPS", 2)
    losses: list[float] = []
    make_base_model(world.corpus, tmp_path, seed=0, on_step=losses.append)
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(set(modes.values())) == 1, "whoever may read the configuration may read the weights"
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.config.eos_token_id == load_tokenizer(str(tmp_path)).eos_token_id


def test_the_demo_clears_what_a_demo_left_and_nothing_else(tmp_path: Path) -> None:
    demo = DemoFolder(tmp_path / "demo")
    demo.clear()
    (demo.run / "metrics.jsonl").touch()
    (demo.root / "notes.txt").touch()
    demo.clear()
    assert not (demo.run / "metrics.jsonl").exists()
    assert (demo.root / "notes.txt").exists()


def test_the_demo_refuses_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="--output"):
        DemoFolder(tmp_path).clear()
    assert (tmp_path / "run").exists()


@pytest.mark.parametrize("named", ["notes.txt", "notes.txt/demo"])
def test_the_demo_refuses_what_can_be_no_folder(named: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt.*: Not a directory; choose another folder with --output"):
        DemoFolder(tmp_path / named).clear()


@pytest.mark.parametrize("found", [None, "/usr/bin/accelerate"])
def test_the_demo_names_the_environment_where_the_shell_is_outside_of_it(
    found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda _: found)
    assert environment_first() == ("" if found else f" (first: . {tmp_path.name}/bin/activate)")


def test_the_demo_reads_the_first_and_the_last_held_out_line(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"step": 0, "eval/logps/accuracy": 0.5}\n{"step": 4, "loss": 0.6}\n'
        '{"step": 8, "eval/logps/accuracy": 0.7}\n{"step": 12, "eval/logps/accuracy": 0.9}\n'
    )
    assert preference_of_policy(metrics) == (0.5, 0.9)
