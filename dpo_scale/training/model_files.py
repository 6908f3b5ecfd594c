"""What a run keeps of the model that it starts from, beside weights: an export needs it when the run ends.

By then the model's folder may be gone, or hold another tokenizer.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from dpo_scale.data.tokenization import DEFAULT_TEMPLATE, chat_templates
from dpo_scale.errors import UserError
from dpo_scale.files import fsync_folder, write_json, write_whole
from dpo_scale.model.tokenizer import load_tokenizer, save_tokenizer, tokenizer_files
from dpo_scale.recipe import Recipe

MODEL_FILES = "model_files"
"""Their folder in that of a run."""
_FILES = ("config.json", "generation_config.json", "*.py", "LICENSE*", "NOTICE*")


def keep(folder: Path, recipe: Recipe, source: Path) -> None:
    """Write configuration, code, licences and the tokenizer of a model to a folder, which appears whole.

    The tokenizer is written anew where plain transformers would misread the source's files, and `data.chat_template`
    takes the place of its own template.
    """
    hidden = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    for pattern in _FILES:
        for file in filter(Path.is_file, source.glob(pattern)):
            shutil.copyfile(file, hidden / file.name)
    path, template = recipe.model.tokenizer or str(source), recipe.data.chat_template
    tokenizer = load_tokenizer(path, trust_remote_code=recipe.model.trust_remote_code)
    save_tokenizer(tokenizer, path, hidden)
    if template is not None:
        _set_chat_template(hidden, chat_templates(tokenizer, template)[DEFAULT_TEMPLATE])
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(hidden, folder)
    fsync_folder(folder.parent)


def check(folder: Path) -> None:
    """Raise UserError where the tokenizer is gone: asked before an export writes weights, which may take long."""
    if not tokenizer_files(folder):
        raise UserError(f"{folder}: the tokenizer is gone; start the run's training once more, which writes it again")


def copy(folder: Path, target: Path) -> None:
    """Copy to an export what `keep` has left, but for the configuration, in which an export changes values."""
    for file in {*tokenizer_files(folder), *(file for pattern in _FILES[1:] for file in folder.glob(pattern))}:
        write_whole(target / file.relative_to(folder), file.read_bytes())


def _set_chat_template(folder: Path, template: str) -> None:
    """Make a template the only one of the tokenizer in a folder.

    It was used for every chat of the training. transformers would prefer a `tool_use` beside it for chats with tools,
    and other programs one in tokenizer_config.json.
    """
    for path in (*folder.glob("chat_template*.j*"), *folder.glob("additional_chat_templates/*")):
        path.unlink()
    with suppress(FileNotFoundError):
        (folder / "additional_chat_templates").rmdir()
    config = folder / "tokenizer_config.json"
    if config.exists():
        settings = json.loads(config.read_text("utf-8"))
        settings.pop("chat_template", None)
        write_json(config, settings)
    write_whole(folder / "chat_template.jinja", template)
