"""`dpo-scale`: the commands that need no launcher. Torch is imported only where a command uses it."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo_scale import __version__
from dpo_scale.console import counted
from dpo_scale.errors import USER_ERROR, UserError
from dpo_scale.files import named
from dpo_scale.operations.cluster import GPU_GIB, HOST_GIB, Assumptions
from dpo_scale.recipe import load_recipe, reference_cache_dir

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code.

    0; 1 for what plan, doctor, cache verify or status finds wrong; 2 for a mistake that the user can mend; of status 3
    for a run that goes on and 85 for one that is worth starting again; 130 for an interrupt.
    """
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        return USER_ERROR
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positionals in one go only: settings behind an option are left over
    if rest and not ("overrides" in options and all("=" in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("Stopped by SIGINT", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough, and the interpreter would flush it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {named(error)}", file=sys.stderr)
        return USER_ERROR
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dpo-scale", description="Direct Preference Optimization with DeepSpeed ZeRO-3."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the embedded default, start to finish")
    note = "where all of it goes (default: %(default)s)"
    demo.add_argument("--output", type=_path, default=Path("runs/demo"), help=note)
    demo.set_defaults(run=_demo)

    check = commands.add_parser("check", help="recipe, data, tokenizer and paths, without loading weights")
    _add_recipe(check)
    check.add_argument("--rows", type=_count, help="read only this many rows of each source (default: all)")
    _add_config_file(check)
    check.set_defaults(run=_check)

    _add_plan_command(commands.add_parser("plan", help="memory, steps and hours of a run, before anything is booked"))
    _add_status_command(commands)
    doctor = commands.add_parser(
        "doctor",
        help="what this machine has, and what is missing; under srun, all nodes of a job",
        epilog="srun --ntasks-per-node=1 dpo-scale doctor RECIPE looks at every node, their clocks and shared folders. "
        "exit codes: 0 this machine is ready; 1 it is not; 2 a mistake in the recipe or the arguments",
    )
    doctor.add_argument("recipe", type=_path, nargs="?", help="also look at the folders and the precision it names")
    _add_overrides(doctor)
    _add_config_file(doctor)
    doctor.set_defaults(run=_doctor)

    export = commands.add_parser("export", help="checkpoint -> Hugging Face folder")
    export.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step-..., or RUN for its newest")
    export.add_argument("out", type=Path, help="the folder to write")
    export.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: as trained")
    export.set_defaults(run=_export)

    report = commands.add_parser("report", help="plots and tables of a run, or of several, as one HTML file")
    report.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="a run's folder; several are overlaid")
    report.add_argument("--out", type=_path, help="default: RUN/report.html, for several runs report.html here")
    report.set_defaults(run=_report)

    _add_cache_commands(commands.add_parser("cache", help="the stores of reference log-probs"))
    for stage in ("train", "score", "evaluate"):  # not listed: they only say who starts them
        launched = commands.add_parser(stage, description=f"Started by: {_launch_command(stage)}")
        launched.add_argument("words", nargs="*")
        launched.set_defaults(run=_launched, stage=stage)
    return parser


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=_path, metavar="RECIPE", help="YAML file")
    _add_overrides(command)


def _add_overrides(command: argparse.ArgumentParser, note: str = "a setting in place of the recipe's") -> None:
    # With a default, or argparse calls them required where the argument before them is missing.
    command.add_argument("overrides", nargs="*", default=[], metavar="section.field=value", help=note)


