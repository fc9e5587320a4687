"""Every layout of a number of GPUs: those that the stage can run under and that fit, by predicted time."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nemo_align.config.stages import PretrainStageConfig, TrainStageConfig
from nemo_align.planning import h100
from nemo_align.planning.estimate import Estimate, job_of
from nemo_align.planning.memory import MemoryPlan, memory_plan
from nemo_align.planning.step_time import least_seconds, step_time
from nemo_align.planning.variants import problems, variant
from nemo_align.planning.workload import segments_of

_ROWS = (1, 2, 4)  # sequences of a micro-batch that are tried
_NEAR = 64  # GPUs more or fewer among which `near_sizes` looks


@dataclass(frozen=True)
class Found:
    """The best layouts, and how many there were."""

    best: list[Estimate]  # by seconds of a step
    first: TrainStageConfig | None  # the stage under the first of them
    tried: int  # that the stage can run under
    fitting: int
    least_bytes: float | None  # of the largest rank, among all that were tried; None without any


def search(stage: TrainStageConfig, batch_size: int, lengths: np.ndarray | None, gpus: int, top: int) -> Found:
    """The `top` fastest layouts of `gpus` GPUs that fit.

    Tensor parallelism stays inside a node and brings sequence parallelism, gradients are reduced during the backward
    pass, and the distributed optimizer's parameters gathered during the forward pass; what else `parallel` says stays.
    """
    tried, least_bytes = 0, None
    fitting: list[tuple[float, int, TrainStageConfig, MemoryPlan]] = []
    for candidate in _layouts(stage, gpus):
        if problems(candidate):
            continue
        tried += 1
        try:
            job = job_of(candidate, batch_size, lengths)
        except ValueError:  # a row does not fit such a micro-batch
            continue
        memory = memory_plan(job)
        least_bytes = min(memory.largest.total, least_bytes or math.inf)
        if memory.fits:
            fitting.append((least_seconds(job), tried, candidate, memory))
    fitting.sort(key=lambda entry: entry[:2])
    best: list[tuple[float, int, Estimate, TrainStageConfig]] = []  # a heap of the worst of the best
    for least, number, candidate, memory in fitting:
        if len(best) == top and least >= -best[0][0]:
            break  # no later one can be faster than all of these
        job = job_of(candidate, batch_size, lengths)
        found = Estimate(job, memory, step_time(job))
        heapq.heappush(best, (-found.time.total, -number, found, candidate))
        if len(best) > top:
            heapq.heappop(best)
    best.sort(key=lambda entry: (-entry[0], -entry[1]))
    first = best[0][3] if best else None
    return Found([found for _, _, found, _ in best], first, tried, len(fitting), least_bytes)


def near_sizes(stage: TrainStageConfig, gpus: int) -> list[int]:
    """The next smaller and the next larger number of GPUs under which the stage can run at all, as far as there are."""
    smaller = (size for size in range(gpus - 1, max(0, gpus - _NEAR - 1), -1) if _runs(stage, size))
    larger = (size for size in range(gpus + 1, gpus + _NEAR + 1) if _runs(stage, size))
    return [size for size in (next(smaller, None), next(larger, None)) if size is not None]


def _runs(stage: TrainStageConfig, gpus: int) -> bool:
    return any(not problems(candidate) for candidate in _layouts(stage, gpus))


def _layouts(stage: TrainStageConfig, gpus: int) -> Iterator[TrainStageConfig]:
    layers = stage.model.num_layers
    divisors = [size for size in range(1, layers + 1) if layers % size == 0]
    for tensor in (size for size in (1, 2, 4, 8) if size <= h100.GPUS_PER_NODE and gpus % size == 0):
        for pipeline in (size for size in divisors if gpus % (tensor * size) == 0):
            virtuals = [v for v in divisors if layers % (pipeline * v) == 0] if pipeline > 1 else [1]
            for virtual in virtuals:
                for rows in _ROWS:
                    for recompute in ("none", "full"):
                        yield variant(
                            stage,
                            parallel__tensor=tensor,
                            parallel__pipeline=pipeline,
                            parallel__virtual_pipeline=virtual,
                            parallel__data=gpus // (tensor * pipeline),
                            parallel__sequence=tensor > 1,
                            parallel__overlap_grad_reduce=True,
                            parallel__overlap_param_gather=stage.parallel.distributed_optimizer,
                            parallel__recompute=recompute,
                            parallel__recompute_layers=1,
                            **_micro_batch(stage, rows),
                        )


def _micro_batch(stage: TrainStageConfig, rows: int) -> dict[str, int]:
    if isinstance(stage, PretrainStageConfig) or not stage.train.packing:
        return {"train__micro_batch_size": rows}
    assert stage.data.sequence_length is not None
    return {"train__micro_batch_tokens": rows * stage.data.sequence_length * segments_of(stage)}
