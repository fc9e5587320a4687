"""Seconds of one optimizer step: the pipeline, then what of the data-parallel communication it does not cover."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

from nemo_align.model.counts import overlaps_p2p
from nemo_align.planning import h100
from nemo_align.planning.collectives import all_reduce_seconds, gather_seconds, send_seconds
from nemo_align.planning.job import Job
from nemo_align.planning.layer_time import Passes, Seconds, embedding, layer, output
from nemo_align.planning.parameters import stage_chunks, stage_parameters
from nemo_align.planning.products import memory_seconds
from nemo_align.planning.schedule import PassSeconds, step_seconds

# Bytes per parameter of a rank's shard that AdamW reads and writes: fp32 weight, two moments and gradient in, weight
# and moments out, and the weight in the model's format.
_ADAM_BYTES = 16 + 12
# Bytes per gradient value on every rank: cleared, scaled by the global count, read for the norm.
_GRADIENT_PASSES = 4


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. `pipeline` is the whole of forward and backward; the parts of one middle rank explain it."""

    pipeline: float
    products: float  # of the busiest rank, as the next five
    attention: float
    memory: float
    tensor: float
    host: float
    waiting: float  # bubble, transfers between stages and waiting for a slower stage, on the busiest rank
    transfers: float  # how much longer the step is than if activations reached the next stage at once
    imbalance: float  # how much longer the step is than with stages that all took the mean
    recomputed: float  # part of the above that recomputation repeats
    gradient_reduce: float  # exposed
    parameter_gather: float  # exposed
    optimizer: float
    step_host: float

    @property
    def total(self) -> float:
        return self.pipeline + self.gradient_reduce + self.parameter_gather + self.optimizer + self.step_host

    @property
    def bubble_fraction(self) -> float:
        """Of the pipeline's time, what the busiest rank does not compute."""
        return self.waiting / self.pipeline


def step_time(job: Job) -> StepTime:
    """Predicted seconds of one optimizer step, and what they are made of."""
    kinds = _layer_kinds(job)
    stages = [_stage_passes(job, stage, kinds) for stage in range(job.parallel.pipeline)]
    times = PassSeconds(
        [[chunk.forward.total for chunk in chunks] for chunks in stages],
        [[chunk.backward.total for chunk in chunks] for chunks in stages],
    )
    transfer = _transfer_seconds(job)
    pipeline = _pipeline_seconds(job, times, transfer)
    busy = [times.busy(stage) for stage in range(len(stages))]
    busiest = max(range(len(stages)), key=busy.__getitem__)
    even = PassSeconds(*([[_mean(side)] * len(side[0])] * len(side) for side in (times.forward, times.backward)))
    parts, recomputed = Seconds(), 0.0
    for chunk in stages[busiest]:
        parts = parts + chunk.forward + chunk.backward
        recomputed += chunk.recomputed
    count = job.work.micro_batches
    return StepTime(
        pipeline=pipeline,
        products=count * parts.products,
        attention=count * parts.attention,
        memory=count * parts.memory,
        tensor=count * parts.tensor,
        host=count * parts.host,
        waiting=max(0.0, pipeline - count * busy[busiest]),
        transfers=max(0.0, pipeline - _pipeline_seconds(job, times, 0.0)),
        imbalance=max(0.0, pipeline - _pipeline_seconds(job, even, transfer)),
        recomputed=count * recomputed,
        gradient_reduce=_exposed_reduce(job, times),
        parameter_gather=_exposed_gather(job),
        optimizer=_optimizer_seconds(job),
        step_host=h100.STEP_HOST_SECONDS,
    )


def _pipeline_seconds(job: Job, times: PassSeconds, transfer: float) -> float:
    """Forward and backward passes of a step: the mean over steps of different numbers of micro-batches."""
    counts, beside = job.work.micro_batch_counts(), overlaps_p2p(job.parallel)
    seconds = {count: step_seconds(times, count, transfer, beside=beside) for count in counts}
    return sum(steps * seconds[count] for count, steps in counts.items()) / counts.total()


def least_seconds(job: Job) -> float:
    """Less than any step takes: the busiest stage without waiting. Cheap, for a first order of many layouts."""
    kinds = _layer_kinds(job)
    stages = [_stage_passes(job, stage, kinds) for stage in {0, job.parallel.pipeline - 1}]
    busiest = max(sum(chunk.forward.total + chunk.backward.total for chunk in chunks) for chunks in stages)
    return job.work.micro_batches * busiest + _exposed_gather(job) + _optimizer_seconds(job)


def _mean(rows: list[list[float]]) -> float:
    values = [value for row in rows for value in row]
    return sum(values) / len(values)


def _layer_kinds(job: Job) -> dict[tuple[bool, bool], Passes]:
    """A layer's passes by (whether it multiplies in FP8, whether it is computed again), as far as there are such."""
    fp8s = (False, True) if job.precision.fp8 != "none" else (False,)
    agains = (False, True) if job.recomputed_layers else (False,)
    return {(fp8, again): layer(job, fp8=fp8, recomputed=again) for fp8 in fp8s for again in agains}


