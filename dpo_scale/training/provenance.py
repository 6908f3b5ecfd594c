"""Everything in an exported model's folder but its weights, from the run's recipe."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_scale import __version__
from dpo_scale.data.tokenization import DEFAULT_TEMPLATE, chat_templates
from dpo_scale.model.tokenizer import load_tokenizer, save_tokenizer
from dpo_scale.recipe import Recipe
from dpo_scale.training.export import ModelFolder


@contextmanager
def model_folder(recipe: Recipe, source_model: Path, trajectory_digest: str) -> Iterator[ModelFolder]:
    """What an export of this run holds beside weights; valid inside the `with`.

    The tokenizer is written anew where plain transformers would misread the source's files.
    """
    path = recipe.model.tokenizer or str(source_model)
    template = recipe.data.chat_template
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(path, trust_remote_code=recipe.model.trust_remote_code)
        save_tokenizer(tokenizer, path, Path(folder))
        yield ModelFolder(
            source_model=source_model,
            trajectory_digest=trajectory_digest,
            tokenizer=Path(folder),
            chat_template=template and chat_templates(tokenizer, template)[DEFAULT_TEMPLATE],
            provenance={
                "made_by": f"dpo_scale {__version__}",
                "recipe": recipe.model_dump(mode="json"),
            },
        )
