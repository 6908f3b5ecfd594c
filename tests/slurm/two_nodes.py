"""A real SLURM of two nodes on this machine: a controller, two node daemons and munge, all under one folder."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue")
HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, f"{HOST}-second")
"""Names of the nodes; the first one must resolve, as it is where ranks meet."""

CONF = """
ClusterName=two_nodes
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
SlurmdTimeout={node_timeout}
KillWait=10
MinJobAge=3600
JobRequeue=1
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={first} NodeAddr=127.0.0.1 Port={first_port} CPUs=2 RealMemory=2000
NodeName={second} NodeAddr=127.0.0.1 Port={second_port} CPUs=2 RealMemory=2000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why this machine cannot run the cluster; nothing where it can."""
    absent = [program for program in PROGRAMS if _program(program) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)}; Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "node daemons run as root"


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


class TwoNodes:
    """The cluster while it runs; a context manager that ends every process it started, by its id."""

    def __init__(self, folder: Path, node_timeout_s: int = 20) -> None:
        self.folder = folder
        self._node_timeout_s = node_timeout_s
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> TwoNodes:
        self.folder.mkdir(parents=True)
        (self.folder / "state").mkdir()
        ports = _free_ports(3)
        conf = CONF.format(
            folder=self.folder,
            controller_port=ports[0],
            first=NODES[0],
            first_port=ports[1],
            second=NODES[1],
            second_port=ports[2],
            node_timeout=self._node_timeout_s,
        )
        (self.folder / "slurm.conf").write_text(conf)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self.folder.chmod(0o755)
        try:
            self._start(
                "munged",
                *("--foreground", "--force", "--num-threads=2"),
                f"--key-file={key}",
                *(f"--{kind}-file={self.folder}/munged.{kind}" for kind in ("log", "pid", "seed")),
                f"--socket={self.folder}/munge.socket",
            )
            until(lambda: (self.folder / "munge.socket").exists(), 20, "munged listens")
            self._start("slurmctld", "-D")
            for node in NODES:
                self.start_node(node)
            until(self._is_up, 60, "both nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self._daemons)):
            self._end(name)
        for process in self._processes_of_jobs():
            _kill(process)

    def _start(self, name: str, *arguments: str, node: str = "") -> None:
        program = _program(name)
        assert program is not None
        label = f"{name}-{node}" if node else name
        with open(self.folder / f"{label}.out", "ab") as output:
            self._daemons[label] = subprocess.Popen(
                [program, *arguments],
                env=self.environment | {"NODE_DAEMON": node},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _end(self, label: str, number: signal.Signals = signal.SIGTERM) -> None:
        daemon = self._daemons.pop(label)
        daemon.send_signal(number)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def start_node(self, node: str) -> None:
        """Start a node's daemon, for the first time or after it was lost."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._start("slurmd", "-D", "-N", node, node=node)

    def lose_node(self, node: str) -> None:
        """What a power cut does: the node's daemon and everything it runs are gone at once."""
        processes = self._processes_of_jobs(node)
        self._end(f"slurmd-{node}", signal.SIGKILL)
        for process in processes:
            _kill(process)

    @contextmanager
    def ranks_held(self) -> Iterator[None]:
        """Inside, the ranks of all jobs stand still; their launchers and scripts go on."""
        environments = {process: Path(f"/proc/{process}/environ") for process in self._processes_of_jobs()}
        ranks = [process for process, path in environments.items() if b"\0LOCAL_RANK=" in path.read_bytes()]
        assert len(ranks) == len(NODES), "a rank a node"
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        try:
            yield
        finally:
            for rank in ranks:
                os.kill(rank, signal.SIGCONT)

    def run(self, *command: str) -> str:
        """Run one of SLURM's commands; its output."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a mapping."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "--oneliner", job)))

    def _is_up(self) -> bool:
        dead = [label for label, daemon in self._daemons.items() if daemon.poll() is not None]
        assert not dead, "\n".join((self.folder / f"{label}.out").read_text() for label in dead)
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%t %D"], env=self.environment, capture_output=True, text=True, check=False
        )
        return done.stdout.split() == ["idle", "2"]

    def _processes_of_jobs(self, node: str | None = None) -> list[int]:
        """Ids of the step daemons and job processes of this cluster, or of one node of it."""
        nodes, found = (node,) if node else NODES, []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((path / "environ").read_bytes().decode(errors="replace").split("\0"))
            except OSError:  # it has just ended
                continue
            if f"SLURM_CONF={self.folder}/slurm.conf" not in environment:
                continue
            # The first variable marks a node's own daemons, the second one what they run.
            if any({f"NODE_DAEMON={name}", f"SLURMD_NODENAME={name}"} & environment for name in nodes):
                found.append(int(path.name))
        return found


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition; fail with what was waited for."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"{seconds:.0f} s are over before {what}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
