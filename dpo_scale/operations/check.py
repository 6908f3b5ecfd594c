"""`dpo-scale check`: all that can be wrong before weights are loaded, at once where that is possible."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from dpo_scale.console import Console, counted
from dpo_scale.data.preparation import check_rows
from dpo_scale.data.samples import sample_pairs, show
from dpo_scale.data.sources import check_paths
from dpo_scale.distributed.lockstep import OneProcess
from dpo_scale.distributed.runtime import missing_trackers
from dpo_scale.distributed.zero_config import read_policy_config
from dpo_scale.errors import UserError
from dpo_scale.inputs import Data, check_budgets, hoped_layout, prepare_data, schedule_of
from dpo_scale.model.loading import load_config, resolve_folder, stored_elements
from dpo_scale.operations.cluster import GIB, GPU_GIB, HOST_GIB, Assumptions, Cluster
from dpo_scale.operations.findings import LaunchFile
from dpo_scale.operations.machine import launch_file, why_not_writable
from dpo_scale.operations.plan import Plan, make_plan
from dpo_scale.operations.plan_report import verdict
from dpo_scale.recipe import DataSource, Recipe, reference_cache_dir
from dpo_scale.reference.cache import ReferenceStore, store_folder
from dpo_scale.reference.fingerprint import weight_files
from dpo_scale.reference.key_index import first_positions
from dpo_scale.reference.scoring import ReferenceRows
from dpo_scale.reference.source import check_same_tokens, known_fingerprint
from dpo_scale.training.checkpoints import CheckpointError, open_checkpoint
from dpo_scale.training.run_folder import compare_with_stored
from dpo_scale.training.status import committed_step

PAIRS_SHOWN = 3


def check(recipe: Recipe, rows: int | None = None, config_file: str | None = None) -> None:
    """Read all but the weights, show pairs as they will be trained on, and say what a run would do.

    Args:
        rows: read only this many rows of each source, drawn as `data.rows` draws them; None reads all.
        config_file: accelerate configuration; None means the one that accelerate would take.

    Raises UserError with every mistake that was found.
    """
    console, mistakes, has_model = Console(), _Mistakes(), False
    with mistakes.noted():
        resolve_folder(recipe.model.path, recipe.model.revision, "model.path", weights=False)
        has_model = True
        _check_weights(recipe.model.path, recipe.model.revision, "model.path", recipe)
    launches = _launch_files(config_file)
    for check_part in _parts(recipe, launches):
        with mistakes.noted():
            check_part()
    if rows is not None:
        recipe = _fewer_rows(recipe, rows)
        drawn = f"{counted(rows, 'row')} of each source, drawn as for `rows`"
        console.say(f"Only {drawn}, are read: counts and steps below are theirs")
    if not has_model:
        with mistakes.noted():
            check_rows(recipe.data, seed=recipe.run.seed)
        mistakes.raise_all()
    with mistakes.noted():
        data = prepare_data(recipe, OneProcess(), console, weights=False)
        for check_data in (_check_reference_tokens, _check_budgets, _check_store):
            with mistakes.noted():
                check_data(recipe, data)
        console.show(show(sample_pairs(data.train, data.tokenizer, seed=recipe.run.seed, count=PAIRS_SHOWN)))
        console.say(_summary(_plan(recipe, launches[0]), launches[0]))
    if recipe.loss.doubt:
        console.say(recipe.loss.doubt)
    mistakes.raise_all()
    console.say("Nothing is wrong with this recipe; dpo-scale doctor RECIPE looks at this machine")


def _parts(recipe: Recipe, launches: list[LaunchFile]) -> Iterator[Callable[[], object]]:
    """Checks that need neither the policy's model nor a row of the data."""
    if recipe.reference.path:
        yield partial(_check_weights, recipe.reference.path, recipe.reference.revision, "reference.path", recipe)
    for launch in launches:
        yield partial(_check_launch_file, launch)
    yield partial(_check_writable, "run.output_dir", Path(recipe.run.output_dir))
    yield partial(compare_with_stored, recipe)
    if not reference_cache_dir(recipe).is_dir():  # one that is there may hold every row: see _check_store
        yield partial(_check_writable, "reference.cache_dir", reference_cache_dir(recipe))
    yield partial(_check_trackers, recipe)
    yield partial(_check_resume, recipe)
    yield partial(check_paths, recipe.data.train, "data.train")
    yield partial(check_paths, recipe.data.evaluate, "data.evaluate")


