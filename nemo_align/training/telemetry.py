"""Everything a run says of itself: progress, metrics.jsonl, trackers and, at its end, result.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict

from nemo_align.data.step_plan import StepPlan
from nemo_align.runtime.device import peak_memory_gib
from nemo_align.training.forward_totals import ForwardTotals
from nemo_align.training.metrics import MetricsWriter
from nemo_align.training.peak import peak_tflops
from nemo_align.training.progress import Progress
from nemo_align.training.result import StageResult, write_result
from nemo_align.training.session import Session
from nemo_align.training.state import TrainState
from nemo_align.training.task import Task
from nemo_align.training.throughput import Throughput
from nemo_align.training.trackers import open_trackers

logger = logging.getLogger("nemo_align")


class Telemetry:
    """Rank 0 writes; the other ranks compute the same rates and keep silent."""

    def __init__(self, session: Session, task: Task, num_steps: int, state: TrainState) -> None:
        """A collective call: on a CPU all ranks measure the peak rate together."""
        config = session.config
        self.session = session
        self.task = task
        self.state = state
        self.enabled = session.topology.is_main
        peak, source = peak_tflops(config.tracking, config.precision)
        self.throughput = Throughput(
            config.model,
            world_size=session.topology.world_size,
            peak_tflops=peak,
            peak_source=source,
            with_logits=task.computes_logits,
            totals=state.throughput,
        )
        state.throughput = self.throughput.totals
        self.progress = Progress(
            config.experiment, num_steps, start=state.step, log_every=config.train.log_every, enabled=self.enabled
        )
        self.progress.__enter__()
        if self.enabled:
            logger.info("%s", self.throughput.describe())
            self.writer = MetricsWriter(session.run_dir)
            self.writer.resume(state.step)
            self.trackers = open_trackers(config.tracking, session.run_dir, config.experiment, asdict(config))

    def train_step(self, plan: StepPlan, metrics: Mapping[str, float], seconds: float) -> None:
        """One training step, after the state has counted it."""
        metrics = {**metrics, "num_tokens": self.state.tokens, **self.throughput.step(plan, seconds)}
        memory = peak_memory_gib()
        if memory is not None:
            metrics["perf/peak_memory_gib"] = memory
        self._write("train", metrics)
        self.progress.update(self.state.step, metrics)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics over whole held-out sets."""
        self._write("validation", metrics)
        if self.enabled:
            # Where a metric has parts (mse and mse/<attribute>), the line shows the whole; metrics.jsonl has all.
            whole = {name: value for name, value in metrics.items() if name.rpartition("/")[0] not in metrics}
            shown = "  ".join(f"{name.removeprefix('validation/')} {value:.4f}" for name, value in whole.items())
            logger.info("held out, step %d: %s", step, shown)

    def saved(self, step: int, metrics: Mapping[str, float]) -> None:
        """How long the save of `step` took; known some steps later."""
        self._write("save", metrics, step)

    def finish(self, last_validation: dict[str, float], validation_totals: ForwardTotals) -> None:
        """Write result.json: the stage is complete."""
        self.close()
        state, topology = self.state, self.session.topology
        passes = {**self.task.forward_only, "validation": validation_totals}
        forward_only = {name: self.throughput.forward(totals) for name, totals in passes.items() if totals.seconds}
        rates = self.throughput.stage()
        if not self.enabled:
            return
        config = self.session.config
        result = StageResult(
            verb=self.task.verb,
            experiment=config.experiment,
            steps=state.step,
            examples=state.consumed_examples,
            tokens=state.tokens,
            seconds=state.seconds,
            train_seconds=state.train_seconds,
            layout=topology.layout(),
            input=config.checkpoint.init_from,
            output=f"checkpoints/step_{state.step:07d}",
            first=state.first_validation,
            last=last_validation,
            mfu=rates.get("mfu"),
            mfu_padded=rates.get("mfu_padded"),
            mfu_causal=rates.get("mfu_causal"),
            tokens_per_second_per_gpu=rates.get("tokens_per_second_per_gpu"),
            peak_tflops=self.throughput.peak_tflops,
            peak_source=self.throughput.peak_source,
            forward_only=forward_only,
            steps_left_out=int(rates.get("steps_left_out", 0)),
        )
        write_result(self.session.run_dir, result)

    def close(self) -> None:
        """Leave the last line standing and flush what is open."""
        self.progress.close()
        if self.enabled:
            self.writer.close()
            for tracker in self.trackers:
                tracker.close()

    def _write(self, kind: str, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self.enabled:
            return
        step = self.state.step if step is None else step
        self.writer.write({"kind": kind, "step": step, **metrics})
        for tracker in self.trackers:
            tracker.log(step, metrics)
