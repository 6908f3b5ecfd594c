"""What every stage that `accelerate launch` starts has in common: arguments, output, ranks, and how it ends."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from dpo_scale.console import Console, Voice, open_closed_streams, route_output
from dpo_scale.errors import USER_ERROR, UserError
from dpo_scale.files import named
from dpo_scale.recipe import Recipe, load_recipe
from dpo_scale.training import status
from dpo_scale.watch import LOG_SECONDS, Watch, died, within

CRASH = 1
SECONDS_TO_SEE_ANOTHER_DIE = 1.0
"""A collective fails at once when a peer dies, which the system then tells within a tenth of this."""


def run_stage(name: str) -> NoReturn:
    """Run a stage as one rank of a launch: `python -m dpo_scale.NAME RECIPE [section.field=value ...]`.

    The process ends here, without waiting for other ranks: whoever fails takes the launch down at once.
    """
    open_closed_streams()
    rank = os.environ.get("RANK", "0")
    words = LastWords(Console(Voice(sys.stderr.fileno()), is_main=rank == "0"))
    watch = Watch(words.attempt, int(rank), words)
    try:
        recipe = _recipe_of_arguments(name)
        words.run = Path(recipe.run.output_dir), name
        words.console, words.has_log = _console_of_run(recipe, name, is_main=rank == "0"), True
        watch.expect(recipe.run.stall_after and 60 * recipe.run.stall_after)
        faulthandler.enable()  # what a crash below Python leaves, and what kill -USR2 asks for, goes to the log
        faulthandler.register(signal.SIGUSR2)
        code = _stage(name)(recipe, words.console, watch)
        watch.close()
        if code:
            words.tell_launcher("stopped as it was asked to, which is no fault; the same command goes on")
    except UserError as error:
        text = str(error).strip()
        words(f"error: {text}", cause=True, reason=_first_line(error), users_mistake=not error.may_pass)
        code = USER_ERROR
    except KeyboardInterrupt:  # before training or scoring listens for signals, or in an evaluation
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes its own copy on
        words("Stopped by SIGINT; the same command starts again", cause=True)
        code = CRASH
    except BaseException as error:  # the last words of a rank, whatever ended it
        if isinstance(error, SystemExit):
            raise
        code = _end_of_rank(error, rank, watch, words)
    with suppress(OSError):  # a full disk
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _end_of_rank(error: BaseException, rank: str, watch: Watch, words: LastWords) -> int:
    """Say why a rank fails, unless another died first: then this failure only follows from that one."""
    report = traceback.format_exc()
    if words.has_log:  # at once: while this looks for another's end, the launcher may end this rank
        _log(report)
    if gone := watch.gone(within=SECONDS_TO_SEE_ANOTHER_DIE):
        words(died(gone), cause=True)
        return CRASH
    if isinstance(error, OSError) and error.filename is not None:
        reason = f"rank {rank}: {named(error)}"
        words(f"error: {reason}", cause=True, reason=reason)
        return USER_ERROR
    words(f"rank {rank} failed:\n{report}", cause=True, reason=f"{type(error).__name__}: {_first_line(error)}")
    return CRASH


def _log(message: str) -> None:
    with suppress(OSError):  # a full disk
        print(message, file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _stage(name: str) -> Callable[[Recipe, Console, Watch], int]:
    """The stage's function; imported late, so that a wrong recipe is reported before torch is loaded.

    The garbage collector would look through all that the imports make nine times while they make it, a second in four,
    and again later. It is there to stay.
    """
    gc.disable()
    from dpo_scale import stages

    gc.freeze()
    gc.enable()
    return {"train": stages.train, "score": stages.score, "evaluate": stages.evaluate}[name]


def _recipe_of_arguments(name: str) -> Recipe:
    arguments = sys.argv[1:]
    usage = f"usage: accelerate launch ... -m dpo_scale.{name} RECIPE [section.field=value ...]"
    if not arguments:
        raise UserError(usage)
    if arguments[0] in ("-h", "--help"):
        print(usage)
        raise SystemExit
    return load_recipe(arguments[0], arguments[1:])


def _console_of_run(recipe: Recipe, name: str, *, is_main: bool) -> Console:
    rank = os.environ.get("RANK", "0")
    folder = Path(os.environ.get("DPO_SCALE_LOGS") or Path(recipe.run.output_dir) / "logs")
    try:
        return route_output(folder / f"{name}-rank-{rank}.log", is_main=is_main)
    except OSError as error:
        raise UserError(f"run.output_dir: {error.filename}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Cause:
    """Why a launch fails."""

    message: str
    reason: str
    """One line of it, for the run's status."""
    users_mistake: bool


class LastWords:
    """Why a rank ends: in its log, on the console, in the run's status, and in the closing words of the launcher."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.run: tuple[Path, str] | None = None
        """The run's folder and the stage, once they are known."""
        self.has_log = False
        """Whether stderr is this rank's log by now, and no longer what a person reads."""
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        self._error_file = None if error_file is None else Path(error_file)

    @property
    def attempt(self) -> Path | None:
        """A folder of this launch, shared by its ranks on this machine."""
        return None if self._error_file is None else self._error_file.parent.parent

    def __call__(self, message: str, *, cause: bool, reason: str = "", users_mistake: bool = False) -> None:
        """Say it. A cause is said once a machine: the first rank that fails speaks, the others follow it down.

        `reason` is its one line for the run's status; the message's first one if there is none.
        """
        if self.has_log:
            within(LOG_SECONDS, partial(_log, message))  # the launcher and the console are told of a log that hangs
        if cause:
            own = Cause(message, reason or message.splitlines()[0], users_mistake)
            first = self._first_cause(own)
            # Also from a rank that only follows: the launcher may see its end before the first one's, and the main
            # rank may have noted what it does next over the failure.
            self.tell_launcher(first.message)
            if self.run is not None and self.run[1] in status.FILES:
                status.record_failure(*self.run, first.reason, users_mistake=first.users_mistake)
            if first is not own:
                return
        self.console.is_main = True
        self.console.say(message)

    def _first_cause(self, own: Cause) -> Cause:
        """The cause that the first rank of this machine to fail gave: this very one, if that is this rank."""
        if self.attempt is None:
            return own
        said = self.attempt / "said"
        with suppress(OSError):  # a full disk: better said twice than not at all
            descriptor, temporary = tempfile.mkstemp(prefix="said-", dir=self.attempt)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(own), file)
            try:
                os.link(temporary, said)  # there at once with its contents: whoever comes second reads all of them
            except FileExistsError:
                return Cause(**json.loads(said.read_text(encoding="utf-8")))
            finally:
                os.unlink(temporary)
        return own

    def tell_launcher(self, message: str) -> None:
        """Put a message where the launcher looks for what to repeat at its end."""
        if self._error_file is not None:
            try:
                self._error_file.write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
            except OSError:  # a full disk: the launcher cannot do with half a file
                self._error_file.unlink(missing_ok=True)
