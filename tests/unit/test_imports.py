"""Imports point one way, along the arrow of the data, and one package knows the launcher's libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dpo_scale
from dpo_scale.recipe import dump_recipe, load_recipe
from dpo_scale.training.status import StatusFile

ROOT = Path(dpo_scale.__file__).parent

ORDER = (
    ("errors",),
    ("recipe", "objectives", "console", "files", "shipped_files", "locks", "watch"),
    ("data",),
    ("model",),
    ("distributed",),
    ("inputs",),
    ("reference",),
    ("training",),
    ("operations",),
    ("stages",),
    ("launched", "demo"),
    ("cli", "train", "score", "evaluate"),
)
"""From the bottom up: a part imports parts below its own row, and modules of itself."""

RANK_LIBRARIES = ("accelerate", "deepspeed", "torch.distributed")

MODULES = sorted(ROOT.rglob("*.py"))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def _part(relative: Path) -> str:
    """The top-level module or package that a file belongs to."""
    return relative.parts[0].removesuffix(".py")


def _row(part: str) -> int:
    return next(number for number, row in enumerate(ORDER) if part in row)


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _wrong_imports() -> list[str]:
    wrong = []
    for path in MODULES:
        relative = path.relative_to(ROOT)
        part = _part(relative)
        if part == "__init__":
            continue
        for line, name in _imports(path):
            if not _is_within(name, "dpo_scale") or name == "dpo_scale.__version__":
                continue
            other = name.split(".")[1]
            if other != part and _row(other) >= _row(part):
                wrong.append(f"{relative}:{line} imports {name}")
    return wrong


def test_every_module_has_its_place_in_the_order() -> None:
    parts = {_part(path.relative_to(ROOT)) for path in MODULES} - {"__init__"}
    assert parts == {part for row in ORDER for part in row}


def test_imports_point_down_the_order() -> None:
    assert _wrong_imports() == []


def test_within_training_nothing_sees_the_loop() -> None:
    seen = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / "training").glob("*.py")
        for line, name in _imports(path)
        if _is_within(name, "dpo_scale.training.loop")
    ]
    assert seen == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_distributed_package_knows_ranks(path: Path) -> None:
    relative = path.relative_to(ROOT)
    known = [
        f"{relative}:{line} imports {name}"
        for line, name in _imports(path)
        if any(_is_within(name, library) for library in RANK_LIBRARIES)
    ]
    assert known == [] or _part(relative) == "distributed"


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [path for path in MODULES if path.stem in drawers or path.parent.name in drawers] == []


def test_objectives_know_tensors_only() -> None:
    names = {name.split(".")[0] for _, name in _imports(ROOT / "objectives.py")}
    assert names <= {"__future__", "typing", "torch"}


WITHOUT_TORCH = """
import sys
from dpo_scale.cli import main

assert main(sys.argv[1:]) == 0
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("name", ["run", "recipe.yaml"])
def test_a_status_is_told_without_torch(name: str, tmp_path: Path) -> None:
    """It takes seconds to load, and a script asks again and again."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{path: base}}\ndata: {{train: [pairs.jsonl]}}\nbatch: {{global_pairs: 8}}\nloss: {{beta: 0.1}}\n"
        f"run: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    StatusFile(tmp_path / "run", "train").finish()
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(load_recipe(path)))
    (tmp_path / "run" / "model").mkdir()
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, "status", str(tmp_path / name)], check=True)
