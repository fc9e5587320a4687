"""One layout of a stage: memory, time and rates together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nemo_align.config.stages import PreferenceStageConfig, RewardStageConfig, TrainStageConfig
from nemo_align.model.counts import checkpoint_bytes, flops
from nemo_align.planning import h100
from nemo_align.planning.job import Job
from nemo_align.planning.layer_time import layer
from nemo_align.planning.memory import MemoryPlan, memory_plan
from nemo_align.planning.parameters import RewardHeadSize
from nemo_align.planning.step_time import StepTime, step_time
from nemo_align.planning.workload import step_work


@dataclass(frozen=True)
class Estimate:
    """A job with what it needs and yields. MFU as in docs/metrics.md, against the dense peak of the precision."""

    job: Job
    memory: MemoryPlan
    time: StepTime

    @property
    def flops(self) -> float:
        """Model FLOPs of a step: real tokens, attention over the full square."""
        return self._flops(causal=False)

    @property
    def causal_flops(self) -> float:
        """The same with attention halved, as Megatron-LM counts it."""
        return self._flops(causal=True)

    @property
    def peak_tflops(self) -> float:
        return h100.PEAK_TFLOPS["fp8" if self.job.precision.fp8 != "none" else self.job.precision.dtype]

    @property
    def mfu(self) -> float:
        return self.model_tflops_per_gpu / self.peak_tflops

    @property
    def mfu_causal(self) -> float:
        return self.mfu * self.causal_flops / self.flops

    @property
    def model_tflops_per_gpu(self) -> float:
        return self.flops / self.time.total / self.job.world_size / 1e12

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.job.work.real_tokens / self.time.total / self.job.world_size

    @property
    def padding_fraction(self) -> float:
        work = self.job.work
        return 1 - work.real_tokens / (work.tokens * work.micro_batches * self.job.data)

    def _flops(self, *, causal: bool) -> float:
        work = self.job.work
        tokens = round(work.real_tokens)
        return float(
            flops(
                self.job.model,
                tokens=tokens,
                squared_tokens=round(work.real_squared_tokens),
                logit_tokens=tokens if self.job.head is None else 0,
                causal=causal,
            )
        )


@dataclass(frozen=True)
class CheckpointCost:
    """A full checkpoint: weights in the model's format, fp32 copies and Adam's two moments."""

    num_bytes: float
    seconds: float
    bytes_per_second: float


def job_of(stage: TrainStageConfig, batch_size: int, lengths: np.ndarray | None) -> Job:
    """The job of a stage whose `parallel.data` is set.

    Raises:
        ValueError: an example does not fit a micro-batch.
    """
    head = None
    if isinstance(stage, RewardStageConfig):
        head = RewardHeadSize(attributes=len(stage.reward.attributes), bias=stage.reward.head_bias)
    return Job(
        model=stage.model,
        parallel=stage.parallel,
        precision=stage.precision,
        work=step_work(stage, batch_size, lengths),
        head=head,
    )


def estimate(stage: TrainStageConfig, batch_size: int, lengths: np.ndarray | None) -> Estimate:
    """Memory and time of steps of `batch_size` examples.

    Raises:
        ValueError: an example does not fit a micro-batch.
    """
    job = job_of(stage, batch_size, lengths)
    return Estimate(job, memory_plan(job, reference_pass=isinstance(stage, PreferenceStageConfig)), step_time(job))


def checkpoint_cost(job: Job, bytes_per_second: float | None = None) -> CheckpointCost:
    """Size, and time to write it. `bytes_per_second`: of the whole job; None: by its nodes."""
    head = None if job.head is None else job.head.parameters(job.model)
    size = checkpoint_bytes(job.model, job.parallel, job.precision, reward_head=head)
    nodes = -(-job.world_size // h100.GPUS_PER_NODE)
    rate = bytes_per_second or h100.WRITE_BYTES_PER_SECOND_PER_UNIT * nodes / h100.NODES_PER_UNIT
    return CheckpointCost(size, size / rate, rate)


def forward_seconds(of: Estimate, examples: int) -> float:
    """A forward-only pass over `examples`, by the share of a step's passes that forward takes (no bubble of backward
    passes, no gradients): the reference pass of a preference stage. FP8's delayed recipe rests in it."""
    job = of.job
    all_recomputed = job.recomputed_layers == job.layers_per_chunk
    passes = layer(job, fp8=job.precision.fp8 != "none", recomputed=all_recomputed)
    forward = layer(job, fp8=False, recomputed=False).forward if job.precision.fp8 == "delayed" else passes.forward
    share = forward.total / (passes.forward.total + passes.backward.total)
    return share * of.time.pipeline * examples / of.job.work.examples
