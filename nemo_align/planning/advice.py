"""The nearest changes that make a stage fit: one key if one is enough, else two."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_align.config.stages import PretrainStageConfig, TrainStageConfig
from nemo_align.planning import h100
from nemo_align.planning.estimate import Estimate, estimate, job_of
from nemo_align.planning.memory import memory_plan
from nemo_align.planning.variants import problems, variant
from nemo_align.planning.workload import segments_of

_SHOWN = 6


@dataclass(frozen=True)
class Change:
    """Keys to set, and what the stage is like with them."""

    overrides: list[str]
    estimate: Estimate


def changes_that_fit(
    stage: TrainStageConfig,
    batch_size: int,
    lengths: np.ndarray | None,
    *,
    card: float = h100.CARD_BYTES,
) -> list[Change]:
    """Changes under which the stage fits on GPUs of `card` bytes, by GPUs needed and then by throughput; nothing if no
    two keys are enough."""
    singles = list(_changes(stage))
    for tried in (([change] for change in singles), map(list, itertools.combinations(singles, 2))):
        found = []
        for changes in tried:
            keys: dict[str, Any] = {}
            for change in changes:
                if keys.keys() & change.keys():
                    break
                keys |= change
            else:
                changed = variant(stage, **keys)
                if problems(changed):
                    continue
                job = job_of(changed, batch_size, lengths)
                if memory_plan(job, card=card).fits:
                    found.append((keys, changed))
        if found:
            fitting = [
                Change(_overrides(keys, changed), estimate(changed, batch_size, lengths)) for keys, changed in found
            ]
            fitting.sort(key=lambda c: (c.estimate.job.world_size, -c.estimate.tokens_per_second_per_gpu))
            return fitting[:_SHOWN]
    return []


def _changes(stage: TrainStageConfig) -> Iterator[dict[str, Any]]:
    """Single changes that save memory, with what they drag along. The number of GPUs stays where it can."""
    parallel, train = stage.parallel, stage.train
    data = parallel.data
    assert data is not None
    if parallel.tensor > 1 and not parallel.sequence:
        yield {"parallel__sequence": True}
    if parallel.recompute != "full":
        yield {"parallel__recompute": "full"}
    if not parallel.distributed_optimizer and data > 1:
        yield {"parallel__distributed_optimizer": True}
    if stage.precision.grad_reduce_fp32 and stage.precision.dtype == "bf16":
        yield {"precision__grad_reduce_fp32": False}
    if isinstance(stage, PretrainStageConfig) or not train.packing:
        if train.micro_batch_size > 1:
            yield {"train__micro_batch_size": train.micro_batch_size // 2}
    else:
        least = (stage.data.sequence_length or 0) * segments_of(stage)
        if train.micro_batch_tokens is not None and train.micro_batch_tokens > least:
            yield {"train__micro_batch_tokens": least}
    if parallel.virtual_pipeline > 1:
        yield {"parallel__virtual_pipeline": 1}
    for tensor in (2 * parallel.tensor, 4 * parallel.tensor):
        if tensor <= h100.GPUS_PER_NODE:
            sequence = {} if parallel.sequence else {"parallel__sequence": True}
            yield {"parallel__tensor": tensor, "parallel__data": max(1, data * parallel.tensor // tensor), **sequence}
    for pipeline in _larger_divisors(stage.model.num_layers, parallel.pipeline, parallel.virtual_pipeline):
        if data * parallel.pipeline % pipeline == 0 or data == 1:
            yield {"parallel__pipeline": pipeline, "parallel__data": max(1, data * parallel.pipeline // pipeline)}
    if parallel.distributed_optimizer:
        yield {"parallel__data": 2 * data}
        yield {"parallel__data": 4 * data}


def _larger_divisors(layers: int, pipeline: int, virtual: int) -> list[int]:
    return [p for p in range(pipeline + 1, 4 * pipeline + 1) if layers % (p * virtual) == 0]


def _overrides(keys: dict[str, Any], changed: TrainStageConfig) -> list[str]:
    """As on the command line; with the new size of the job where the stage names one."""
    parallel = changed.parallel
    assert parallel.data is not None
    size = parallel.tensor * parallel.pipeline * parallel.data
    named = [f"gpus={size}"] if changed.gpus not in (None, size) else []
    return [f"{name.replace('__', '.')}={str(value).lower()}" for name, value in keys.items()] + named
