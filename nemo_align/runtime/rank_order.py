"""Work that one process does for all: preparing files that the others then open."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from nemo_align.runtime.topology import Topology

Result = TypeVar("Result")


def rank_zero_first(topology: Topology, function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0, then on every other rank, which finds what rank 0 has prepared.

    Raises ValueError on every rank if rank 0 does, so that no rank waits for one that has gone.
    """
    if topology.world_size == 1:
        return function()
    failure: list[str | None] = [None]
    result = None
    if topology.is_main:
        try:
            result = function()
        except ValueError as error:
            failure[0] = str(error)
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise ValueError(failure[0])
    return result if topology.is_main else function()
