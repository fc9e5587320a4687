"""Saving while training goes on.

A save has three parts. `start`, between two steps: all ranks plan it and copy their shards to host memory. Then a
thread on each rank writes its file, with no word to the others. Whether all have written is agreed by the training
loop, which exchanges a few numbers per step anyway: it hands the worst `status` of all ranks to `advance`. When all are
done, rank 0 gathers what was written and a thread of its own writes the manifest, publishes the folder and applies
retention; the next agreement tells everyone. If any part fails, all ranks raise at the same step.

No thread here takes part in a collective, so none can meet one of the main thread out of order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import IntEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from nemo_align.checkpoint import manifest as manifests
from nemo_align.checkpoint import sharded_state, store
from nemo_align.checkpoint.keys import RNG_KEY
from nemo_align.checkpoint.snapshot import Cancelled, SavePlanner, Snapshot, Written, write_metadata
from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import RewardConfig
from nemo_align.runtime import seeds, watchdog
from nemo_align.runtime.agreement import gather, highest, on_main
from nemo_align.runtime.topology import Topology

TOKENIZER = "tokenizer"
_POLL_SECONDS = 1.0  # in which the ranks tell each other that a save they wait for still moves
_LEAVE_SECONDS = 5.0  # for a thread to come to the end of a tensor when the process leaves with an error

logger = logging.getLogger("nemo_align")


class Saveable(Protocol):
    """A tokenizer, as far as a checkpoint is concerned."""

    def save(self, folder: Path) -> None: ...


class Status(IntEnum):
    """Of this rank's present part of a save. The worst of all ranks is the highest."""

    DONE = 0
    BUSY = 1
    FAILED = 2


@dataclass(frozen=True)
class SaveReport:
    """A published checkpoint."""

    path: Path
    step: int
    num_bytes: int  # of all ranks
    blocked_seconds: float  # that the main thread spent on it
    background_seconds: float  # from the copy to the publication


@dataclass
class _Pending:
    step: int
    folder: Path
    snapshot: Snapshot
    described: dict  # the manifest without its files
    num_bytes: int
    blocked_seconds: float
    began: float
    work: _Work
    publishing: bool = False
    files_published: int = 0  # or deleted, by `_publish` so far

    @property
    def moved(self) -> tuple[int, int]:
        """Another value whenever this rank's part has come further."""
        return self.snapshot.written_bytes, self.files_published

    def count_file(self) -> None:
        self.files_published += 1


