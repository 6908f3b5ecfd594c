"""A recipe is closed and typed; every mistake is reported at once, with its key and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dpo_scale.data.planning import epoch_order
from dpo_scale.errors import RecipeError
from dpo_scale.recipe import DataSource, Recipe, Section, cache_root, dump_recipe, load_recipe

MINIMAL = """
model: {path: base}
data: {train: [pairs.jsonl]}
batch: {global_pairs: 64}
loss: {beta: 2.0}
run: {output_dir: runs/one}
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def _load(folder: Path, *overrides: str, text: str = MINIMAL) -> Recipe:
    return load_recipe(_write(folder, text), overrides)


def _mistakes(folder: Path, *overrides: str, text: str = MINIMAL) -> list[str]:
    """The lines below the headline of the error."""
    with pytest.raises(RecipeError) as caught:
        _load(folder, *overrides, text=text)
    headline, *lines = str(caught.value).splitlines()
    assert str(folder / "recipe.yaml") in headline
    return [line.strip() for line in lines]


def test_a_minimal_recipe_gets_its_defaults(tmp_path: Path) -> None:
    recipe = _load(tmp_path)
    assert recipe.data.train == [DataSource(path="pairs.jsonl")]
    assert recipe.optim.learning_rate == 5e-7
    assert recipe.loss.reduction == "mean"
    assert recipe.reference_path == "base"
    assert recipe.scoring_rank_tokens == 4 * recipe.batch.rank_tokens


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = """
model: {path: base, dtype: float8}
data: {train: [pairs.jsonl], max_lenght: 100}
batch: {global_pairs: "64"}
loss: {}
optimizer: {learning_rate: 1}
run: {output_dir: runs/one}
"""
    actual = _mistakes(tmp_path, "seed=3", "loss.beta_=1", text=text)
    expected_beginnings = [
        "seed=3: an override has the form section.field=value",
        "model.dtype: Input should be 'bfloat16', 'float16' or 'float32' (got 'float8')",
        "data.max_lenght: unknown key; did you mean 'max_length'?",
        "batch.global_pairs: Input should be a valid integer (got '64')",
        "loss.beta: required, and not set",
        "loss.beta_: unknown key; did you mean 'beta'?",
        "optimizer: unknown key; did you mean 'optim'?",
    ]
    assert sorted(actual) == sorted(expected_beginnings)


def test_the_headline_counts_the_mistakes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml: 1 mistake\n"):
        _load(tmp_path, "loss.beta=0")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: 2 mistakes\n"):
        _load(tmp_path, "loss.beta=0", "run.seed=-1")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.attentoin=auto", "did you mean 'attention'?"),
        ("optim.lr=1e-6", "known keys: learning_rate, schedule,"),
        ("batchs.layout=shared", "did you mean 'batch'?"),
    ],
)
def test_unknown_keys_come_with_a_suggestion(override: str, expected: str, tmp_path: Path) -> None:
    (line,) = _mistakes(tmp_path, override)
    assert line.startswith(override.partition("=")[0].removesuffix(".layout"))
    assert expected in line


def test_unknown_keys_of_a_data_source_come_with_a_suggestion(tmp_path: Path) -> None:
    (line,) = _mistakes(tmp_path, text=MINIMAL.replace("[pairs.jsonl]", "[{path: x, colums: {a: b}}]"))
    assert line == "data.train.0.colums: unknown key; did you mean 'columns'?"


def test_a_repeated_key_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml: line 8: 'beta' stands here for the second time; keep one"):
        _load(tmp_path, text=MINIMAL + "optim:\n  {beta: 1, beta: 2}\n")
    with pytest.raises(RecipeError, match="line 7: 'loss' stands here for the second time"):
        _load(tmp_path, text=MINIMAL + "loss: {beta: 3.0}\n")


@pytest.mark.parametrize(
    "override",
    [
        "batch.global_pairs=64.0",
        "batch.global_pairs=true",
        "batch.global_pairs=0",
        "optim.learning_rate='5e-7'",
        "optim.learning_rate=.nan",
        "loss.beta=.inf",
        "loss.label_smoothing=0.5",
        "optim.betas=['0.9', 0.99]",
        "optim.betas=[0.9]",
        "optim.betas=[0.9, 1.1]",
        "optim.betas=[0.9, 1.0]",
        f"run.seed={2**64}",
        "optim.warmup_ratio=1.5",
        "model.dropout=1",
        "model.path=3",
        "data.train=[]",
        "data.train=5",
        "track.to=3",
        "evaluate.every_steps=0",
        "loss.type=hinge",
    ],
)
def test_wrong_types_and_ranges_are_refused_and_never_converted(override: str, tmp_path: Path) -> None:
    lines = _mistakes(tmp_path, override)
    assert lines
    assert all(line.startswith(override.partition("=")[0]) for line in lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5e-7", 5e-7), ("5E-7", 5e-7), ("1e-6", 1e-6), ("5.0e-7", 5e-7), (".5e-6", 5e-7), ("1e0", 1.0), ("0", 0.0)],
)
def test_exponents_without_a_point_are_numbers(text: str, expected: float, tmp_path: Path) -> None:
    assert _load(tmp_path, f"optim.learning_rate={text}").optim.learning_rate == expected
    assert _load(tmp_path, text=f"{MINIMAL}optim: {{learning_rate: {text}}}").optim.learning_rate == expected


