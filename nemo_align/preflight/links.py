"""How fast the ranks talk: an all-reduce on every group of the grid, and which node is to blame for a slow one.

An all-reduce tells that something in its group is slow, not what: all members wait for the slowest. So neighbours also
exchange tensors in pairs, node 0 with 1, 1 with 2, ... and the last with the first. A node is called slow if even the
better of its two pairs is: its healthy neighbour has another pair, with another node. With two nodes (one pair) the
rates of their own work (matrix multiply) must decide, and that is compared for more nodes as well: a GPU that throttles
slows every collective too. Where all ranks are on one node, ranks take the place of nodes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_align.preflight.checks import FAILED, NOTE, OK, WARNING, Check
from nemo_align.runtime.agreement import gather
from nemo_align.runtime.topology import Topology

# Large enough that bandwidth counts and not latency; a second or so in all.
_GPU_BYTES, _CPU_BYTES = 256 * 2**20, 4 * 2**20
_REPEATS = 8
_OWN_SECONDS = 0.5
# Healthy nodes of one cluster differ by some percent; a link that is down halves a rate or worse.
SLOW = 0.5
# An H100 has 400 Gb/s = 50 GB/s of InfiniBand to itself, and 450 GB/s of NVLink in each direction (DGX H100 datasheet).
# Below these, NCCL does not use them.
_LEAST_ACROSS, _LEAST_WITHIN = 10.0, 100.0


@dataclass(frozen=True)
class Rates:
    """What one rank measured. Rates in GB/s; None where it has no partner."""

    rank: int
    node: str
    own: float  # TFLOP/s of a matrix multiply
    groups: dict[str, tuple[int, float]]  # kind -> (lowest rank of its group, all-reduce bandwidth)
    pairs: dict[str, float]  # other unit -> rate of the exchange with it


def measure(topology: Topology, node: str) -> list[Rates]:
    """All ranks' rates, on every rank. A collective of a few seconds; `node`: the name of this one."""
    nodes = gather(node)
    own = _own_rate(topology.device)
    groups: dict[str, tuple[int, float]] = {}
    for kind, group in _groups(topology).items():
        if dist.get_world_size(group) > 1:
            groups[kind] = (min(dist.get_process_group_ranks(group)), _all_reduce_rate(group, topology.device))
        dist.barrier()
    pairs = _exchange(topology, nodes)
    return gather(Rates(topology.rank, node, own, groups, pairs))


def _groups(topology: Topology) -> dict[str, dist.ProcessGroup]:
    """The groups that a step uses, from the busiest to the widest."""
    return {
        "tensor": topology.tensor_group,
        "pipeline": topology.pipeline_group,
        "data": topology.data_group,
        "all ranks": dist.group.WORLD,
    }


def _all_reduce_rate(group: dist.ProcessGroup, device: torch.device) -> float:
    """Bus bandwidth in GB/s as NCCL's tests define it: 2 (n - 1) / n bytes over every link per byte reduced."""
    tensor = torch.ones(_num_bytes(device) // 4, device=device)
    size = dist.get_world_size(group)
    seconds = _mean_seconds(lambda: dist.all_reduce(tensor, group=group), group, device)
    return 2 * (size - 1) / size * _num_bytes(device) / seconds / 1e9


def _exchange(topology: Topology, nodes: list[str]) -> dict[str, float]:
    """Rates with the next and the previous unit, in rounds in which every unit has one partner."""
    units = _units(nodes)
    names = list(units)
    if len(names) < 2:
        return {}
    mine = next(index for index, name in enumerate(names) if topology.rank in units[name])
    place = units[names[mine]].index(topology.rank)
    rates = {}
    for pairs in _rounds(len(names)):
        partner = next((b if a == mine else a for a, b in pairs if mine in (a, b)), None)
        if partner is not None and place < len(units[names[partner]]):
            other = units[names[partner]][place]
            rates[names[partner]] = _pair_rate(other, topology)
        dist.barrier()
    return rates


def _pair_rate(other: int, topology: Topology) -> float:
    """GB/s in each direction, both at once."""
    send = torch.ones(_num_bytes(topology.device) // 4, device=topology.device)
    receive = torch.empty_like(send)

    def swap() -> None:
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, send, other), dist.P2POp(dist.irecv, receive, other)])
        for work in works:
            work.wait()

    return _num_bytes(topology.device) / _mean_seconds(swap, None, topology.device) / 1e9


def _own_rate(device: torch.device) -> float:
    """TFLOP/s of this rank alone, over half a second while all others do the same."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.randn(size, size, dtype=torch.float32).to(device, dtype)
    product = torch.mm(matrix, matrix)
    _wait_for(device)
    dist.barrier()
    begin, repeats = time.perf_counter(), 0
    while time.perf_counter() - begin < _OWN_SECONDS:
        torch.mm(matrix, matrix, out=product)
        _wait_for(device)
        repeats += 1
    return 2 * size**3 * repeats / (time.perf_counter() - begin) / 1e12


def _mean_seconds(action: Callable[[], object], group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Of one call, the mean of several: a rank that is slow now and then counts as what it costs."""
    action()  # makes the connections
    _wait_for(device)
    if group is not None:
        dist.barrier(group=group)
    begin = time.perf_counter()
    for _ in range(_REPEATS):
        action()
    _wait_for(device)
    return (time.perf_counter() - begin) / _REPEATS


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _num_bytes(device: torch.device) -> int:
    return _GPU_BYTES if device.type == "cuda" else _CPU_BYTES


