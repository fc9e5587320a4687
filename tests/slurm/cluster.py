"""A SLURM cluster of two nodes on this machine: SLURM's own daemons, started and ended by the tests.

Everything that the daemons write lies in one folder, which goes with them. They run as the user who runs the tests, so
root is not needed; SLURM's packages are (`tools/install_slurm.sh` installs them on Debian and Ubuntu).
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from nemo_align.runtime.parent_death import die_with_parent

DAEMONS = ("munged", "slurmctld", "slurmd")
# Names that are addresses, of this machine, so that the ranks find rank 0 by the node list as on a real cluster.
NODES = ("127.0.0.1", "127.0.0.2")
CPUS = 8  # of a node, as SLURM is told; several tasks share the few cores that there are
_ENDS = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
_START_SECONDS = 60.0
_STOP_SECONDS = 20.0
# What SLURM's commands and a job of somebody else's may have left in the environment of the tests.
_FOREIGN = re.compile(r"(SLURM|SBATCH|SRUN|SQUEUE|SCANCEL|NEMO_ALIGN|PMI)\w*|RANK|WORLD_SIZE|LOCAL_RANK|MASTER_\w+")


def missing_daemons() -> list[str]:
    """Daemons that are not installed."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return [name for name in DAEMONS if shutil.which(name, path=path) is None]


class Cluster:
    """The daemons, and what the tests ask of them. `environment`: of everything that talks to this cluster."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nemo_align_slurm_"))
        self.environment = {name: value for name, value in os.environ.items() if not _FOREIGN.fullmatch(name)}
        self.path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])  # the daemons are there
        self.environment |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": self.path}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        # munge's socket must be open to all, and its folder's parents not open to others' writing.
        self.folder.chmod(0o711)
        for name in ("munge", "log", "state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(mode=0o711)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        (self.folder / "slurm.conf").write_text(self._configuration())
        munge = [f"--key-file={key}", f"--socket={self._munge_socket}"]
        munge += [f"--{name}-file={self.folder}/munge/{name}" for name in ("pid", "log", "seed")]
        self._daemon("munged", "--foreground", *munge)
        self.wait(self._munge_socket.exists, "munged")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.wait(self._idle, "both nodes to be idle")

    def stop(self) -> None:
        """End all jobs and daemons, and remove the folder."""
        if len(self._daemons) > 1:
            with suppress(AssertionError, subprocess.TimeoutExpired):
                self.run("scancel", "--user", getpass.getuser())
                self.wait(lambda: not self.run("squeue", "--noheader"), "the jobs to end", seconds=_STOP_SECONDS)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        for pid in self.processes():  # those of a job that a daemon did not live to end
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder)

    def run(self, *argv: str | Path, cwd: Path | None = None, timeout: float = 60.0) -> str:
        """stdout of a command; AssertionError with what it said if it fails."""
        done = subprocess.run(
            list(map(str, argv)), env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{argv}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ExitCode, Reason, NodeList and more."""
        text = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def state(self, job_id: str) -> str:
        """PENDING, RUNNING, COMPLETED, CANCELLED, FAILED ..."""
        return self.job(job_id)["JobState"]

    def start_soon(self, job_id: str, *changes: str) -> None:
        """Let a job that was queued again start in seconds, not in SLURM's two minutes; `changes` as scontrol takes
        them. Not at once: within the second of its end the nodes would take it for the start that was ended."""
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now+3", *changes)

    def wait_for_end(self, *job_ids: str, seconds: float) -> list[str]:
        """The states in which the jobs end."""

        def all_ended() -> bool:
            return all(self.state(job_id) in _ENDS for job_id in job_ids)

        self.wait(all_ended, f"the end of jobs {', '.join(job_ids)}", seconds=seconds)
        return [self.state(job_id) for job_id in job_ids]

    def wait(self, condition: Callable[[], object], what: str, *, seconds: float = _START_SECONDS) -> None:
        """Wait until `condition()` is true; AssertionError with the daemons' last words if it does not come."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not ended, f"{ended} ended: {self._log_tails()}"
            assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}: {self._log_tails()}"
            time.sleep(0.2)

    def processes(self, *marks: str) -> list[int]:
        """Processes of this cluster: daemons, steps, and what jobs started. They have its slurm.conf in their
        environment, and all of `marks`."""
        wanted = {mark.encode() for mark in (f"SLURM_CONF={self.folder}/slurm.conf", *marks)}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if wanted <= set(path.read_bytes().split(b"\0")) and int(path.parent.name) != os.getpid():
                    found.append(int(path.parent.name))
        return found

    @property
    def _munge_socket(self) -> Path:
        return self.folder / "munge" / "socket"

    def _daemon(self, *argv: str) -> None:
        with open(self.folder / "log" / f"{argv[0]}.{len(self._daemons)}.txt", "wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    argv,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=partial(die_with_parent, os.getpid()),  # tests that are killed leave no daemon either
                )
            )

    def _idle(self) -> bool:
        listing = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"], env=self.environment, capture_output=True, text=True
        )
        return listing.stdout.split() == ["idle"] * len(NODES)

    def _log_tails(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text()[-1500:]}" for path in (self.folder / "log").iterdir())

    def _configuration(self) -> str:
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        controller, *ports = _free_ports(1 + len(NODES))
        values = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": controller,
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self._munge_socket}",
            "CredType": "cred/munge",
            "SlurmUser": user,
            "SlurmdUser": user,
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "ReturnToService": 2,
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool-%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd-%n.pid",
            "JobRequeue": 1,
            "MinJobAge": 86400,  # seconds in which the controller knows of a job that has ended: longer than any test
            # From SIGTERM to SIGKILL at scancel and at the time limit: SLURM's default, in which a run may save.
            "KillWait": 30,
            "MpiDefault": "none",
            "SlurmdParameters": "config_overrides",  # the nodes have the CPUs that this file says
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,bf_interval=2",
            "PriorityType": "priority/basic",
        }
        lines = [f"{name}={value}" for name, value in values.items()]
        for node, port in zip(NODES, ports, strict=True):
            lines.append(
                f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={port} CPUs={CPUS} Boards=1 "
                f"SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"
            )
        lines.append(f"PartitionName=batch Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for entry in sockets:
            entry.bind(("127.0.0.1", 0))
        return [entry.getsockname()[1] for entry in sockets]
    finally:
        for entry in sockets:
            entry.close()
