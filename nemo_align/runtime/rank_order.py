"""Work that one process does for all: preparing files that the others then open."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from nemo_align.runtime import watchdog
from nemo_align.runtime.exit_codes import STOPPED_AFTER_SAVING
from nemo_align.runtime.signals import StopRequest, interruptible
from nemo_align.runtime.topology import Topology

Result = TypeVar("Result")

_DONE, _STOPPED = b"done", b"stopped"
_FIRST_POLL_SECONDS, _LAST_POLL_SECONDS = 0.02, 2.0
_LOOK_SECONDS = 1.0  # between two questions of rank 0 whether another rank was asked to stop
_calls = itertools.count()


def rank_zero_first(topology: Topology, stop: StopRequest, function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0, then on every other rank, which finds what rank 0 has prepared.

    Every rank calls it in the same order. Raises ValueError on every rank if rank 0 fails, so that none waits for one
    that has gone. A stop signal to any rank ends the process of every rank (STOPPED_AFTER_SAVING): in the middle, where
    `function` asks `leave_if_asked`, else at the end.
    """
    if topology.world_size == 1:
        with interruptible(lambda: stop.requested):
            result = function()
    else:
        # Tokenizing a large data set takes hours; a collective would give up after distributed_timeout_minutes.
        store = dist.distributed_c10d._get_default_store()
        key = f"nemo_align/rank_zero_first/{next(_calls)}"
        result = _prepare(store, key, stop, function) if topology.is_main else _follow(store, key, stop, function)
    stop.leave_if_agreed(topology)
    return result


def _prepare(store: dist.Store, key: str, stop: StopRequest, function: Callable[[], Result]) -> Result:
    try:
        with interruptible(_AnyRankAsked(store, key, stop)):
            result = function()
    except SystemExit:
        store.set(key, _STOPPED)
        raise
    except Exception as error:  # any failure must reach the ranks that wait
        store.set(key, (str(error) or type(error).__name__).encode("utf-8", "backslashreplace"))
        raise
    store.set(key, _DONE)
    return result


def _follow(store: dist.Store, key: str, stop: StopRequest, function: Callable[[], Result]) -> Result:
    pause, told = _FIRST_POLL_SECONDS, False
    # Polled, because a signal's handler runs between two calls only. Rank 0 holds the store: while that answers, the
    # watchdog there sees to it that rank 0 goes on.
    while not store.check([key]):
        watchdog.beat("waiting for rank 0 to prepare the data")
        if stop.requested and not told:
            store.set(_stop_key(key), _STOPPED)
            told = True
        time.sleep(pause)
        pause = min(1.5 * pause, _LAST_POLL_SECONDS)
    said = store.get(key)
    if said == _STOPPED:
        raise SystemExit(STOPPED_AFTER_SAVING)
    if said != _DONE:
        raise ValueError(said.decode())
    return function()


class _AnyRankAsked:
    """Whether rank 0, or a rank that waits for it, was asked to stop; cheap enough for every row."""

    def __init__(self, store: dist.Store, key: str, stop: StopRequest) -> None:
        self._store = store
        self._key = _stop_key(key)
        self._stop = stop
        self._looked = time.monotonic()

    def __call__(self) -> bool:
        if self._stop.requested:
            return True
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return False
        self._looked = now
        return self._store.check([self._key])


def _stop_key(key: str) -> str:
    return f"{key}/stop"
