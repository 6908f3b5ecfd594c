"""`dpo-scale demo`: a world, a base model and preferences from a seed, then the trainer as any user starts it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from dpo_scale.demo.base_model import CORPUS_LINES, STEPS, make_base_model
from dpo_scale.demo.world import Pair, World, make_world
from dpo_scale.errors import UserError
from dpo_scale.shipped_files import shipped_file

TRAIN_PAIRS = 1536
HELD_OUT_PAIRS = 256
SEED = 1
CPU_PROCESSES = 2

RECIPE = """\
# A recipe like any other: {command}
model:
  path: {base_model}
  dtype: {dtype}
reference:
  offload: cpu                 # its shards rest in host memory; path: null means the policy's starting weights
  cache_dir: {cache}
data:
  train: {train}
  evaluate: {held_out}
  max_length: 128
  cache_dir: {cache}
batch:
  global_pairs: 64             # pairs in one optimizer step, over all ranks
  rank_tokens: 4096            # tokens in one micro-batch on one rank
loss:
  beta: 10.0                   # 2 to 10 is usual for means
  reduction: mean
  label_smoothing: 0.1         # so small a model forgets its grammar where margins may grow for ever
optim:
  learning_rate: 2.0e-4
  warmup_ratio: 0.25
evaluate:
  every_steps: 16
track:
  every_steps: 4
run:
  output_dir: {run}
  seed: {seed}
"""


class DemoFolder:
    """Where the demo keeps what it makes."""

    def __init__(self, root: Path) -> None:
        self.root, self.marker = root, root / ".dpo_scale_demo"
        self.base_model, self.cache, self.run = root / "base_model", root / "cache", root / "run"
        self.train, self.held_out, self.recipe = root / "train.jsonl", root / "held_out.jsonl", root / "recipe.yaml"
        self.log = self.run / "logs" / "demo.log"

    def clear(self) -> None:
        """Make the folder, without what an earlier demo left. Raises UserError if it holds anything else."""
        try:
            if self.root.exists() and not self.marker.exists() and any(self.root.iterdir()):
                raise UserError(f"{self.root}: holds files that no demo made; choose another folder with --output")
            for path in (self.base_model, self.cache, self.run):
                shutil.rmtree(path, ignore_errors=True)
            for path in (self.train, self.held_out, self.recipe):
                path.unlink(missing_ok=True)
            self.log.parent.mkdir(parents=True)
            self.marker.touch()
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}; choose another folder with --output") from error


@dataclass(frozen=True, slots=True)
class Machine:
    """What the demo's launch uses: every GPU there is, or CPU processes."""

    gpus: int

    @property
    def processes(self) -> int:
        return self.gpus or CPU_PROCESSES

    @property
    def launch_options(self) -> list[str]:
        if self.gpus:
            return ["--config_file", _readable(shipped_file("launch/zero3.yaml")), "--num_processes", str(self.gpus)]
        return ["--config_file", _readable(shipped_file("launch/zero3_cpu.yaml"))]

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.gpus else "float32"

    @property
    def environment(self) -> dict[str, str]:
        """For child processes: threads that do not fight, and no chatter."""
        threads = max(1, len(os.sched_getaffinity(0)) // self.processes)
        return os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "DS_ACCELERATOR": "cuda" if self.gpus else "cpu",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }


