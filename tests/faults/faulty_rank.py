"""One rank of a training run to which something happens in the forward of a step; started by the launcher.

Usage: faulty_rank.py RECIPE [section.field=value ...], with FAULT="WHAT RANK STEP" in the environment.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from dpo_scale.distributed.engines import PolicyEngine
from dpo_scale.launched import run_stage
from dpo_scale.watch import Watch


def happens(what: str) -> None:
    """The fault; returns if the rank survives it."""
    Path(os.environ["FAULT_LOG"]).write_text(str(time.time()))
    if what == "raise":
        raise RuntimeError("this forward fails on purpose")
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stall":
        time.sleep(3600)
    if what == "terminate":
        os.kill(os.getppid(), signal.SIGTERM)


def main() -> None:
    what, rank, step = os.environ["FAULT"].split()
    if rank == os.environ["RANK"]:
        armed = [False]
        moved, forward = Watch.moved, PolicyEngine.__call__

        def noting(self: Watch, doing: str) -> None:
            armed[0] |= doing == f"step {step}"
            moved(self, doing)

        def faulty(self: PolicyEngine, *arguments: Any, **options: Any) -> Any:
            if armed[0]:
                armed[0] = False
                Watch.moved = moved  # type: ignore[method-assign]
                happens(what)
            return forward(self, *arguments, **options)

        Watch.moved, PolicyEngine.__call__ = noting, faulty  # type: ignore[method-assign]
    run_stage("train")


if __name__ == "__main__":
    main()