class Saver:
    """Saves checkpoints of one run, at most one at a time. Its methods but `abandon` are collective."""

    def __init__(self, run_dir: Path | str, topology: Topology, *, keep_last: int | None = None) -> None:
        """`keep_last`: periodic checkpoints that stay when another is published; None deletes none."""
        self._run_dir = Path(run_dir)
        self._topology = topology
        self._keep_last = keep_last
        self._planner = SavePlanner()
        self._pending: _Pending | None = None

    @property
    def pending(self) -> bool:
        """Whether a save has begun that is not published yet. The same on all ranks."""
        return self._pending is not None

    @property
    def status(self) -> Status:
        """How this rank's part stands."""
        return Status.DONE if self._pending is None else self._pending.work.status

    def start(
        self,
        step: int,
        *,
        model_chunks: list[torch.nn.Module],
        optimizer,  # MegatronOptimizer | None
        scheduler,  # anything with state_dict() | None
        state: dict,
        verb: str,
        model_config: ModelConfig,
        reward_config: RewardConfig | None,
        dtype: str,
        tokenizer: Saveable,
        final: bool,
        fully_reshardable: bool = False,
        copy: bool = True,
        began: float | None = None,
    ) -> None:
        """Begin the save of `step`; `advance` and `wait` publish it.

        Args:
            model_chunks: one per virtual pipeline stage, wrapped for data parallelism or not.
            optimizer: None saves weights only.
            state: JSON values that `megatron.load_training` returns (no NaN).
            dtype: fp32 | bf16, of the weights.
            final: the end of a stage. Its optimizer state loads under any layout; periodic ones (False) are faster to
                write and load only where TP and PP are the same.
            fully_reshardable: a periodic save whose optimizer state loads under any layout, as the final one's does.
            copy: False writes the live tensors and needs no host memory for a copy: for callers that `wait` at once.
            began: time.perf_counter() at which training stopped for this save; None: now.

        Raises:
            ValueError: the folder cannot be made, or its disk has too little space.
        """
        assert self._pending is None, "one save at a time"
        began = time.perf_counter() if began is None else began
        topology = self._topology
        sharding = sharded_state.sharding_of(optimizer, fully=final or fully_reshardable)
        content = sharded_state.model_state(model_chunks, sharding)
        if optimizer is not None:
            content["optimizer"] = sharded_state.optimizer_state(optimizer, content, sharding, is_loading=False)
        if scheduler is not None:
            content["scheduler"] = scheduler.state_dict()
        content[RNG_KEY] = sharded_state.rng_object(seeds.rng_state(), topology)
        snapshot = self._planner.plan(content, sharded_state.format_metadata(sharding), sharding, topology)
        num_bytes = _sum(snapshot.num_bytes, topology)
        folder = Path(on_main(topology, lambda: str(store.begin(self._run_dir, step, num_bytes))))
        described = {
            "verb": verb,
            "step": step,
            "final": final,
            "model": asdict(model_config),
            "reward": reward_entry(reward_config),
            "layout": topology.layout(),
            "optimizer_sharding": sharding,
            "dtype": dtype,
            "tokenizer": TOKENIZER,
            "state": state,
            "megatron_core": version("megatron-core"),
            "torch": torch.__version__,
        }
        action = _writing(snapshot, folder, tokenizer if topology.is_main else None)
        work = _Work(action, before=snapshot.copy_to_host if copy else None)
        now = time.perf_counter()
        self._pending = _Pending(step, folder, snapshot, described, num_bytes, now - began, now, work)

    def advance(self, worst: Status | int) -> SaveReport | None:
        """Go on with the save in flight, if all ranks can; a report once it is published.

        `worst`: the highest `status` of all ranks, the same number on all of them.

        Raises:
            ValueError: on all ranks, when the part of any failed: rank, path and cause. What was written is removed.
        """
        pending = self._pending
        if pending is None or worst == Status.BUSY:
            return None
        if worst == Status.FAILED:
            self._fail(pending)
        if not pending.publishing:
            began = time.perf_counter()
            parts = _gather_on_main(pending.work.result(), self._topology)
            pending.work = _Work(lambda: self._publish(pending, parts)) if parts else _Work(None)
            pending.publishing = True
            pending.blocked_seconds += time.perf_counter() - began
            return None
        self._pending = None
        path = store.checkpoint_path(self._run_dir, pending.step)
        seconds = time.perf_counter() - pending.began
        return SaveReport(path, pending.step, pending.num_bytes, pending.blocked_seconds, seconds)

    def wait(self) -> SaveReport | None:
        """Finish the save in flight; None if there is none."""
        report, seen = None, None
        while self._pending is not None:
            pending = self._pending
            began = time.perf_counter()
            pending.work.join(_POLL_SECONDS)
            now = pending.moved
            worst, moved = highest(self._topology, [self.status, int(now != seen)])
            seen = now
            if moved or worst != Status.BUSY:
                watchdog.beat(f"writing the checkpoint of step {pending.step}")
            pending.blocked_seconds += time.perf_counter() - began
            report = self.advance(worst)
        return report

    def abandon(self) -> None:
        """This rank leaves because of another error: its thread ends; the next start removes the unpublished folder."""
        if self._pending is not None:
            self._pending.snapshot.cancelled.set()
            self._pending.work.join(_LEAVE_SECONDS)
            self._pending = None

    def _publish(self, pending: _Pending, parts: list[Written]) -> None:
        """On rank 0, in a thread."""
        moved = pending.count_file
        files = write_metadata(pending.folder, parts)
        moved()
        names = [name for name in manifests.list_files(pending.folder) if name not in files]
        files |= manifests.describe_files(pending.folder, names)
        manifests.write_manifest(pending.folder, {**pending.described, "files": dict(sorted(files.items()))})
        moved()
        path = store.publish(pending.folder, store.checkpoint_path(self._run_dir, pending.step), moved=moved)
        if self._keep_last is not None:
            try:
                store.apply_retention(self._run_dir, self._keep_last, published=path, moved=moved)
            except OSError as error:
                logger.warning("old checkpoints could not be deleted: %s", error)

    def _fail(self, pending: _Pending) -> None:
        pending.snapshot.cancelled.set()
        pending.work.join()
        self._pending = None
        messages = gather(pending.work.message(pending.folder))
        # All have ended their writing: nothing appears in the folder any more.
        on_main(self._topology, lambda: store.discard(pending.folder))
        rank, message = next((rank, message) for rank, message in enumerate(messages) if message is not None)
        raise ValueError(
            f"the checkpoint of step {pending.step} could not be written: rank {rank}: {message}. Mend that and start "
            "the same command again: it goes on from the checkpoint before"
        )


class _Work:
    """Something done in a thread, and how it ended."""

    def __init__(self, action: Callable[[], Any] | None, *, before: Callable[[], None] | None = None) -> None:
        """Do `before` at once, then begin `action` in a thread; with None there is nothing to do.

        An error in `before` counts as the action's: the other ranks must hear of it in place of waiting.
        """
        self._action = action
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        try:
            if before is not None:
                before()
        except Exception as error:  # out of memory, a device that fails
            self._error = error
            return
        if action is not None:
            # A daemon: should the process leave with an error, it does not wait for a file that will not be published.
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()

    @property
    def status(self) -> Status:
        if self._thread is not None and self._thread.is_alive():
            return Status.BUSY
        return Status.DONE if self._error is None else Status.FAILED

    def join(self, timeout: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout)

    def result(self) -> Any:
        assert self.status == Status.DONE
        return self._result

    def message(self, folder: Path) -> str | None:
        """Cause and file of a failure, in one line."""
        if self._error is None or isinstance(self._error, Cancelled):
            return None
        return store.cause(self._error, folder)

    def _run(self) -> None:
        try:
            self._result = self._action()
        except BaseException as error:  # handed to the main thread by `status`
            self._error = error


def reward_entry(reward_config: RewardConfig | None) -> dict | None:
    """The manifest's description of a reward head."""
    if reward_config is None:
        return None
    return {
        "attributes": list(reward_config.attributes),
        "weights": dict(reward_config.weights) if reward_config.weights is not None else None,
        "head_bias": reward_config.head_bias,
    }


def _writing(snapshot: Snapshot, folder: Path, tokenizer: Saveable | None) -> Callable[[], Written]:
    def write() -> Written:
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER)
        return snapshot.write(folder)

    return write


def _gather_on_main(part: Written, topology: Topology) -> list[Written] | None:
    parts: list | None = [None] * topology.world_size if topology.is_main else None
    dist.gather_object(part, parts, dst=0)
    return parts


def _sum(value: int, topology: Topology) -> int:
    total = torch.tensor(value, dtype=torch.int64, device=topology.device)
    dist.all_reduce(total)
    return int(total.item())
