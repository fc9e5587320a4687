"""What one node has: gathered from all ranks at the start of a job and by `nemo-align doctor`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from nemo_align.preflight.checks import FAILED, NOTE, OK, WARNING, Check
from nemo_align.preflight.files import Missing

_MOST_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class Node:
    """One rank's view of its node. Only the first rank of a node looks at files."""

    name: str
    versions: dict[str, str]
    gpus: int  # that this rank sees
    ranks: int  # of the job on this node
    memory: int | None = None  # bytes that torch can give on this rank's GPU; None on a CPU
    missing: list[Missing] = field(default_factory=list)  # files that the configuration names
    wrong: list[Check] = field(default_factory=list)  # of its packages and its driver, whatever the other nodes have


def check_nodes(nodes: list[Node], *, only_differences: bool = False) -> Iterator[Check]:
    """The ranks' views against each other. `only_differences`: not of files that no node has, which the configuration's
    own check has named."""
    yield from _wrong_alone(nodes)
    yield from _same_versions(nodes)
    yield _enough_gpus(nodes)
    lacking = {node.name: node.missing for node in nodes if node.missing}
    everywhere = len({node.name for node in nodes})
    for file in dict.fromkeys(file for missing in lacking.values() for file in missing):
        where = [name for name, missing in lacking.items() if file in missing]
        if len(where) == everywhere and only_differences:
            continue
        on = "" if len(where) == everywhere else f" (on {_named(where)})"
        yield Check(name="files", status=FAILED, text=f"{file.text}{on}", remedy=file.remedy)


def smallest_memory(nodes: list[Node]) -> int | None:
    """Bytes of the smallest GPU; None on CPUs."""
    return min((node.memory for node in nodes if node.memory is not None), default=None)


def _wrong_alone(nodes: list[Node]) -> Iterator[Check]:
    """What each node found wrong with itself, once, with the nodes where it is not all of them."""
    everywhere = len({node.name for node in nodes})
    found: dict[Check, list[str]] = {}
    for node in nodes:
        for check in node.wrong:
            found.setdefault(check, []).append(node.name)
    for check, names in found.items():
        yield check if len(set(names)) == everywhere else replace(check, text=f"{check.text} (on {_named(names)})")


def _same_versions(nodes: list[Node]) -> Iterator[Check]:
    for package in dict.fromkeys(package for node in nodes for package in node.versions):
        found: dict[str, list[str]] = {}
        for node in nodes:
            found.setdefault(node.versions.get(package, "none"), []).append(node.name)
        if len(found) > 1:
            common = max(found, key=lambda version: len(found[version]))
            odd = "; ".join(f"{version} on {_named(names)}" for version, names in found.items() if version != common)
            remedy = "one environment for all nodes: the same folder or image (NEMO_ALIGN_PYTHON, cluster.python)"
            if package == "driver":  # several run, while a cluster is brought up to date
                remedy = "ask for the same driver on all nodes; NCCL is tested with one"
            yield Check(
                name="versions",
                status=WARNING if package == "driver" else FAILED,
                text=f"{package} differs: {common} on most nodes, {odd}",
                remedy=remedy,
            )


def _enough_gpus(nodes: list[Node]) -> Check:
    seen = {node.gpus for node in nodes}
    if seen == {0}:
        return Check(name="GPUs", status=NOTE, text="none: the ranks run on the CPU")
    # A rank that sees one GPU was given it by SLURM.
    short = {node.name: node for node in nodes if node.gpus != 1 and node.gpus < node.ranks}
    short |= {node.name: node for node in nodes if node.gpus == 0}
    if short:
        found = "; ".join(
            f"{node.name} {node.gpus} for {node.ranks} ranks" for node in list(short.values())[:_MOST_NAMED]
        )
        return Check(
            name="GPUs",
            status=FAILED,
            text=f"fewer than ranks: {found}",
            remedy=f"leave it out (sbatch --exclude={','.join(list(short)[:_MOST_NAMED])}); nvidia-smi there says what "
            "became of the GPU",
        )
    usual = statistics.mode(node.gpus for node in nodes)
    fewer = {node.name: node.gpus for node in nodes if node.gpus < usual}
    if fewer:
        named = ", ".join(f"{name} {count}" for name, count in list(fewer.items())[:_MOST_NAMED])
        text = f"enough for the ranks, but fewer than the {usual} of most nodes: {named}"
        return Check(name="GPUs", status=WARNING, text=text, remedy="nvidia-smi there says what became of the others")
    memory = smallest_memory(nodes)
    size = "" if memory is None else f", {memory / 1e9:.3g} GB each"
    text = f"{max(seen)} seen by each rank, {nodes[0].ranks} ranks on a node{size}"
    return Check(name="GPUs", status=OK, text=text)


def _named(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - _MOST_NAMED} more" if len(unique) > _MOST_NAMED else ""
    return ", ".join(unique[:_MOST_NAMED]) + more
