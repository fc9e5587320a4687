"""A plan for machines: plain numbers, seconds and bytes, fractions between 0 and 1."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from nemo_align.planning.estimate import Estimate
from nemo_align.planning.parameters import stage_chunks, total_parameters
from nemo_align.planning.result import PlanResult, SearchResult
from nemo_align.planning.scaling import ScalingRow


def write(path: str, content: dict[str, Any]) -> None:
    """One JSON object.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"json={path} cannot be written: {error.strerror}") from None


def of_plan(result: PlanResult) -> dict[str, Any]:
    """Everything that the report shows, and the stages that it leaves out."""
    main, job = result.main, result.main.job
    stages = [
        {
            "chunks": [dataclasses.asdict(chunk) | {"total": chunk.total} for chunk in _chunks(result, stage)],
            "counted": None if result.counted is None else result.counted[stage],
            "memory": memory.parts() | {"total": memory.total},
            "chunks_in_flight": main.memory.in_flight[stage],
        }
        for stage, memory in enumerate(main.memory.stages)
    ]
    return {
        "verb": result.planned.verb,
        "experiment": result.planned.stage.experiment,
        "model": job.model.name,
        "gpus": job.world_size,
        "parameters": total_parameters(job.model, job.parallel, job.head),
        "stages": stages,
        "batches": [
            {"global_batch_size": batches.size, "steps": batches.steps} | of_estimate(estimate)
            for batches, estimate in zip(result.length.batches, result.estimates, strict=True)
        ],
        "total": None
        if result.total is None
        else dataclasses.asdict(result.total) | {"seconds": result.total.seconds, "gpu_hours": result.total.gpu_hours},
        "checkpoint": dataclasses.asdict(result.checkpoint),
        "signal_lead_seconds": result.signal_lead_seconds,
        "changes_that_fit": [
            {"overrides": change.overrides} | of_estimate(change.estimate) for change in result.changes
        ],
        "scaling": None
        if result.scaling is None
        else {
            "weak": [_row(row) for row in result.scaling.weak],
            "strong": [_row(row) for row in result.scaling.strong],
        },
        "assumptions": [result.length.assumption] if result.length.assumption else [],
        "overlong": result.length.overlong,
        "stand_ins": result.planned.stand_ins,
    }


def of_search(result: SearchResult) -> dict[str, Any]:
    return {
        "verb": result.planned.verb,
        "model": result.planned.stage.model.name,
        "gpus": result.planned.plan.gpus,
        "tried": result.found.tried,
        "fitting": result.found.fitting,
        "assumptions": [result.length.assumption] if result.length.assumption else [],
        "overlong": result.length.overlong,
        "layouts": [of_estimate(estimate) for estimate in result.found.best],
    }


def of_estimate(estimate: Estimate) -> dict[str, Any]:
    """Layout, memory of the largest stage, time and rates."""
    job, memory = estimate.job, estimate.memory
    return {
        "layout": {
            "tensor": job.parallel.tensor,
            "pipeline": job.parallel.pipeline,
            "virtual_pipeline": job.parallel.virtual_pipeline,
            "data": job.data,
            "sequence": job.parallel.sequence,
            "recompute": job.parallel.recompute,
            "tokens_of_a_micro_batch": job.work.tokens,
            "micro_batches": job.work.micro_batches,
        },
        "gpus": job.world_size,
        "memory": {
            "largest_stage": memory.largest_stage,
            "bytes": memory.largest.total,
            "card_bytes": memory.card,
            "verdict": memory.verdict,
            "activations_per_micro_batch": memory.activations_per_micro_batch,
            "reference_pass_bytes": memory.reference_pass,
        },
        "step": dataclasses.asdict(estimate.time) | {"total": estimate.time.total},
        "tokens_per_second_per_gpu": estimate.tokens_per_second_per_gpu,
        "model_tflops_per_gpu": estimate.model_tflops_per_gpu,
        "mfu": estimate.mfu,
        "mfu_causal": estimate.mfu_causal,
        "peak_tflops": estimate.peak_tflops,
        "padding_fraction": estimate.padding_fraction,
    }


def _chunks(result: PlanResult, stage: int) -> list:
    job = result.main.job
    return stage_chunks(job.model, job.parallel, stage, job.head)


def _row(row: ScalingRow) -> dict[str, Any]:
    found = {"gpus": row.gpus, "global_batch_size": row.batch_size}
    return found | (of_estimate(row.estimate) if row.estimate is not None else {"layout": None})
