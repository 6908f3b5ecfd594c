"""The processes of one `srun`, one a node, before there is a process group: they meet in a TCP store."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from dpo_scale.errors import UserError

TIMEOUT = timedelta(seconds=120)
PINGS = 5


@dataclass(frozen=True)
class Nodes:
    """This node among all. Every method is called by all nodes, in the same order."""

    rank: int
    count: int
    store: Any
    """None where there is one node alone."""

    @classmethod
    def of_srun(cls) -> Nodes:
        """The nodes of the job step that this process belongs to; this one alone outside of any.

        Raises UserError if the first node cannot be reached: training could not start either.
        """
        rank, count = int(os.environ.get("SLURM_PROCID", "0")), int(os.environ.get("SLURM_NTASKS", "1"))
        if count == 1 or "SLURM_STEP_ID" not in os.environ:  # a batch script has the job's variables, too
            return cls(0, 1, None)
        host, port = _meeting_point()
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, count, is_master=rank == 0, timeout=TIMEOUT, wait_for_workers=False
            )
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            if rank == 0:
                raise UserError(
                    f"port {port} of {host} cannot be opened ({why}); set MASTER_PORT to a free one"
                ) from error
            raise UserError(
                f"the first node, {host}, does not answer on port {port} ({why}); open the ports between the nodes of "
                "a job, or set MASTER_ADDR to an address that all of them reach"
            ) from error
        return cls(rank, count, store)

    def gather(self, name: str, value: Any) -> list[Any]:
        """The values of all nodes, in order, on every node; JSON values.

        Raises UserError if a node stays away.
        """
        if self.store is None:
            return [json.loads(json.dumps(value))]
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        return [json.loads(self._get(f"{name}/{rank}")) for rank in range(self.count)]

    def clock_offset(self) -> tuple[float, float]:
        """(seconds that this node's clock is ahead of the first one's, how far off that may be).

        Half the shortest round trip bounds the error, as in NTP (RFC 5905, section 8).
        """
        if self.store is None or self.rank == 0:
            self._answer_pings()
            return 0.0, 0.0
        found = []
        for number in range(PINGS):
            sent = time.time()
            self.store.set(f"ping/{self.rank}/{number}", "")
            theirs = float(self._get(f"pong/{self.rank}/{number}"))
            received = time.time()
            found.append(((received - sent) / 2, (sent + received) / 2 - theirs))
        uncertainty, offset = min(found)
        return offset, uncertainty

    def _answer_pings(self) -> None:
        for rank in range(1, self.count):
            for number in range(PINGS):
                self._get(f"ping/{rank}/{number}")
                self.store.set(f"pong/{rank}/{number}", repr(time.time()))

    def _get(self, key: str) -> bytes:
        try:
            value: bytes = self.store.get(key)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise UserError(f"a node stayed away ({why}); is it up, and does srun start one task on each?") from error
        return value


def _meeting_point() -> tuple[str, int]:
    """Host and port of the first node's store, equal on all nodes."""
    host = os.environ.get("MASTER_ADDR")
    if host is None:
        listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        host = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0]
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    return host, int(os.environ.get("MASTER_PORT") or 10000 + job % 10000)
