"""Work that one process does for all: preparing files that the others then open."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from nemo_align.runtime.topology import Topology

Result = TypeVar("Result")

_DONE = b"done"
# Tokenizing a large data set takes hours; a collective would give up after distributed_timeout_minutes.
_LONGEST = timedelta(days=7)
_calls = itertools.count()


def rank_zero_first(topology: Topology, function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0, then on every other rank, which finds what rank 0 has prepared.

    Every rank calls it in the same order. Raises ValueError on every rank if rank 0 fails, so that none waits for one
    that has gone.
    """
    if topology.world_size == 1:
        return function()
    store = dist.distributed_c10d._get_default_store()  # waits without the timeout of the collectives
    key = f"nemo_align/rank_zero_first/{next(_calls)}"
    if not topology.is_main:
        store.wait([key], _LONGEST)
        said = store.get(key)
        if said != _DONE:
            raise ValueError(said.decode())
        return function()
    try:
        result = function()
    except Exception as error:  # any failure must reach the ranks that wait
        store.set(key, (str(error) or type(error).__name__).encode())
        raise
    store.set(key, _DONE)
    return result