def test_overrides_win_and_may_name_sections_that_the_file_lacks(tmp_path: Path) -> None:
    recipe = _load(
        tmp_path,
        "loss.beta=0.1",
        "--loss.reduction=sum",
        "data.train=[a.jsonl, {path: b.jsonl, rows: 5}]",
        "reference.path=other",
        "model.revision=null",
        "optim.betas=[0.9, 0.95]",
        "run.output_dir=runs/a=b",
    )
    assert (recipe.loss.beta, recipe.loss.reduction) == (0.1, "sum")
    assert recipe.data.train == [DataSource(path="a.jsonl"), DataSource(path="b.jsonl", rows=5)]
    assert recipe.reference_path == "other"
    assert recipe.optim.betas == (0.9, 0.95)
    assert recipe.run.output_dir == "runs/a=b"


@pytest.mark.parametrize("override", ["loss", "beta=1", ".beta=1", "loss.=1", "loss.beta"])
def test_malformed_overrides_are_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"an override has the form section\.field=value|unknown key"):
        _load(tmp_path, override)


def test_settings_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    (line,) = _mistakes(tmp_path, "reference.revision=main")
    assert line.startswith("reference: revision belongs to reference.path")
    (line,) = _mistakes(tmp_path, "reference.offload=nvme")
    assert "offload: nvme needs reference.nvme_path" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "a recipe is a mapping of sections"),
        ("", "a recipe is a mapping of sections"),
        ("model: [unclosed", "line 1"),
        (MINIMAL + "optim: 5\n", "optim: "),
        ("!!python/object/apply:os.system ['true']", "python/object"),
    ],
)
def test_files_that_are_no_recipe_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=expected):
        _load(tmp_path, text=text)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_a_recipe_in_another_encoding_is_refused(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL.replace("runs/one", "läufe/one"), encoding=encoding)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: not UTF-8; save it in that encoding"):
        load_recipe(path)


def test_a_section_that_is_a_value_is_told_what_belongs_there(tmp_path: Path) -> None:
    text = MINIMAL.replace("{beta: 2.0}", "sigmoid").replace("[pairs.jsonl]", "[3]")
    assert _mistakes(tmp_path, text=text) == [
        "data.train.0: a section of settings (path, columns, rows, weight), not 3",
        "loss: a section of settings (type, beta, reduction, label_smoothing), not 'sigmoid'",
    ]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = [
        "model.path",
        "model.tokenizer",
        "reference.path",
        "reference.nvme_path",
        "reference.cache_dir",
        "data.chat_template",
        "data.cache_dir",
        "run.output_dir",
        "run.resume",
    ]
    recipe = _load(tmp_path, *(f"{name}=~/x" for name in paths), "data.train=[~/a.jsonl, {path: ~/b.jsonl}, a~b]")
    values = recipe.model_dump()
    assert [values[section][field] for section, field in (name.split(".") for name in paths)] == ["/home/me/x"] * 9
    assert [source.path for source in recipe.data.train] == ["/home/me/a.jsonl", "/home/me/b.jsonl", "a~b"]


def test_a_tracker_may_stand_without_brackets(tmp_path: Path) -> None:
    assert _load(tmp_path, "track.to=tensorboard").track.to == ["tensorboard"]


def test_the_largest_seed_is_taken_by_all_that_draws(tmp_path: Path) -> None:
    seed = _load(tmp_path, f"run.seed={2**64 - 1}").run.seed
    torch.Generator().manual_seed(seed)
    assert sorted(epoch_order(5, seed, 0).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("beta", "reduction", "doubtful"),
    [(0.1, "mean", True), (2.0, "mean", False), (0.1, "sum", False), (5.0, "sum", True)],
)
def test_a_beta_of_the_other_reduction_is_doubted(beta: float, reduction: str, doubtful: bool, tmp_path: Path) -> None:
    doubt = _load(tmp_path, f"loss.beta={beta}", f"loss.reduction={reduction}").loss.doubt
    said = f"loss.beta is {beta:g}: 0.1 is usual for sums, 2 to 10 for means; loss.reduction is {reduction}"
    assert doubt == (said if doubtful else "")


def test_an_option_of_accelerate_is_told_from_an_override(tmp_path: Path) -> None:
    option, _ = _mistakes(tmp_path, "--num_processes", "2")
    assert option.endswith("section.field=value; options of accelerate go before -m")


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.yaml: No such file or directory; give the path of a recipe file"):
        load_recipe(tmp_path / "absent.yaml")


def test_a_recipe_survives_being_written_and_read(tmp_path: Path) -> None:
    recipe = _load(tmp_path, "optim.learning_rate=3e-7", "data.evaluate=[held.jsonl]", "checkpoint.every_minutes=null")
    text = dump_recipe(recipe)
    assert load_recipe(_write(tmp_path, text)) == recipe
    written = yaml.safe_load(text)
    assert {name: set(section) for name, section in written.items()} == {
        name: set(_section(name).model_fields) for name in Recipe.model_fields
    }


def _section(name: str) -> type[Section]:
    section = Recipe.model_fields[name].annotation
    assert isinstance(section, type)
    assert issubclass(section, Section)
    return section


@pytest.mark.parametrize("section", [*(_section(name) for name in Recipe.model_fields), DataSource])
def test_every_setting_is_documented_where_it_is_declared(section: type[Section]) -> None:
    undocumented = [name for name, field in section.model_fields.items() if not field.description]
    assert not undocumented


def test_a_recipe_is_immutable(tmp_path: Path) -> None:
    recipe = _load(tmp_path)
    changes: dict[str, Any] = {"beta": 3.0}
    with pytest.raises(ValueError, match="frozen"):
        setattr(recipe.loss, *next(iter(changes.items())))


@pytest.mark.parametrize("module", ["dpo_scale.recipe", "dpo_scale.cli", "dpo_scale.launched"])
def test_torch_is_not_loaded_before_a_recipe_is_checked(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'deepspeed') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_caches_follow_the_xdg_convention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_root() == Path("/elsewhere/dpo_scale")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_root() == Path.home() / ".cache" / "dpo_scale"