def _stage_passes(job: Job, stage: int, kinds: dict[tuple[bool, bool], Passes]) -> list[Passes]:
    """Each chunk of a stage, for one micro-batch."""
    chunks = []
    for chunk in range(job.parallel.virtual_pipeline):
        in_fp8 = job.fp8_layers(stage, chunk)
        recomputed = [place < job.recomputed_layers for place in range(job.layers_per_chunk)]
        passes = Passes(Seconds(), Seconds())
        for (fp8, again), count in Counter(zip(in_fp8, recomputed, strict=True)).items():
            passes = passes + kinds[fp8, again] * count
        if stage == 0 and chunk == 0:
            passes = passes + embedding(job)
        if stage == job.parallel.pipeline - 1 and chunk == job.parallel.virtual_pipeline - 1:
            passes = passes + output(job)
        chunks.append(_at_the_slowest_pace(job, passes))
    return chunks


def _at_the_slowest_pace(job: Job, passes: Passes) -> Passes:
    """The ranks of a stage wait for each other in every layer (tensor) and in every step (data): what they compute
    takes as long as on the slowest of n, which lies sqrt(2 ln n) standard deviations from the mean."""
    count = job.parallel.tensor * job.data
    slow = 1 + h100.SPEED_SPREAD * math.sqrt(2 * math.log(count))

    def slowed(seconds: Seconds) -> Seconds:
        parts = ("products", "attention", "memory")
        return dataclasses.replace(seconds, **{part: slow * getattr(seconds, part) for part in parts})

    return Passes(slowed(passes.forward), slowed(passes.backward), slow * passes.recomputed)


def _transfer_seconds(job: Job) -> float:
    """Activations, or their gradients, of one micro-batch to the next stage."""
    if job.parallel.pipeline == 1:
        return 0.0
    size = job.work.tokens * job.model.hidden_size * job.value_bytes / job.sequence_split
    return send_seconds(size, job.parallel.tensor * job.data)


def _gradient_bytes(job: Job) -> int:
    return 4 if job.precision.grad_reduce_fp32 or job.precision.dtype == "fp32" else 2


def _exposed_reduce(job: Job, times: PassSeconds) -> float:
    """Reduction of the first stage's gradients after its last backward pass, which is the last of the step.

    With overlap a chunk's gradients set off once its last micro-batch is through, while the chunks before it still
    have theirs to do; without virtual stages, layer by layer during the last micro-batch.
    """
    sizes = [chunk.total * _gradient_bytes(job) for chunk in stage_chunks(job.model, job.parallel, 0, job.head)]
    if job.parallel.distributed_optimizer:
        seconds = [gather_seconds(size, job.data, job.parallel.tensor) for size in sizes]
    else:
        seconds = [all_reduce_seconds(size, job.data, job.parallel.tensor) for size in sizes]
    if not job.parallel.overlap_grad_reduce:
        return sum(seconds)
    if job.is_interleaved:
        round_size = min(job.parallel.pipeline, job.work.most_micro_batches)
        windows = [round_size * backward for backward in times.backward[0]]
        order = list(range(len(sizes)))[::-1]  # the last chunk's backward pass comes first
        return _queue_rest([seconds[chunk] for chunk in order], [windows[chunk] for chunk in order])
    pieces = max(1, job.layers_per_chunk)
    return _queue_rest([seconds[0] / pieces] * pieces, [times.backward[0][0] / pieces] * pieces)


def _queue_rest(transfers: list[float], passes: list[float]) -> float:
    """Transfers one after the other, number i ready when pass i is done: how long they last beyond the last pass."""
    clock = ready = 0.0
    for transfer, seconds in zip(transfers, passes, strict=True):
        ready += seconds
        clock = max(clock, ready) + transfer
    return clock - ready


def _exposed_gather(job: Job) -> float:
    """Updated weights gathered from the ranks that hold the optimizer state; with overlap all but the first chunk's
    travel during the next forward pass."""
    if not job.parallel.distributed_optimizer or job.data == 1:
        return 0.0
    sizes = [chunk.total * job.value_bytes for chunk in stage_chunks(job.model, job.parallel, 0, job.head)]
    seconds = [gather_seconds(size, job.data, job.parallel.tensor) for size in sizes]
    if not job.parallel.overlap_param_gather:
        return sum(seconds)
    return seconds[0] if job.is_interleaved else seconds[0] / max(1, job.layers_per_chunk)


def _optimizer_seconds(job: Job) -> float:
    """AdamW on the shard of the largest stage, and the passes over its gradients."""
    stages = {0, job.parallel.pipeline - 1}
    count = max(stage_parameters(job.model, job.parallel, stage, job.head).total for stage in stages)
    shards = job.data if job.parallel.distributed_optimizer else 1
    gradients = _gradient_bytes(job) * _GRADIENT_PASSES * count
    return memory_seconds(gradients + count / shards * (_ADAM_BYTES + job.value_bytes))
