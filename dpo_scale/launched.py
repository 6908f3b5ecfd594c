"""What every stage that `accelerate launch` starts has in common: arguments, output, ranks, and how it ends."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dpo_scale.console import Console, route_output
from dpo_scale.errors import UserError
from dpo_scale.recipe import Recipe, load_recipe
from dpo_scale.training import status

USER_ERROR = 2
CRASH = 1


def run_stage(name: str) -> NoReturn:
    """Run a stage as one rank of a launch: `python -m dpo_scale.NAME RECIPE [section.field=value ...]`.

    The process ends here, without waiting for other ranks: whoever fails takes the launch down at once.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    console = Console(is_main=is_main)
    recipe = None
    try:
        recipe = _recipe_of_arguments(name)
        console = _console_of_run(recipe, name, is_main=is_main)
        code = _stage(name)(recipe, console)
    except UserError as error:
        _report(console, error, f"error: {error}", name, recipe)
        code = USER_ERROR
    except BaseException as error:  # the last words of a rank, whatever ended it
        if isinstance(error, SystemExit):
            raise
        traceback.print_exc()
        rank = os.environ.get("RANK", "0")
        _report(console, error, f"rank {rank} failed:\n{traceback.format_exc()}", name, recipe)
        code = CRASH
    sys.stdout.flush()
    sys.stderr.flush()
    console.rich.file.flush()
    os._exit(code)


def _stage(name: str) -> Callable[[Recipe, Console], int]:
    """The stage's function; imported late, so that a wrong recipe is reported before torch is loaded."""
    from dpo_scale import stages

    return {"train": stages.train, "score": stages.score, "evaluate": stages.evaluate}[name]


def _recipe_of_arguments(name: str) -> Recipe:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        raise UserError(f"usage: -m dpo_scale.{name} RECIPE [section.field=value ...]")
    return load_recipe(arguments[0], arguments[1:])


def _console_of_run(recipe: Recipe, name: str, *, is_main: bool) -> Console:
    rank = os.environ.get("RANK", "0")
    folder = Path(os.environ.get("DPO_SCALE_LOGS") or Path(recipe.run.output_dir) / "logs")
    try:
        return route_output(folder / f"{name}-rank-{rank}.log", is_main=is_main)
    except OSError as error:
        raise UserError(f"run.output_dir: {error.filename}: {error.strerror}") from error


def _report(console: Console, error: BaseException, message: str, name: str, recipe: Recipe | None) -> None:
    """Say why the stage ends, once a machine: the first rank that fails speaks, the others follow it down."""
    print(message, file=sys.stderr)
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file is not None:
        attempt = Path(error_file).parent.parent  # a folder of this launch, shared by its ranks
        try:
            os.close(os.open(attempt / "said", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        # The launcher repeats what stands in this file in its closing words.
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    console.is_main = True
    console.say(message)
    if recipe is not None and name in status.FILES:
        status.record_failure(Path(recipe.run.output_dir), name, error)
