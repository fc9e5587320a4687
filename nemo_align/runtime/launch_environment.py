"""Who this process is among the processes of its job: told by torchrun, by SLURM, or by our own launcher.

No torch here: the command asks before it decides whether to start workers of its own.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

# Set by local_launch for its workers. The names are our own, so that nothing inherited from a shell can look like them.
LOCAL_VARIABLES = (
    "NEMO_ALIGN_RANK",
    "NEMO_ALIGN_WORLD_SIZE",
    "NEMO_ALIGN_LOCAL_RANK",
    "NEMO_ALIGN_LOCAL_WORLD_SIZE",
    "NEMO_ALIGN_INIT_METHOD",
)
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# From here on SLURM_STEP_ID names no step of ours: batch script, external step, interactive shell (slurm/slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Ports for rank 0: below Linux's ephemeral range, above most services.
_FIRST_PORT, _PORTS = 15000, 15000


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process among the processes of its job."""

    rank: int  # 0 .. world_size - 1, over all machines
    world_size: int
    local_rank: int  # 0 .. local_world_size - 1, on this machine
    local_world_size: int
    init_method: str  # where the ranks meet: env://, tcp://host:port or file:///path
    source: str  # torchrun | slurm | local


def single_process() -> LaunchEnvironment:
    """The environment of a job that is this process alone."""
    return LaunchEnvironment(0, 1, 0, 1, "", "local")


def node_name(variables: Mapping[str, str] = os.environ) -> str:
    """Of this node, as SLURM calls it, which is what its commands want to hear; else the host's name."""
    return variables.get("SLURMD_NODENAME") or socket.gethostname()


def detect(variables: Mapping[str, str] | None = None) -> LaunchEnvironment | None:
    """Read the environment variables (`os.environ` unless given). None: a bare command, nobody started this process.

    torchrun goes before SLURM, because it may run inside a SLURM step.

    Raises:
        ValueError: the launcher's variables are there but incomplete or malformed.
    """
    if variables is None:
        variables = os.environ
    if "NEMO_ALIGN_INIT_METHOD" in variables:
        rank, world_size, local_rank, local_world_size = (_integer(variables, name) for name in LOCAL_VARIABLES[:4])
        init_method = variables["NEMO_ALIGN_INIT_METHOD"]
        return LaunchEnvironment(rank, world_size, local_rank, local_world_size, init_method, "local")
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return _torchrun(variables)
    if _inside_srun_step(variables):
        return _slurm(variables)
    return None


def _torchrun(variables: Mapping[str, str]) -> LaunchEnvironment:
    missing = [name for name in _TORCHRUN_VARIABLES if name not in variables]
    if missing:
        raise ValueError(
            f"RANK and WORLD_SIZE are set, as torchrun sets them, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not. Start with torchrun, or unset RANK and WORLD_SIZE."
        )
    world_size = _integer(variables, "WORLD_SIZE")
    local_world_size = _integer(variables, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in variables else world_size
    rank, local_rank = _integer(variables, "RANK"), _integer(variables, "LOCAL_RANK")
    return LaunchEnvironment(rank, world_size, local_rank, local_world_size, "env://", "torchrun")


def _inside_srun_step(variables: Mapping[str, str]) -> bool:
    """The batch script has SLURM_PROCID and SLURM_NTASKS too; only a step of srun has a step id that counts steps."""
    step = variables.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_PROCID" in variables


def _slurm(variables: Mapping[str, str]) -> LaunchEnvironment:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    world_size = _integer(variables, tasks)
    node = _integer(variables, "SLURM_NODEID") if "SLURM_NODEID" in variables else 0
    per_node = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE")
    local_world_size = expand_tasks_per_node(per_node)[node] if per_node else world_size
    address = variables.get("MASTER_ADDR")
    if address is None:
        nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
        if not nodes:
            raise ValueError("inside an srun step, but SLURM_JOB_NODELIST is not set: set MASTER_ADDR to rank 0's host")
        address = expand_node_list(nodes)[0]
    port = _integer(variables, "MASTER_PORT") if "MASTER_PORT" in variables else _port(variables)
    return LaunchEnvironment(
        rank=_integer(variables, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_integer(variables, "SLURM_LOCALID"),
        local_world_size=local_world_size,
        init_method=f"tcp://{address}:{port}",
        source="slurm",
    )


def _port(variables: Mapping[str, str]) -> int:
    """The same port on every rank, another one for other jobs and steps that share the machine."""
    job, step = _integer(variables, "SLURM_JOB_ID"), _integer(variables, "SLURM_STEP_ID")
    return _FIRST_PORT + (job + 1009 * step) % _PORTS  # 1009: steps of one job stay clear of the next jobs' ports


def _integer(variables: Mapping[str, str], name: str) -> int:
    try:
        return int(variables[name])
    except KeyError:
        raise ValueError(f"the launcher did not set the environment variable {name}") from None
    except ValueError:
        raise ValueError(f"environment variable {name}={variables[name]!r} is not an integer") from None


def expand_node_list(text: str) -> list[str]:
    """Host names of a SLURM node list, in its order: `dgx[01-03,07],login` -> dgx01 dgx02 dgx03 dgx07 login.

    Several brackets in one name multiply, the last varying fastest: `r[1-2]n[1-2]` -> r1n1 r1n2 r2n1 r2n2.

    Raises:
        ValueError: not a node list.
    """
    # Split at the commas outside of brackets.
    names = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not names or ",".join(names) != text:
        raise ValueError(f"{text!r} is not a SLURM node list such as dgx[01-03,07]")
    return [host for name in names for host in _expand_name(name, text)]


def _expand_name(name: str, text: str) -> list[str]:
    bracket = re.search(r"\[([^\[\]]*)\]", name)
    if bracket is None:
        return [name]
    hosts = []
    for piece in bracket.group(1).split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", piece)
        if ends is None:
            raise ValueError(f"{text!r} is not a SLURM node list: {piece!r} is neither a number nor a range")
        first, last = ends.group(1), ends.group(2) or ends.group(1)
        for number in range(int(first), int(last) + 1):  # numbers keep the width they are written with
            for rest in _expand_name(name[bracket.end() :], text):
                hosts.append(f"{name[: bracket.start()]}{number:0{len(first)}d}{rest}")
    return hosts


def expand_tasks_per_node(text: str) -> list[int]:
    """Tasks of each node as SLURM writes them: `8(x2),4` -> 8 8 4.

    Raises:
        ValueError: not such a list.
    """
    counts: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", piece)
        if match is None:
            raise ValueError(f"{text!r} is not a SLURM list of tasks per node such as 8(x2),4")
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    return counts
