"""The training loop of every stage. It does not know which stage it runs: a `Task` says what is learnt on what.

Order of a step: next batch -> forward and backward through the pipeline schedule -> is everything finite? ->
optimizer step -> metrics -> save or validate when due -> was a stop asked for?
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from typing import NoReturn

from nemo_align.checkpoint.megatron import load_training, newest_resumable
from nemo_align.config.stages import TrainStageConfig
from nemo_align.data.batch_schedule import BatchSchedule
from nemo_align.runtime import starts, watchdog
from nemo_align.runtime.agreement import on_main
from nemo_align.runtime.exit_codes import STOPPED_AFTER_SAVING
from nemo_align.training.data_identity import changes, describe_data
from nemo_align.training.forward import validate
from nemo_align.training.forward_totals import ForwardTotals, Stopped
from nemo_align.training.optimizer import (
    apply_gradients,
    build_optimizer,
    gradient_norm,
    learning_rate,
    wrap_data_parallel,
)
from nemo_align.training.result import read_result
from nemo_align.training.saving import Saving
from nemo_align.training.schedule_length import num_steps, schedule_length
from nemo_align.training.schedule_step import StepOutcome, run_step
from nemo_align.training.session import Session
from nemo_align.training.state import TrainState
from nemo_align.training.task import Task
from nemo_align.training.telemetry import Telemetry

logger = logging.getLogger("nemo_align")


class Trainer:
    """Model, optimizer, schedule and state of one stage, from its first step or from where it stopped."""

    def __init__(self, session: Session, task: Task, batches: BatchSchedule, num_examples: int) -> None:
        """`num_examples`: examples that the learning-rate schedule spans."""
        config = session.config
        assert isinstance(config, TrainStageConfig)
        self.config = config
        self.session = session
        self.topology = session.topology
        self.task = task
        self.batches = batches
        self.num_examples = num_examples
        self.num_steps = num_steps(config.train, batches, num_examples)
        self.model_chunks = wrap_data_parallel(session.model_chunks, config.parallel, config.precision)
        self.optimizer, self.scheduler = build_optimizer(
            self.model_chunks,
            config.optimizer,
            config.parallel,
            config.precision,
            schedule_length(config.optimizer, batches, num_examples),
        )
        self.state = TrainState(
            data_fingerprint=task.train.fingerprint,
            data_content=on_main(self.topology, lambda: describe_data(config, task.tokenizer)),
            initial_identity=session.initial_identity,
        )
        self.validation_totals = ForwardTotals()
        self.saving = Saving(session, task, self.model_chunks, self.optimizer, self.scheduler)

    def run(self) -> dict[str, float] | None:
        """Train to the end; returns the held-out metrics there, or None if an earlier process had come to it already.

        Exits the process, after saving, when asked to stop.
        """
        resumed = self._resume()
        self.session.stop.leave_if_agreed(self.topology)
        watchdog.beat("measuring the machine")
        written = on_main(self.topology, lambda: read_result(self.session.run_dir) is not None)
        if self.state.step == self.num_steps and written:
            return None
        self.telemetry = Telemetry(self.session, self.task, self.num_steps, self.state)
        self.saving.telemetry = self.telemetry
        validate_every = self.config.train.validate_every
        try:
            if not resumed:
                self._load_initial_optimizer()
            # Also after a resume: a stop may have come in place of a validation, or during it.
            if self.state.step == 0 and self.config.train.validate_at_start:
                # What is not finite cannot go into the manifest; metrics.jsonl names it.
                first = self._validate()
                self.state.first_validation = {name: value for name, value in first.items() if math.isfinite(value)}
            elif self.state.validated_step < self.state.step < self.num_steps and self._due(validate_every):
                self._validate()
            while self.state.step < self.num_steps:
                self._step()
                if self.saving.agreed(self.topology):
                    raise Stopped
                if self.state.step == self.num_steps:
                    break
                if self._due(validate_every):
                    self._validate()
                if self._due(self.config.checkpoint.save_every):
                    self._save()
            last_validation = self._validate()
        except Stopped:
            self._save(wait=True)
            logger.info("stopped by a signal at step %d of %d: saved", self.state.step, self.num_steps)
            self.telemetry.close()
            raise SystemExit(STOPPED_AFTER_SAVING) from None
        except BaseException:
            self.saving.abandon()
            self.telemetry.close()
            raise
        self._save(final=True)
        return last_validation

    def _step(self) -> None:
        begin = time.perf_counter()
        watchdog.beat(f"training step {self.state.step + 1}")
        size = min(
            self.batches.batch_size(self.state.consumed_examples), self.num_examples - self.state.consumed_examples
        )
        step = self.task.train.step(self.state.consumed_examples, size)
        for chunk in self.model_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        outcome = run_step(self.model_chunks, step, self.task.objective, self.topology)
        grad_norm = gradient_norm(self.optimizer)
        # The schedule counts examples, so its position after this batch gives the rate of this batch's update.
        self.scheduler.step(size)
        failure = self._failure(outcome, grad_norm)
        if failure is None:
            apply_gradients(self.optimizer, grad_norm)
            self.state.skipped_in_a_row = 0
        self.state.step += 1
        self.state.consumed_examples += size
        self.state.tokens += step.plan.real_tokens
        seconds = time.perf_counter() - begin
        self.state.train_seconds += seconds
        self.telemetry.train_step(
            step.plan, {**outcome.metrics, "grad_norm": grad_norm, "lr": learning_rate(self.optimizer)}, seconds
        )
        if failure is not None:
            self._leave_out(failure)

    def _failure(self, outcome: StepOutcome, grad_norm: float) -> str | None:
        """What is not finite; None if the update may be applied. The same on every rank: both are reduced over all."""
        loss = outcome.metrics.get("loss", 0.0)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return None
        return f"step {self.state.step + 1}: loss {loss}, gradient norm {grad_norm}"

    def _leave_out(self, failure: str) -> None:
        if self.config.train.nonfinite == "error":
            self._give_up(
                f"{failure}: stopped before the update; the last checkpoint is good. Lower optimizer.lr, look at the "
                "rows of this step, or set train.nonfinite=skip to leave such steps out"
            )
        self.state.skipped_steps += 1
        self.state.skipped_in_a_row += 1
        logger.warning("%s: update skipped (%d so far)", failure, self.state.skipped_steps)
        if self.state.skipped_in_a_row >= self.config.train.nonfinite_limit:
            self._give_up(
                f"{failure}: {self.state.skipped_in_a_row} steps in a row were not finite (train.nonfinite_limit): the "
                "weights are at fault, not the rows. Start again from an older checkpoint with a lower optimizer.lr"
            )

    def _give_up(self, message: str) -> NoReturn:
        """End the run for a reason that every rank meets at this step: the save in flight can still be finished."""
        try:
            self.saving.finish()
        except ValueError as error:
            logger.error("%s", error)
        raise ValueError(message)

    def _validate(self) -> dict[str, float]:
        if not self.task.validation:
            return {}
        self.telemetry.progress.pause()
        metrics = validate(
            self.model_chunks,
            self.task.validation,
            self.task.objective,
            self.topology,
            self.saving,
            self.validation_totals,
            batch_size=self.config.train.global_batch_size,
            set_metrics=self.task.set_metrics,
        )
        self.state.validated_step = self.state.step
        self.telemetry.validation(self.state.step, metrics)
        self.telemetry.progress.resume()
        return metrics

    def _due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _save(self, *, final: bool = False, wait: bool = False) -> None:
        self.state.validation_totals = asdict(self.validation_totals)
        self.telemetry.progress.pause()
        self.saving.save(self.state, final=final, wait=wait)
        self.telemetry.progress.resume()

    def _resume(self) -> bool:
        watchdog.beat("loading the newest checkpoint")
        newest = newest_resumable(self.session.run_dir, self.topology)
        if newest is None:
            return False
        values = load_training(
            newest,
            self.model_chunks,
            self.optimizer,
            self.scheduler,
            self.topology,
            verify=False,  # just verified
        )
        content = self.state.data_content
        self.state = TrainState.from_dict(values)
        self.validation_totals = ForwardTotals(**self.state.validation_totals)
        if self.state.data_fingerprint != self.task.train.fingerprint:
            raise ValueError(
                f"the training data changed since the checkpoint {newest}: "
                f"{changes(self.state.data_content, content, self.config)}. A resumed run would read other rows than "
                "the ones it skips. Restore the data and data.* settings, or start in another run_dir with "
                f"checkpoint.init_from={newest}"
            )
        if self.state.initial_identity != self.session.initial_identity:
            raise ValueError(
                f"checkpoint.init_from={self.config.checkpoint.init_from} is no longer what the run in "
                f"{self.session.run_dir} started from: name the checkpoint it was, or start in another run_dir"
            )
        logger.info("resumed %s at step %d of %d", newest, self.state.step, self.num_steps)
        if self.topology.is_main:
            starts.resumed(self.session.run_dir, self.state.step)
        return True

    def _load_initial_optimizer(self) -> None:
        """Adam's moments of the checkpoint that the stage starts from, if asked for; the schedule starts anew."""
        if not self.config.checkpoint.load_optimizer:
            return
        assert self.session.initial is not None and self.session.initial.kind == "megatron"
        load_training(self.session.initial.path, self.model_chunks, self.optimizer, None, self.topology)
        logger.info("optimizer state carried over from %s", self.session.initial.path)