class _Mistakes:
    """Errors of a user, collected."""

    def __init__(self) -> None:
        self._found: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, a mistake ends this part of the check only."""
        try:
            yield
        except UserError as error:
            self._found += [str(error)] * (str(error) not in self._found)

    def raise_all(self) -> None:
        if len(self._found) == 1:
            raise UserError(self._found[0])
        if self._found:
            count = len(self._found)
            raise UserError(
                f"{count} parts of this recipe are wrong\n" + "\n".join(f"- {line}" for line in self._found)
            )


def _check_weights(path: str, revision: str | None, setting: str, recipe: Recipe) -> None:
    folder = resolve_folder(path, revision, setting, weights=False)
    load_config(folder, trust_remote_code=recipe.model.trust_remote_code, setting=setting)
    if Path(path).is_dir():  # those of a hub model are fetched when the run starts
        weight_files(folder)
        stored_elements(folder)


def _check_reference_tokens(recipe: Recipe, data: Data) -> None:
    if recipe.reference.path:
        folder = resolve_folder(recipe.reference.path, recipe.reference.revision, "reference.path", weights=False)
        config = load_config(folder, trust_remote_code=recipe.model.trust_remote_code, setting="reference.path")
        check_same_tokens(folder, config, recipe, data)


def _check_store(recipe: Recipe, data: Data) -> None:
    """Rows that a store lacks must find room in it; one that has them all may be read-only.

    Which store it is, is known once a run has hashed the reference.
    """
    fingerprint = known_fingerprint(recipe)
    if fingerprint is None:
        return
    folder = store_folder(reference_cache_dir(recipe), fingerprint)
    if problem := why_not_writable(folder):
        store = ReferenceStore.open(folder.parent, fingerprint)
        trained_on = schedule_of(recipe, len(data.train)).pairs_reached()
        needed = ((data.train, trained_on), (data.evaluate, np.arange(len(data.evaluate))))
        keys = np.concatenate([ReferenceRows.of_pairs(pairs).of(indices) for pairs, indices in needed])
        is_first = first_positions(keys) == np.arange(len(keys))
        if missing := int((is_first & ~store.contains(keys)).sum()):
            raise UserError(
                f"reference.cache_dir: {problem}, and {counted(missing, 'row')} are still to be scored; choose another "
                "folder"
            )


def _check_writable(setting: str, folder: Path) -> None:
    if problem := why_not_writable(folder):
        raise UserError(f"{setting}: {folder}: {problem}; choose another folder")


def _check_trackers(recipe: Recipe) -> None:
    if missing := missing_trackers(recipe.track.to):
        raise UserError("\n".join(f"track.to: {line}" for line in missing))


def _check_resume(recipe: Recipe) -> None:
    named = recipe.run.resume
    if named in ("auto", "never") or committed_step(Path(recipe.run.output_dir)) is not None:
        return  # a run that went on from a checkpoint goes on from its own
    try:
        open_checkpoint(Path(named))
    except CheckpointError as error:
        raise UserError(f"run.resume: {error}") from error


def _launch_files(config_file: str | None) -> list[LaunchFile]:
    """The configuration in force, then the others of this folder's launch/."""
    import torch

    named = [config_file, *sorted(str(path) for path in Path("launch").glob("*.yaml"))]
    files: dict[Path, LaunchFile] = {}
    for name in named:
        file = launch_file(name, on_gpu=torch.cuda.is_available())
        files.setdefault(Path(file.path).resolve(), file)
    return list(files.values())


def _check_launch_file(launch: LaunchFile) -> None:
    if launch.problems:
        raise UserError("\n".join(launch.problems))
    try:
        read_policy_config(Path(launch.deepspeed_path))
    except UserError as error:
        raise UserError(f"{error} ({launch.path} names this file)") from error


def _fewer_rows(recipe: Recipe, rows: int) -> Recipe:
    def drawn(sources: list[DataSource]) -> list[DataSource]:
        return [
            source.model_copy(update={"rows": min(rows, source.rows or rows), "weight": None}) for source in sources
        ]

    data = recipe.data.model_copy(update={"train": drawn(recipe.data.train), "evaluate": drawn(recipe.data.evaluate)})
    return recipe.model_copy(update={"data": data})


def _check_budgets(recipe: Recipe, data: Data) -> None:
    check_budgets(recipe, data, hoped_layout(recipe))


def _plan(recipe: Recipe, launch: LaunchFile) -> Plan:
    machines = launch.settings.get("num_machines") or 1
    processes = launch.settings.get("num_processes") or machines
    cluster = Cluster(machines, max(1, processes // machines), GPU_GIB * GIB, HOST_GIB * GIB)
    deepspeed = Path(launch.deepspeed_path) if launch.deepspeed_path else None
    return make_plan(recipe, cluster, Assumptions(), deepspeed, None, Console(is_main=False))


def _summary(plan: Plan, launch: LaunchFile) -> str:
    workload, step, on_cpus = plan.workload, plan.step, _is_on_cpus(launch)
    schedule = workload.schedule
    ranks = counted(step.ranks, "CPU process", "CPU processes") if on_cpus else counted(step.ranks, "rank")
    run = (
        f"{workload.meta.num_parameters:,} parameters; {counted(schedule.num_steps, 'step')} of "
        f"{counted(schedule.global_pairs, 'pair')}, {counted(step.micro_batches, 'micro-batch', 'micro-batches')} each "
        f"on the {ranks} of {launch.path}; results go to {Path(workload.recipe.run.output_dir)}"
    )
    if on_cpus:  # their memory is not planned
        return run
    return (
        f"{run}\n{verdict(plan)}\n(GPUs of {GPU_GIB} GiB, nodes of {HOST_GIB:,} GiB; dpo-scale plan plans for others)"
    )


def _is_on_cpus(launch: LaunchFile) -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu" or Path(launch.deepspeed_path).name == "zero3_cpu.json"
