"""The run, on one screen: `train` is the story, `Run.train` the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpo_scale.console import BYTES, Console
from dpo_scale.data.layouts import Layout
from dpo_scale.data.planning import Costs, Schedule, StepPlan, plan_pass, plan_step
from dpo_scale.distributed import engine_state
from dpo_scale.distributed.engines import PolicyEngine
from dpo_scale.distributed.lockstep import by_main
from dpo_scale.distributed.runtime import Ranks, Runtime
from dpo_scale.files import write_json
from dpo_scale.inputs import Data, agreed_digest, check_budgets, hoped_layout, prepare_data, schedule_of
from dpo_scale.model.loading import DTYPES
from dpo_scale.recipe import Recipe
from dpo_scale.reference.fingerprint import settings_digest
from dpo_scale.reference.session import Reference
from dpo_scale.training import guards, model_files
from dpo_scale.training.checkpoints import RunState, digest_of, save
from dpo_scale.training.evaluation import best_of, describe, evaluate
from dpo_scale.training.export import ModelFolder, export_engine
from dpo_scale.training.interruption import (
    Interruption,
    StopRequestedError,
    StopTime,
    agree,
    heed,
    reason_of_any,
    unless_stopped,
)
from dpo_scale.training.metrics import MetricsFile, MetricSums
from dpo_scale.training.optimizer import learning_rate, set_learning_rate
from dpo_scale.training.policy import load_policy
from dpo_scale.training.provenance import provenance
from dpo_scale.training.records import Records
from dpo_scale.training.run_folder import RunFolder, trajectory_of
from dpo_scale.training.status import UNFINISHED, StatusFile
from dpo_scale.training.step import PairBatch, StepOutput, pair_batches, run_step
from dpo_scale.training.trackers import new_run_ids, start_trackers
from dpo_scale.watch import Watch

STEPS_PREPARED_AHEAD = 2


def train(
    recipe: Recipe, runtime: Runtime, console: Console, folder: RunFolder | None, status: StatusFile, watch: Watch
) -> int:
    """Train to the end of the plan, or to a request to stop; returns the process's exit code. Collective.

    `folder` is held by the main rank alone, and `status` is silent on the others.
    """
    ranks = runtime.ranks
    interruption = Interruption(Path(recipe.run.output_dir), recipe.run.stop_after, watch.started)

    def between_batches() -> None:
        watch.moved("a micro-batch of scoring or evaluation")
        status.go_on()
        heed(interruption, ranks)

    status.enter("preparing data")
    reached, reference = "before training", None
    try:
        data = unless_stopped(partial(prepare_data, recipe, ranks, console), interruption, ranks)
        reference = Reference(recipe, runtime, data, console, between_batches)
        trajectory = _trajectory(recipe, data, reference, ranks)
        check_budgets(recipe, data, hoped_layout(recipe))
        by_main(ranks, lambda: folder.claim(reference.fingerprint, trajectory) if folder else None)
        if folder is not None:
            write_json(folder.path / "data_report.json", data.report)
            folder.write_environment(ranks.world_size, str(ranks.device), console.say)
            model_files.keep(folder.path / model_files.MODEL_FILES, recipe, data.model_folder)
        if recipe.reference.schedule == "upfront":
            status.enter("scoring")
            reference.score_all(reference.train_rows, reference.evaluate_rows)
        status.enter("loading")
        run = _start(recipe, runtime, console, data, reference, trajectory, folder, watch, between_batches)
        run.start_trackers()
        status.enter("training", run.state.step)
        if run.train(interruption, status):
            status.enter("exporting", run.state.step)
            run.export()
            run.records.end(run.state, "finished", console.clock.seconds)
            status.finish()
            interruption.consume_file()  # made too late to be heard
            return 0
        run.records.end(run.state, "stopped", console.clock.seconds)
        if step := run.state.step:
            status.advance(step)
            reached = f"after step {step}, which is committed"
    except StopRequestedError:  # while data were tokenized or the reference was scored
        if reference is not None:
            reference.release()
    reason = reason_of_any(interruption, ranks)
    status.stop(reason)
    console.say(f"Stopped by {reason} {reached}; the same command goes on from there")
    interruption.consume_file()
    return UNFINISHED


def _trajectory(recipe: Recipe, data: Data, reference: Reference, ranks: Ranks) -> dict[str, Any]:
    """All that determines what is trained. Collective."""
    own = None if reference.is_the_policys_start else settings_digest(data.model_folder)
    return trajectory_of(recipe, agreed_digest(data, ranks), reference.fingerprint.key, own)


def evaluate_only(recipe: Recipe, runtime: Runtime, console: Console, folder: RunFolder | None, watch: Watch) -> None:
    """Evaluate the newest checkpoint, or the starting weights where there is none. Collective."""
    data = prepare_data(recipe, runtime.ranks, console)
    between_batches = partial(watch.moved, "a micro-batch of the held-out pass")
    reference = Reference(recipe, runtime, data, console, between_batches)
    trajectory = _trajectory(recipe, data, reference, runtime.ranks)
    check_budgets(recipe, data, hoped_layout(recipe))
    reference.score_all(reference.evaluate_rows)
    run = _start(recipe, runtime, console, data, reference, trajectory, folder, watch, between_batches)
    if not run.state.step:
        console.say(f"Of no checkpoint of this run, but of {recipe.model.path}:")
    run.evaluate()


def _start(
    recipe: Recipe,
    runtime: Runtime,
    console: Console,
    data: Data,
    reference: Reference,
    trajectory: dict[str, Any],
    folder: RunFolder | None,
    watch: Watch,
    between_batches: Callable[[], None],
) -> Run:
    """The run with its policy loaded, resumed and checked, and its plan."""
    watch.rest()
    policy, layout, state = load_policy(recipe, runtime, console, data, trajectory)
    check_budgets(recipe, data, layout)
    return Run(
        recipe=recipe,
        runtime=runtime,
        console=console,
        data=data,
        reference=reference,
        policy=policy,
        layout=layout,
        schedule=schedule_of(recipe, len(data.train)),
        costs=data.costs(data.train, layout),
        trajectory=trajectory,
        state=state,
        folder=folder,
        watch=watch,
        between_batches=between_batches,
    )


@dataclass
class Run:
    """A run under way: everything that stays, and the state that moves."""

    recipe: Recipe
    runtime: Runtime
    console: Console
    data: Data
    reference: Reference
    policy: PolicyEngine
    layout: Layout
    schedule: Schedule
    costs: Costs
    trajectory: dict[str, Any]
    state: RunState
    folder: RunFolder | None
    watch: Watch
    between_batches: Callable[[], None]

    def __post_init__(self) -> None:
        self.ranks, self.resumed = self.runtime.ranks, self.state
        file = None
        if self.folder is not None:
            file = MetricsFile(self.folder.path / "metrics.jsonl")
        track = self.runtime.accelerator.log
        self.records = Records(self.ranks, self.console, file, lambda values, step: track(values, step=step))
        self.committed_step = self.state.step or None
        self.stop_time = StopTime()

    def start_trackers(self) -> None:
        """Start the trackers, each where it was left. Collective."""
        ids = dict(self.state.tracker_run_ids) or self.ranks.gather_objects(new_run_ids(self.recipe))[0]
        self.state = replace(self.state, tracker_run_ids=ids)
        for name in start_trackers(self.runtime.accelerator, self.recipe, ids, self.state.step):
            self.console.say(f"track.to: {name} begins another run; wandb and tensorboard go on with theirs")

    def train(self, interruption: Interruption, status: StatusFile) -> bool:
        """Train; True at the end of the plan, False after a request to stop. Both leave a checkpoint."""
        try:
            return self._train(interruption, status)
        except StopRequestedError:  # in a held-out pass, or while a step's reference rows were scored
            if self.committed_step != self.state.step and self.state.step:
                self.commit(status)
            return False

    def _train(self, interruption: Interruption, status: StatusFile) -> bool:
        """The loop."""
        recipe, num_steps = self.recipe, self.schedule.num_steps
        self.records.go_on(self.state)
        self._evaluate_if_due()
        self.records.begin(self.state)
        with self.console.progress("Training", num_steps, "steps", done=self.state.step) as bar:
            for plan, batches in self._prepared(self.state.step, num_steps):
                self.watch.moved(f"step {plan.step + 1}")
                started = time.monotonic()
                rate = learning_rate(plan.step, num_steps, recipe.optim)
                set_learning_rate(self.policy.param_groups, rate)
                output = self._step(plan, batches)
                self._count(plan)
                status.advance(self.state.step)
                bar.advance(1)
                last = self.state.step == num_steps
                if last or self.state.step % recipe.track.every_steps == 0:
                    per_epoch = self.schedule.steps_per_epoch
                    self.records.close_interval(self.state, num_steps, per_epoch, rate, output.grad_norm)
                self.stop_time.step_took(time.monotonic() - started)
                self._evaluate_if_due()
                ask = bool(interruption.reason(self.stop_time.seconds))
                overdue = self.stop_time.is_commit_due(recipe.checkpoint.every_minutes)
                stop, commit = agree(self.ranks, stop=ask, commit=overdue)
                due = _is_due(self.state.step, recipe.checkpoint.every_steps)
                if commit or stop or last or due:
                    self.commit(status)
                if stop:
                    return False
        if self.committed_step is None:
            self.commit(status)  # a plan without steps still leaves something to resume and export
        return True

    def _evaluate_if_due(self) -> None:
        """Make the held-out pass of this step, unless it is behind us; one that was stopped is made after a resume."""
        step = self.state.step
        due = step == self.schedule.num_steps or _is_due(step, self.recipe.evaluate.every_steps)
        if (due if step else self.recipe.evaluate.at_start) and self.state.evaluated_step != step:
            self.evaluate()
            self.state = replace(self.state, evaluated_step=step)

    def _prepared(self, start: int, stop: int) -> Iterator[tuple[StepPlan, Sequence[PairBatch]]]:
        """Plans and this rank's micro-batches of the steps, laid out ahead while the device works."""

        def prepare(step: int) -> tuple[StepPlan, Sequence[PairBatch]]:
            plan = plan_step(
                self.schedule.pairs_of(step),
                self.costs,
                world_size=self.ranks.world_size,
                rank_tokens=self.recipe.batch.rank_tokens,
                step=step,
            )
            batches = pair_batches(plan, self.ranks.rank, self.data.train, self.layout, self.data.pad_id)
            return plan, list(batches)

        with ThreadPoolExecutor(1) as worker:
            ahead = [worker.submit(prepare, step) for step in range(start, min(start + STEPS_PREPARED_AHEAD, stop))]
            for step in range(start, stop):
                current = ahead.pop(0).result()
                if step + STEPS_PREPARED_AHEAD < stop:
                    ahead.append(worker.submit(prepare, step + STEPS_PREPARED_AHEAD))
                yield current

    def _step(self, plan: StepPlan, batches: Sequence[PairBatch]) -> StepOutput:
        """One optimizer step that was applied; fp16 repeats it with a lower scale until it is."""
        if self.recipe.reference.schedule == "per_batch":
            self.reference.ensure(self.reference.train_rows, self.schedule.pairs_of(plan.step))
        for _ in range(self.policy.loss_scales_left()):
            sums = MetricSums(self.ranks.device)
            output = run_step(
                self.policy,
                batches,
                lambda indices: self.reference.logps(self.reference.train_rows, indices),
                sums,
                self.recipe.loss,
                global_pairs=plan.num_pairs,
                device=self.ranks.device,
            )
            if output.applied and math.isfinite(output.grad_norm):
                break
            half = self.recipe.model.dtype == "float16"
            guards.explain_non_finite(plan.step + 1, batches, output, self.data.train, self.ranks, may_rescale=half)
            self.state = replace(self.state, skipped_steps=self.state.skipped_steps + 1)
            self.console.say(f"step {plan.step + 1:>5}  the gradient overflows float16: again, with a lower loss scale")
        else:
            raise guards.NumericalError(f"step {plan.step + 1}: the gradient overflows float16 at every loss scale")
        if plan.step == 0 and self.reference.is_the_policys_start:
            self._compare_with_reference(batches[0], output)
        self.records.add(sums, self.data.forward_macs(plan.pairs(), self.layout))
        return output

    def _compare_with_reference(self, first: PairBatch, output: StepOutput) -> None:
        """The first step, where the policy starts as the reference: their log-probs must agree."""
        expected = torch.from_numpy(self.reference.token_logps(self.reference.train_rows, first.pairs))
        gap = guards.first_step_gap(output, expected, self.ranks)
        self.console.say(f"First step: largest gap of policy and reference {gap:.1e} nats a token")
        guards.check_first_step(
            gap, DTYPES[self.recipe.model.dtype], self.data.model_folder, self.reference.store.folder
        )

    def _count(self, plan: StepPlan) -> None:
        lengths = self.data.train.lengths[plan.pairs()]
        self.state = replace(
            self.state,
            step=plan.step + 1,
            pairs=self.state.pairs + plan.num_pairs,
            tokens=self.state.tokens + int(lengths.sum()),
            completion_tokens=self.state.completion_tokens + int(lengths[:, 1:].sum()),
            reference_rows_cached=self.resumed.reference_rows_cached + self.reference.rows_cached,
            reference_rows_computed=self.resumed.reference_rows_computed + self.reference.rows_computed,
        )

    @cached_property
    def _held_out_plan(self) -> StepPlan:
        """The same in every held-out pass."""
        costs = self.data.costs(self.data.evaluate, self.layout)
        return plan_pass(costs, world_size=self.ranks.world_size, rank_tokens=self.recipe.batch.rank_tokens)

    def evaluate(self) -> None:
        """The held-out pass, logged under `eval/...`; nothing where there are no held-out pairs."""
        if not len(self.data.evaluate):
            return
        if self.recipe.reference.schedule == "per_batch":
            self.reference.ensure(self.reference.evaluate_rows, np.arange(len(self.data.evaluate)))
        started = time.monotonic()
        metrics = evaluate(
            self.policy,
            self._held_out_plan,
            self.data.evaluate,
            lambda indices: self.reference.logps(self.reference.evaluate_rows, indices),
            self.ranks,
            self.console,
            self.recipe.loss,
            layout=self.layout,
            pad_id=self.data.pad_id,
            between_batches=self.between_batches,
        )
        guards.check_held_out(self.state.step, metrics["eval/loss"])
        digest, state = self.data.evaluate.digest(), self.state
        best = best_of(state.best if state.held_out in ("", digest) else {}, metrics)  # of other pairs: begun anew
        self.state = replace(state, best=best, held_out=digest)
        pairs = {"eval/pairs": len(self.data.evaluate), "eval/data": self.data.evaluate.short_digest()}
        bests = {f"best/{name}": value for name, value in best.items()}
        self.records.write(self.state.step, {**metrics, **pairs, **bests})
        self.console.say(f"step {self.state.step:>5}  {describe(metrics)}")
        self.records.pause(time.monotonic() - started)

    def commit(self, status: StatusFile) -> None:
        """Write a checkpoint of the current state, and note it. Collective."""
        self.watch.rest()  # a disk takes as long as it takes
        guards.check_weights(self.state.step, engine_state.non_finite(self.policy.engine), self.ranks)
        started = time.monotonic()
        self.reference.commit()
        self.records.settle()
        self.state = replace(self.state, unlogged=self.records.unlogged())
        snapshot = engine_state.snapshot(self.policy.engine)
        with self.console.progress("Saving the checkpoint", snapshot.stored_bytes, BYTES) as bar:
            path = save(
                Path(self.recipe.run.output_dir) / "checkpoints",
                snapshot.watched(bar.advance),
                self.state,
                self.ranks,
                trajectory=self.trajectory,
                source_model=str(self.data.model_folder),
                keep_last=self.recipe.checkpoint.keep_last,
                keep_every=self.recipe.checkpoint.keep_every,
                say=self.console.say,
            )
        status.committed(self.state.step)
        seconds, self.committed_step = time.monotonic() - started, self.state.step
        self.stop_time.commit_took(seconds)
        self.records.pause(seconds)
        self.console.say(f"Committed {path} in {seconds:.1f} s")
        if warning := self.stop_time.warning():
            self.console.say(warning)

    def export(self) -> None:
        """Write RUN/model, a Hugging Face folder. Collective."""
        self.watch.rest()
        run, told = Path(self.recipe.run.output_dir), provenance(self.recipe, str(self.data.model_folder))
        folder = ModelFolder(run / model_files.MODEL_FILES, digest_of(self.trajectory), told)
        with self.console.progress("Exporting the model", self.policy.num_parameters, "parameters") as bar:
            engine, step = self.policy.engine, self.state.step
            export_engine(engine, run / "model", folder, self.ranks, step=step, progress=bar.advance)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
