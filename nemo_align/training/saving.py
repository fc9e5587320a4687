"""The training loop's part in saving: when a save begins, what goes into it, and the one agreement per step."""

from __future__ import annotations

import logging
import time

import torch

from nemo_align.checkpoint.saver import Saver, SaveReport
from nemo_align.config.stages import TrainStageConfig
from nemo_align.runtime import watchdog
from nemo_align.runtime.agreement import highest
from nemo_align.runtime.signal_lead import LeadCheck
from nemo_align.runtime.topology import Topology
from nemo_align.training.session import Session
from nemo_align.training.state import TrainState
from nemo_align.training.task import Task
from nemo_align.training.telemetry import Telemetry

logger = logging.getLogger("nemo_align")


class Saving:
    """Saves one run's training state, beside the steps where `checkpoint.asynchronous` says so."""

    def __init__(
        self,
        session: Session,
        task: Task,
        model_chunks: list[torch.nn.Module],
        optimizer,  # MegatronOptimizer
        scheduler,  # OptimizerParamScheduler
    ) -> None:
        config = session.config
        assert isinstance(config, TrainStageConfig)
        self._config = config
        self._session = session
        self._task = task
        self._model_chunks = model_chunks
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._saver = Saver(session.run_dir, session.topology, keep_last=config.checkpoint.keep_last)
        self._counted_until = session.opened
        self._lead = LeadCheck(asynchronous=config.checkpoint.asynchronous)
        self.telemetry: Telemetry | None = None

    def agreed(self, topology: Topology) -> bool:
        """Whether any rank was asked to stop; the save in flight goes on meanwhile. Collective; once per step or batch.

        Raises ValueError on all ranks when a part of the save failed on any.
        """
        self._lead.look()
        stop, worst = highest(topology, [self._session.stop.requested, self._saver.status])
        self._report(self._saver.advance(worst))
        return bool(stop)

    def save(self, state: TrainState, *, final: bool = False, wait: bool = False) -> None:
        """Save the present step; a save in flight is finished first. `wait` until this one is published."""
        wait = wait or final or not self._config.checkpoint.asynchronous
        watchdog.beat(f"saving step {state.step}")
        self._lead.pause()
        begin = time.perf_counter()
        self.finish()
        if self._config.parallel.overlap_param_gather:
            for chunk in self._model_chunks:  # else the last update would be gathered by the next forward pass only
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()
        now = time.monotonic()
        state.seconds += now - self._counted_until
        self._counted_until = now
        self._saver.start(
            state.step,
            model_chunks=self._model_chunks,
            optimizer=self._optimizer,
            scheduler=self._scheduler,
            state=state.to_dict(),
            verb=self._task.verb,
            model_config=self._config.model,
            reward_config=self._task.reward,
            dtype=self._config.precision.dtype,
            tokenizer=self._task.tokenizer,
            final=final,
            fully_reshardable=self._config.checkpoint.fully_reshardable,
            copy=not wait,
            began=begin,
        )
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait until the save in flight, if there is one, is published. Collective."""
        self._report(self._saver.wait())

    def abandon(self) -> None:
        """This rank leaves with an error that the others may not know of."""
        self._saver.abandon()

    def _report(self, report: SaveReport | None) -> None:
        if report is None:
            return
        assert self.telemetry is not None
        gigabytes = report.num_bytes / 1e9
        rate = gigabytes / max(report.background_seconds, 1e-9)
        self.telemetry.saved(
            report.step,
            {
                "save/blocked_seconds": report.blocked_seconds,
                "save/background_seconds": report.background_seconds,
                "save/gigabytes": gigabytes,
                "save/gigabytes_per_second": rate,
            },
        )
        logger.info(
            "saved %s: %.3f GB, training blocked for %.2f s, written in %.2f s (%.2f GB/s)",
            report.path,
            gigabytes,
            report.blocked_seconds,
            report.background_seconds,
            rate,
        )
        if self._session.topology.is_main:
            self._lead.saved(report.background_seconds)