def _add_config_file(command: argparse.ArgumentParser) -> None:
    note = "as given to accelerate launch; default: what it would take by itself"
    command.add_argument("--config_file", type=os.path.expanduser, help=note)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _number(kind: type[int] | type[float], allowed: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """A type of argument: numbers of a kind that are allowed. `wanted` describes them, for the message."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


_count = _number(int, lambda value: value >= 1, "a whole number from 1 on")
_positive = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
_share = _number(float, lambda value: 0 < value <= 1, "a number above 0 and up to 1")
_days = _number(float, lambda value: 0 <= value < math.inf, "a number of days from 0 on")


def _add_plan_command(plan: argparse.ArgumentParser) -> None:
    _add_recipe(plan)
    plan.add_argument("--nodes", type=_count, default=1, help="to be booked (default: 1)")
    plan.add_argument("--gpus-per-node", type=_count, default=8, help="ranks of a node (default: 8)")
    default, usual = " (default: %(default)g)", Assumptions()
    plan.add_argument("--gpu-memory", type=_positive, default=GPU_GIB, metavar="GIB", help="of each GPU" + default)
    plan.add_argument("--host-memory", type=_positive, default=HOST_GIB, metavar="GIB", help="of each node" + default)
    plan.add_argument("--ds-config", type=_path, metavar="FILE", help="DeepSpeed JSON (default: ds_configs/zero3.json)")
    plan.add_argument("--pairs", type=_count, help="plan without data: this many pairs, with the two means below")
    plan.add_argument("--prompt-tokens", type=_count, metavar="MEAN", help="of the prompts")
    plan.add_argument("--completion-tokens", type=_count, metavar="MEAN", help="of the answers, two a pair")
    plan.add_argument("--mfu", type=_share, default=usual.mfu, help="share of the peak while computing" + default)
    peak, network = usual.peak_flops / 1e12, usual.network / 1e9
    an_h100 = "dense bf16 peak of a GPU (default: %(default)g, an H100)"
    plan.add_argument("--peak-tflops", type=_positive, default=peak, help=an_h100)
    plan.add_argument("--network", type=_positive, default=network, metavar="GBPS", help="of a node, GB/s" + default)
    plan.set_defaults(run=_plan)


def _add_status_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = commands.add_parser(
        "status",
        help="what became of a run: one line, and an exit code for scripts",
        description="Say in one line what became of a run, also of one that was killed.",
        epilog="exit codes: 0 finished; 85 unfinished, and worth starting again with the same command; 3 running; "
        "2 failed over a mistake that starting again cannot mend; 1 failed twice without a new checkpoint in between, "
        "or was twice out of time in a held-out pass (as counted by --count-failure)",
    )
    status.add_argument("folder_or_recipe", type=Path, metavar="RUN", help="a run's folder, or its recipe")
    _add_overrides(status, "as given with the recipe")
    status.add_argument("--of", choices=("train", "score"), default="train", help="which command (default: train)")
    status.add_argument("--json", action="store_true", help="all that is known, as one JSON object")
    status.add_argument("--folder", action="store_true", help="print the run's folder, and exit with 0")
    status.add_argument(
        "--count-failure", action="store_true", help="for a batch script whose launch has just failed: remember that"
    )
    status.add_argument(
        "--out-of-time", action="store_true", help="with --count-failure: the script stopped it, for want of time"
    )
    status.set_defaults(run=_status)


def _add_cache_commands(cache: argparse.ArgumentParser) -> None:
    folder = argparse.ArgumentParser(add_help=False)  # --dir may stand before the action and behind it
    note = "default: that of a recipe without reference.cache_dir; of verify --recipe, the recipe's own"
    folder.add_argument("--dir", type=_path, default=argparse.SUPPRESS, help=note)
    cache.add_argument("--dir", type=_path, help=note)
    actions = cache.add_subparsers(required=True, metavar="ACTION")

    every = actions.add_parser("list", parents=[folder], help="every store: rows, size, precision")
    every.set_defaults(run=_cache_list)

    named = "its path, the start of its name, or the reference's name"
    inspect = actions.add_parser("inspect", parents=[folder], help="one store in full")
    inspect.add_argument("store", help=named)
    inspect.set_defaults(run=_cache_inspect)

    note = "check every part's checksum, and with --recipe some rows' values"
    verify = actions.add_parser("verify", parents=[folder], help=note)
    verify.add_argument("store", help=named)
    verify.add_argument("--recipe", type=_path, help="score rows of its data anew, on one process, and compare")
    _add_overrides(verify, "as given with the recipe")
    verify.add_argument("--rows", type=_count, default=100, help="rows to score anew (default: 100)")
    verify.set_defaults(run=_cache_verify)

    prune = actions.add_parser("prune", parents=[folder], help="delete stores, or what is useless in them")
    prune.add_argument("stores", nargs="*", default=[], metavar="STORE", help=named)
    prune.add_argument("--older-than", type=_days, metavar="DAYS", help="stores last written before that")
    prune.add_argument("--waste", metavar="STORE", help="only repeated, damaged and unfinished parts of a store")
    prune.set_defaults(run=_cache_prune)


def _demo(options: argparse.Namespace) -> int:
    from dpo_scale.demo.run import run_demo

    return run_demo(options.output)


def _launched(options: argparse.Namespace) -> int:
    raise UserError(f"{options.stage} is started by: {_launch_command(options.stage, options.words)}")


def _launch_command(stage: str, words: Sequence[str] = ()) -> str:
    return f"accelerate launch --config_file launch/zero3.yaml -m dpo_scale.{stage} {shlex.join(words) or 'RECIPE'}"


def _check(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)  # its mistakes are told before torch is loaded
    from dpo_scale.operations.check import check

    check(recipe, options.rows, options.config_file)
    return 0


def _plan(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    from dpo_scale.operations.plan_report import run_plan

    return run_plan(recipe, options)


def _status(options: argparse.Namespace) -> int:
    from dpo_scale.training import status

    folder = _run_folder(options.folder_or_recipe, options.overrides)
    if options.folder:
        print(folder)
        return 0
    if options.of == "train" and not options.folder_or_recipe.is_dir() and (folder / "recipe.yaml").exists():
        from dpo_scale.training.run_folder import compare_with_stored

        compare_with_stored(load_recipe(options.folder_or_recipe, options.overrides))  # else it tells of another run
    if options.count_failure:
        found = status.count_failure(folder, options.of, out_of_time=options.out_of_time)
    else:
        found = status.read_status(folder, options.of)
    committed = status.committed_step(folder)
    alive = found is not None and status.is_alive(folder, options.of, found)
    verdict = status.judge(found, alive=alive, committed=committed)
    print(json.dumps(status.as_json(found, verdict, committed)) if options.json else f"{folder}: {verdict.line}")
    return verdict.code


def _run_folder(path: Path, overrides: Sequence[str]) -> Path:
    """The run that a path means: a folder itself, or a recipe its folder, which need not be there yet."""
    if not path.exists():
        raise UserError(f"{path}: not there; give a run's folder or a recipe")
    if not path.is_dir():
        return Path(load_recipe(path, overrides).run.output_dir)
    if not _is_run(path):
        raise UserError(f"{path}: no run's folder; give one, or a recipe")
    return path


def _is_run(folder: Path) -> bool:
    """Whether a run is in a folder, or may have died before it wrote more than logs."""
    from dpo_scale.training.status import FILES

    marks = {"logs", "checkpoints", *(name for names in FILES.values() for name in names)}
    found = {path.name for path in folder.iterdir()}
    return not found or bool(found & marks)


def _doctor(options: argparse.Namespace) -> int:
    from dpo_scale.operations.doctor import doctor

    return doctor(load_recipe(options.recipe, options.overrides) if options.recipe else None, options.config_file)


def _export(options: argparse.Namespace) -> int:
    import torch

    from dpo_scale.training.checkpoints import named_checkpoint, open_checkpoint
    from dpo_scale.training.export import ModelFolder, export_checkpoint
    from dpo_scale.training.model_files import MODEL_FILES
    from dpo_scale.training.provenance import provenance

    checkpoint = named_checkpoint(options.checkpoint)
    run = checkpoint.resolve().parent.parent
    for kept in (run / "recipe.yaml", run / MODEL_FILES):
        if not kept.exists():
            raise UserError(
                f"{kept} is missing, which an export takes from the checkpoint's run; export from RUN/checkpoints/, "
                f"copy RUN/recipe.yaml and RUN/{MODEL_FILES} to {run}, or start the run's training once more, which "
                "writes both"
            )
    recipe, commit = load_recipe(run / "recipe.yaml"), open_checkpoint(checkpoint).commit
    dtype = getattr(torch, options.dtype) if options.dtype else None
    folder = ModelFolder(run / MODEL_FILES, commit.trajectory_digest, provenance(recipe, commit.source_model))
    export_checkpoint(checkpoint, options.out, folder, dtype=dtype)
    print(f"exported {checkpoint} to {options.out}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from dpo_scale.operations.report import write_report

    print(f"wrote {write_report(options.runs, options.out)}")
    return 0


def _cache_list(options: argparse.Namespace) -> int:
    from dpo_scale.reference.commands import format_stores, list_stores

    print(format_stores(list_stores(options.dir or reference_cache_dir())))
    return 0


def _cache_inspect(options: argparse.Namespace) -> int:
    from dpo_scale.reference.commands import find_store, format_store, summarize

    print(format_store(summarize(find_store(options.dir or reference_cache_dir(), options.store))))
    return 0


def _cache_verify(options: argparse.Namespace) -> int:
    from dpo_scale.reference.commands import find_store, verify

    if options.overrides and not options.recipe:
        raise UserError(f"{options.overrides[0]}: a setting of a recipe; give it with --recipe RECIPE")
    recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
    store = find_store(options.dir or reference_cache_dir(recipe), options.store)
    wrong = verify(store)
    for line in wrong:
        print(line)
    print(f"{len(wrong)} damaged" if wrong else "every part is whole")
    if recipe is None:
        return 1 if wrong else 0
    from transformers.utils import logging

    from dpo_scale.reference.rescoring import rescore, tolerance

    logging.disable_progress_bar()  # of transformers' own, while it loads weights
    found, largest = rescore(recipe, store, options.rows), tolerance(recipe)
    print(
        f"{counted(found.rows, 'row')} ({counted(found.tokens, 'token')}) scored anew: "
        f"largest gap {found.largest_gap:.2g} nats a token, tolerance {largest}"
    )
    return 1 if wrong or not found.largest_gap <= largest else 0


def _cache_prune(options: argparse.Namespace) -> int:
    from dpo_scale.reference.commands import find_store, prune_stores, prune_waste

    if options.waste:
        pruned = prune_waste(find_store(options.dir or reference_cache_dir(), options.waste))
    else:
        pruned = prune_stores(options.dir or reference_cache_dir(), options.stores, options.older_than)
    for path in pruned.paths:
        print(f"removed {path}")
    print(f"{counted(pruned.bytes, 'byte')} freed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