def _units(nodes: list[str]) -> dict[str, list[int]]:
    """Name -> ranks of what is compared: nodes, or the ranks of the only one. In the order of their ranks."""
    if len(set(nodes)) == 1:
        return {f"rank {rank} on {node}": [rank] for rank, node in enumerate(nodes)}
    units: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        units.setdefault(node, []).append(rank)
    return units


def _rounds(count: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours on a ring of `count`, in rounds without a common member: (0 1)(2 3), (1 2)(3 0)."""
    if count == 2:
        return [[(0, 1)]]
    even = [(i, i + 1) for i in range(0, count - 1, 2)]
    odd = [(i, i + 1) for i in range(1, count - 1, 2)]
    last = (count - 1, 0)
    return [even, [*odd, last]] if count % 2 == 0 else [even, odd, [last]]


def judge(rates: list[Rates], accelerator: str) -> list[Check]:
    """What the rates say: a line per kind of group, and the slow nodes. `accelerator`: name of the GPU or processor."""
    kinds = dict.fromkeys(kind for entry in rates for kind in entry.groups)
    if not kinds:
        return [Check(name="links", status=NOTE, text="one rank talks to nobody")]
    checks = [_judge_groups(kind, rates) for kind in kinds]
    for name, text in _slow_units(rates).items():
        node = name.rpartition(" on ")[2]
        remedy = f"leave it out (sbatch --exclude={node}) and have its links and clocks looked at"
        checks.append(Check(name="links", status=FAILED, text=f"{name} is slow: {text}", remedy=remedy))
    return checks + _against_datasheet(rates, accelerator)


def _judge_groups(kind: str, rates: list[Rates]) -> Check:
    """One line on all groups of a kind, with the nodes of the slowest."""
    members: dict[int, list[Rates]] = {}
    for entry in rates:
        if kind in entry.groups:
            members.setdefault(entry.groups[kind][0], []).append(entry)
    speeds = {first: min(entry.groups[kind][1] for entry in group) for first, group in members.items()}
    slowest, middle = min(speeds, key=lambda first: speeds[first]), statistics.median(speeds.values())
    if len(speeds) == 1:
        return Check(name="links", status=OK, text=f"{kind}: all-reduce {middle:.3g} GB/s")
    ranks = ", ".join(str(entry.rank) for entry in members[slowest][:8])
    where = f"ranks {ranks}{', ...' if len(members[slowest]) > 8 else ''} on {_named(members[slowest])}"
    text = (
        f"{kind}: {len(speeds)} groups, all-reduce {middle:.3g} GB/s, the slowest {speeds[slowest]:.3g} GB/s ({where})"
    )
    return Check(name="links", status=WARNING if speeds[slowest] < SLOW * middle else OK, text=text)


def _slow_units(rates: list[Rates]) -> dict[str, str]:
    """Name -> why, of the nodes that are slower than the others, or of the ranks of the only node."""
    units = _units([entry.node for entry in rates])
    talk = {name: [rate for rank in ranks for rate in rates[rank].pairs.values()] for name, ranks in units.items()}
    to_others = {name: max(values) for name, values in talk.items() if values}
    own = {name: min(rates[rank].own for rank in ranks) for name, ranks in units.items()}
    slow: dict[str, str] = {}
    for values, what, unit in ((to_others, "to its neighbours", "GB/s"), (own, "of its own work", "TFLOP/s")):
        if len(values) < 2:
            continue
        usual = max(values.values()) if len(values) == 2 else statistics.median(values.values())
        for name, value in values.items():
            if value < SLOW * usual:
                slow.setdefault(name, f"{value:.3g} {unit} {what}, the others {usual:.3g} {unit}")
    return slow


def _against_datasheet(rates: list[Rates], accelerator: str) -> list[Check]:
    """Whether NCCL uses NVLink and InfiniBand at all: where it does not, all nodes are equally slow."""
    if "H100" not in accelerator or any(word in accelerator for word in ("PCIe", "NVL")):
        return []
    pairs = [rate for entry in rates for rate in entry.pairs.values()]
    if not pairs:
        return []
    several, best = len({entry.node for entry in rates}) > 1, max(pairs)
    if best >= (least := _LEAST_ACROSS if several else _LEAST_WITHIN):
        return []
    link, remedy = "NVLink", "look at nvidia-smi topo -m and nvidia-smi nvlink --status"
    if several:
        link = "InfiniBand"
        remedy = "NCCL_DEBUG=INFO says which interface it takes; NCCL_IB_HCA and NCCL_SOCKET_IFNAME choose others"
    text = f"{best:.3g} GB/s between neighbours, below {least:g}: NCCL does not use {link}"
    return [Check(name="links", status=FAILED, text=text, remedy=remedy)]


def _named(members: list[Rates], most: int = 8) -> str:
    names = list(dict.fromkeys(entry.node for entry in members))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
