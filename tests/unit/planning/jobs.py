"""Jobs that several tests of this room share."""

from __future__ import annotations

from typing import Any

from nemo_align.config.model import ModelConfig
from nemo_align.config.model_file import read_model
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.planning.estimate import Estimate
from nemo_align.planning.job import Job, StepWork
from nemo_align.planning.memory import memory_plan
from nemo_align.planning.step_time import step_time

PAPER = {"tensor": 8, "pipeline": 12, "virtual_pipeline": 8, "sequence": True, "overlap_grad_reduce": True}


def job(
    batch: int = 768,
    *,
    model: str | ModelConfig = "nemotron4_340b",
    rows: int = 1,
    length: int = 4096,
    precision: PrecisionConfig | None = None,
    **layout: Any,
) -> Job:
    """A pretraining step; by default of the report's 340B on 1,536 GPUs."""
    parallel = ParallelConfig(**{**PAPER, "data": 16, **layout})
    assert parallel.data is not None
    work = StepWork(
        examples=batch,
        micro_batches=batch // parallel.data // rows,
        tokens=rows * length,
        squared_tokens=rows * length**2,
        real_tokens=batch * length,
        real_squared_tokens=batch * length**2,
        rows=rows,
    )
    return Job(
        model=read_model(model) if isinstance(model, str) else model,
        parallel=parallel,
        precision=precision or PrecisionConfig(),
        work=work,
    )


def estimate(*arguments: Any, **keywords: Any) -> Estimate:
    """Memory and time of `job(...)`."""
    planned = job(*arguments, **keywords)
    return Estimate(planned, memory_plan(planned), step_time(planned))
