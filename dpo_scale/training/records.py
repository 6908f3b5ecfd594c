"""What a run writes down while it goes: one line an interval in metrics.jsonl, on the console and in the trackers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from dpo_scale.console import Console, duration
from dpo_scale.distributed.lockstep import Ranks
from dpo_scale.training.checkpoints import RunState
from dpo_scale.training.metrics import MetricsFile, MetricSums, model_flops_utilization, peak_memory_gib
from dpo_scale.training.run_folder import package_versions

Values = dict[str, Any]


class Records:
    """Sums of the current interval, its clock, and where its line goes."""

    def __init__(
        self, ranks: Ranks, console: Console, file: MetricsFile | None, track: Callable[[Values, int], None]
    ) -> None:
        """`file` is the main rank's alone; `track` takes values and step to the trackers."""
        self._ranks, self._console, self._file, self._track = ranks, console, file, track
        self._sums = MetricSums(ranks.device)
        self._work = 0.0
        self._before = RunState()
        self._started = time.monotonic()
        if file is not None and file.unreadable:
            console.say(f"metrics.jsonl: lines that could not be read and are left out: {file.unreadable}")

    def begin(self, state: RunState) -> None:
        """Note that an attempt starts at a state, and begin the first interval."""
        attempt = {"resumes": state.resumes, "world_size": self._ranks.world_size, "host": socket.gethostname()}
        self._note(state.step, {"event": "start", **attempt, "packages": package_versions()})
        self.restart(state)

    def end(self, state: RunState, outcome: str, stage_seconds: Mapping[str, float]) -> None:
        """Note how and where an attempt ended, and the time that each of its stages took."""
        seconds = {name: round(value, 3) for name, value in stage_seconds.items()}
        self._note(state.step, {"event": "end", "outcome": outcome, "stage_seconds": seconds, **_counters(state)})

    def restart(self, state: RunState) -> None:
        """Begin an interval at a state."""
        self._before, self._started, self._work = state, time.monotonic(), 0.0

    def pause(self, seconds: float) -> None:
        """Leave out time that was not spent on training."""
        self._started += seconds

    def add(self, sums: MetricSums, work: float) -> None:
        """Count a step: its metrics, and the multiply-accumulates of its forward over all ranks."""
        self._sums += sums
        self._work += work

    def close_interval(
        self, state: RunState, num_steps: int, steps_per_epoch: int, learning_rate: float, grad_norm: float
    ) -> None:
        """Write the interval that ends at a state. Collective."""
        means = self._sums.reduce(self._ranks)
        seconds = time.monotonic() - self._started
        before = self._before
        mfu = model_flops_utilization(self._work, seconds, self._ranks.world_size, self._ranks.device)
        pairs_per_second = (state.pairs - before.pairs) / seconds
        step_seconds = seconds / max(1, state.step - before.step)
        self.write(
            state.step,
            {
                "epoch": state.step / steps_per_epoch,
                **means,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "pairs_per_second": pairs_per_second,
                "tokens_per_second": (state.tokens - before.tokens) / seconds,
                "step_seconds": step_seconds,
                **_counters(state),
                "peak_memory_gib": peak_memory_gib(self._ranks.device),
                **({} if mfu is None else {"mfu": mfu}),
            },
        )
        left = duration(step_seconds * (num_steps - state.step))
        self._console.say(
            f"step {state.step:>5}/{num_steps}  loss {means['loss']:.4f}  margin {means['rewards/margin']:+.4f}  "
            f"accuracy {means['rewards/accuracy']:.3f}  grad {grad_norm:.3g}  lr {learning_rate:.2e}  "
            f"{pairs_per_second:.1f} pairs/s{f'  {left} left' if state.step < num_steps else ''}"
        )
        self.restart(state)

    def unlogged(self) -> tuple[float, ...]:
        """The sums of the interval so far, for a checkpoint. Collective."""
        return self._sums.total(self._ranks)

    def go_on(self, state: RunState) -> None:
        """Take up where a run was left: drop the lines after that, and go on with the interval that it was in."""
        if self._file is None:
            return
        self._file.go_back_to(state.step)
        if state.unlogged:
            self._sums.start_from(state.unlogged)

    def settle(self) -> None:
        """Make the lines of metrics.jsonl durable."""
        if self._file is not None:
            self._file.settle()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One object in metrics.jsonl, and the numbers in it in the trackers, of which some choke on text."""
        self._note(step, values)
        self._track({name: value for name, value in values.items() if not isinstance(value, str)}, step)

    def _note(self, step: int, values: Mapping[str, Any]) -> None:
        """One object in metrics.jsonl, with the time of day in seconds since 1970."""
        if self._file is not None:
            self._file.write({"step": step, "time": round(time.time(), 3), **values})


def _counters(state: RunState) -> dict[str, int]:
    """What was counted from the start of the run up to a state."""
    return {
        "pairs": state.pairs,
        "tokens": state.tokens,
        "completion_tokens": state.completion_tokens,
        "reference_rows_cached": state.reference_rows_cached,
        "reference_rows_computed": state.reference_rows_computed,
        "skipped_steps": state.skipped_steps,
    }
