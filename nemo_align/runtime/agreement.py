"""Doing something on one or all ranks so that a failure raises the same error everywhere, in place of a hang."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from nemo_align.runtime.topology import Topology

Result = TypeVar("Result")


def on_main(topology: Topology, action: Callable[[], Result]) -> Result:
    """Run `action` on rank 0 and return its (picklable) result on every rank."""
    outcome: list = [None]
    error: Exception | None = None
    if topology.is_main:
        try:
            outcome = [(True, action())]
        except Exception as caught:  # any failure must reach the ranks that wait
            error, outcome = caught, [(False, str(caught))]
    dist.broadcast_object_list(outcome, src=0)
    succeeded, value = outcome[0]
    if succeeded:
        return value
    if error is not None:
        raise error
    raise ValueError(f"on rank 0: {value}")


def agree(action: Callable[[], Result]) -> Result:
    """Run `action` on every rank; if it fails on any, all raise and the message names the rank."""
    value, error = None, None
    try:
        value = action()
    except Exception as caught:  # any failure must reach the ranks that wait
        error = caught
    messages = gather(None if error is None else str(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise ValueError(f"on rank {rank}: {message}")
    return value


def gather(value: Result) -> list[Result]:
    """Every rank's value, in the order of ranks, on every rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def highest(topology: Topology, values: Sequence[int]) -> list[int]:
    """The highest of all ranks' numbers, place by place: one small collective."""
    if topology.world_size == 1:
        return [int(value) for value in values]
    found = torch.tensor([int(value) for value in values], dtype=torch.int32, device=topology.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()
