"""Which reference a run asks for, and what it says of the rows that are missing; no engine is built."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dpo_scale.console import Console
from dpo_scale.data.token_pairs import TokenPair, TokenPairs
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.errors import UserError
from dpo_scale.recipe import Recipe
from dpo_scale.reference import session, source
from dpo_scale.reference.fingerprint import ReferenceFingerprint
from dpo_scale.reference.session import Reference

FINGERPRINT = ReferenceFingerprint(scoring_version=1, dtype="float32", weights={"model.safetensors": "0"}, config={})


def recipe_of(folder: Path, **reference: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "someone/policy", "revision": "of-the-policy"},
            "reference": {"cache_dir": str(folder / "cache"), **reference},
            "data": {"train": "pairs.jsonl"},
            "batch": {"global_pairs": 2},
            "loss": {"beta": 0.1},
            "run": {"output_dir": str(folder / "run")},
        }
    )


@pytest.mark.parametrize(
    ("reference", "asked"),
    [
        ({}, ("someone/policy", "of-the-policy")),
        ({"path": "someone/reference"}, ("someone/reference", None)),
        ({"path": "someone/reference", "revision": "its-own"}, ("someone/reference", "its-own")),
    ],
)
def test_the_reference_is_asked_for_in_its_own_revision(
    reference: dict[str, str], asked: tuple[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str | None, str]] = []

    def resolve(path: str, revision: str | None, setting: str) -> Path:
        seen.append((path, revision, setting))
        raise UserError("seen")

    monkeypatch.setattr(source, "resolve_folder", resolve)
    data: Any = None
    with pytest.raises(UserError, match="seen"):
        source.find_reference(recipe_of(tmp_path, **reference), data, OneProcess(), Console(is_main=False))
    assert seen == [(*asked, "reference.path")]


def pairs(*answers: str) -> TokenPairs:
    """A letter is an answer of one token; all answer the same prompt."""
    prompt = np.array([1, 2], np.int32)
    tokens = ([np.array([ord(letter)], np.int32) for letter in two] for two in answers)
    return TokenPairs.from_pairs(TokenPair(prompt, *two, row=f"f:{n}") for n, two in enumerate(tokens))


def test_a_row_that_recurs_is_announced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(fingerprint=FINGERPRINT, folder=tmp_path, config=None)
    monkeypatch.setattr(session, "find_reference", lambda *arguments: found)
    data: Any = SimpleNamespace(train=pairs("ab", "ac", "cc", "de"), evaluate=pairs("xx", "xc"))
    runtime: Any = SimpleNamespace(ranks=OneProcess())
    said = io.StringIO()
    reference = Reference(recipe_of(tmp_path), runtime, data, Console(said))  # type: ignore[arg-type]
    c = reference.train_rows.of(np.array([2]))[:1]
    reference.store.append(c, [np.zeros(1, np.float32)])
    for rows in (reference.train_rows, reference.evaluate_rows):
        reference._announce(rows, np.arange(len(rows.pairs)))
    assert said.getvalue().splitlines() == [
        "Reference, training: 5 rows, 1 cached, 4 to score",
        "Reference, held-out: 2 rows, 1 cached, 1 to score",
    ]


def test_a_store_that_holds_every_row_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(fingerprint=FINGERPRINT, folder=tmp_path, config=None)
    monkeypatch.setattr(session, "find_reference", lambda *arguments: found)
    data: Any = SimpleNamespace(train=pairs("ab", "ac"), evaluate=pairs("xx"))
    runtime: Any = SimpleNamespace(ranks=OneProcess())
    reference = Reference(recipe_of(tmp_path), runtime, data, Console(is_main=False))
    both = (reference.train_rows, reference.evaluate_rows)
    keys = np.concatenate([rows.of(np.arange(len(rows.pairs))) for rows in both])
    reference.store.append(keys, [np.zeros(1, np.float32)] * len(keys))

    def refuse(*_: object) -> None:
        raise UserError("not writable")

    for name in ("ensure_writable", "_write_part"):
        monkeypatch.setattr(reference.store, name, refuse)
    reference.score_all(*both)
    assert reference.logps(reference.train_rows, np.arange(2)).shape == (2, 2)