def run_demo(output: Path) -> int:
    """Run the embedded default, start to finish; returns the exit code."""
    started = time.monotonic()
    console, machine = Console(highlight=False, soft_wrap=True), Machine(torch.cuda.device_count())
    folder = DemoFolder(output)
    folder.clear()
    command = ["accelerate", "launch", *machine.launch_options, "-m", "dpo_scale.train", str(folder.recipe)]

    world = make_world(SEED, CORPUS_LINES, TRAIN_PAIRS, HELD_OUT_PAIRS)
    _show_world(console, world)
    _write_pairs(folder.train, world.train)
    _write_pairs(folder.held_out, world.held_out)
    folder.recipe.write_text(_recipe(folder, machine, shlex.join(command)), encoding="utf-8")

    console.print("\n[bold]2. A base model[/bold] that has read the talk of the village, and has no view on manners\n")
    _make_base_model(console, world, folder.base_model)

    console.print(f"\n[bold]3. Direct Preference Optimization[/bold] on {_ranks(machine)}, started as you would:\n")
    console.print(f"   {shlex.join(command)}\n", style="cyan", soft_wrap=True, markup=False)
    code = _run([sys.executable, "-m", "accelerate.commands.launch", *command[2:]], machine, folder.log)
    if code != 0:
        console.print(f"\nTraining ended with exit code {code}. What its ranks said: {folder.log.parent}", markup=False)
        return code

    console.print("\n[bold]4. What changed[/bold], on requests that no training text contains\n")
    before, after = preference_of_policy(folder.run / "metrics.jsonl")
    console.print("   The policy finds the preferred answer likelier than the rejected one")
    console.print(f"   before [bold]{before:6.1%}[/bold] of the time, after [bold green]{after:6.1%}[/bold green]\n")
    paths = [str(folder.base_model), str(folder.run / "model"), str(folder.held_out)]
    code = _run([sys.executable, "-m", "dpo_scale.demo.showcase", *paths], machine, folder.log)
    console.print(
        f"\nAll of it took {time.monotonic() - started:.0f} s and is in {folder.root}:\n"
        f"   recipe.yaml      what was run; change it, run.output_dir too, and start the command above again"
        f"{environment_first()}\n"
        f"   run/             the run's folder: model/ (a Hugging Face folder), metrics.jsonl, checkpoints/, logs/\n"
        f"Another demo there replaces all of it",
        markup=False,
        soft_wrap=True,
    )
    return code


def environment_first() -> str:
    """What a shell needs before the printed command, where it does not find that yet."""
    activate = Path(sys.prefix) / "bin" / "activate"
    return f" (first: . {_readable(activate)})" if shutil.which("accelerate") is None and activate.exists() else ""


def preference_of_policy(metrics: Path) -> tuple[float, float]:
    """The first and the last held-out share of pairs whose chosen answer the policy finds likelier."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    shares = [line["eval/logps/accuracy"] for line in lines if "eval/logps/accuracy" in line]
    return shares[0], shares[-1]


def _show_world(console: Console, world: World) -> None:
    console.print("\n[bold]1. A small world[/bold], made from a seed: the village of Little Hobble\n")
    console.print(f"   {len(world.corpus):,} stretches of village talk for a base model to read")
    console.print(f"   {len(world.train):,} preference pairs to train on, {len(world.held_out):,} held out\n")
    console.print("   What only the pairs know: a kind request is granted, a rude one is sent back. For example\n")
    pair = next(pair for pair in world.train if pair.prompt.split("\n")[0].endswith("!"))
    request, shopkeeper = pair.prompt.split("\n")
    console.print(f"     {request}", markup=False)
    console.print(f"     {shopkeeper}{pair.chosen}   [green](preferred)[/green]")
    console.print(f"     {shopkeeper}{pair.rejected}   [red](rejected)[/red]")


def _write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    lines = [json.dumps(asdict(pair)) + "\n" for pair in pairs]
    path.write_text("".join(lines), encoding="utf-8")


def _recipe(folder: DemoFolder, machine: Machine, command: str) -> str:
    paths = {
        name: json.dumps(str(getattr(folder, name)))  # a JSON string is a YAML string, whatever is in it
        for name in ("base_model", "cache", "train", "held_out", "run")
    }
    return RECIPE.format(command=command, dtype=machine.dtype, seed=SEED, **paths)


def _make_base_model(console: Console, world: World, folder: Path) -> None:
    columns = TextColumn("   Reading"), BarColumn(), MofNCompleteColumn(), TextColumn("steps, loss {task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("", total=STEPS, loss="")
        make_base_model(
            world.corpus, folder, SEED, on_step=lambda loss: bar.update(task, advance=1, loss=f"{loss:.2f}")
        )


def _run(command: Sequence[str], machine: Machine, log: Path) -> int:
    """Run a child process that speaks on stdout; what libraries say goes to the log."""
    with open(log, "a", encoding="utf-8") as noise:
        return subprocess.run(command, env=machine.environment, stderr=noise, check=False).returncode


def _ranks(machine: Machine) -> str:
    if machine.gpus:
        return f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''} with ZeRO-3"
    return f"{CPU_PROCESSES} CPU processes with ZeRO-3"


def _readable(path: Path) -> str:
    """The path as a person would type it: relative where the file is below the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
