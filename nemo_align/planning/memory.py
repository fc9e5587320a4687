"""Memory of one GPU by part, for every pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass, fields

from nemo_align.planning import h100
from nemo_align.planning.activations import (
    chunk_bytes,
    output_bytes,
    recomputed_block_bytes,
    working_bytes,
)
from nemo_align.planning.job import Job
from nemo_align.planning.parameters import layer_matrices, stage_parameters
from nemo_align.planning.schedule import chunks_in_flight

# Below this part of the card left free, a plan that fits is called tight: the model's own error is of that size.
TIGHT_FRACTION = 0.05


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of one pipeline stage, at the largest moment of a training step."""

    weights: float
    gradients: float
    optimizer: float  # this rank's shard: fp32 weights and Adam's two moments
    fp8_copies: float  # of the layers' weights: as they are and transposed
    activations: float  # of the chunks in flight
    recomputed: float  # of the block that is computed again
    logits_and_loss: float
    working: float  # inside a layer, and between stages
    nccl: float
    context: float
    fragmentation: float

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    @property
    def model_states(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.fp8_copies

    @property
    def tensors(self) -> float:
        """Without what torch does not allocate for a tensor."""
        return self.total - self.context - self.nccl - self.fragmentation

    def parts(self) -> dict[str, float]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class MemoryPlan:
    """All stages, and what the card holds."""

    stages: list[StageMemory]
    card: float  # bytes
    activations_per_micro_batch: float  # kept by one micro-batch in all chunks of a middle stage
    in_flight: list[int]  # chunks, per stage
    reference_pass: float | None  # bytes of the largest stage during the forward-only pass before training

    @property
    def largest_stage(self) -> int:
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].total)

    @property
    def largest(self) -> StageMemory:
        return self.stages[self.largest_stage]

    @property
    def fits(self) -> bool:
        return self.largest.total <= self.card

    @property
    def verdict(self) -> str:
        """fits | tight | does not fit."""
        if not self.fits:
            return "does not fit"
        return "tight" if self.largest.total > (1 - TIGHT_FRACTION) * self.card else "fits"


def memory_plan(job: Job, *, reference_pass: bool = False, card: float = h100.CARD_BYTES) -> MemoryPlan:
    """Memory of every stage, on GPUs of `card` bytes. `reference_pass`: the stage computes log-probabilities of a
    reference before training."""
    pipeline = job.parallel.pipeline
    in_flight = [
        chunks_in_flight(stage, pipeline, job.parallel.virtual_pipeline, job.work.most_micro_batches)
        for stage in range(pipeline)
    ]
    stages = [_stage(job, stage, in_flight[stage]) for stage in range(pipeline)]
    return MemoryPlan(
        stages=stages,
        card=card,
        activations_per_micro_batch=job.parallel.virtual_pipeline * chunk_bytes(job),
        in_flight=in_flight,
        reference_pass=max(_forward_only(memory) for memory in stages) if reference_pass else None,
    )


def forward_only_bytes(job: Job) -> list[float]:
    """Of every stage, where nothing is trained: scoring, and the reference pass."""
    return [_forward_only(_stage(job, stage, 0)) for stage in range(job.parallel.pipeline)]


def _stage(job: Job, stage: int, in_flight: int) -> StageMemory:
    count = stage_parameters(job.model, job.parallel, stage, job.head)
    in_fp32 = job.precision.dtype == "fp32"
    gradient = 4 if in_fp32 or job.precision.grad_reduce_fp32 else 2
    shards = job.data if job.parallel.distributed_optimizer else 1
    matrices = count.total - count.head
    states = 8 * matrices if in_fp32 else 12 * matrices  # bf16 weights have an fp32 copy
    is_last = stage == job.parallel.pipeline - 1
    activations = in_flight * chunk_bytes(job)
    fp8_layers = sum(sum(job.fp8_layers(stage, chunk)) for chunk in range(job.parallel.virtual_pipeline))
    recomputed, working = recomputed_block_bytes(job), working_bytes(job)
    loss = output_bytes(job) if is_last else 0.0
    return StageMemory(
        weights=job.value_bytes * matrices + 4 * count.head,
        gradients=gradient * matrices + 4 * count.head,
        optimizer=(states + 8 * count.head) / shards,
        fp8_copies=2.0 * layer_matrices(job.model, job.parallel.tensor) * fp8_layers,
        activations=activations,
        recomputed=recomputed,
        logits_and_loss=loss,
        working=working,
        nccl=h100.NCCL_BYTES_PER_GROUP * _num_groups(job),
        context=h100.CONTEXT_BYTES,
        fragmentation=h100.FRAGMENTATION * (activations + recomputed + working + loss),
    )


def _num_groups(job: Job) -> int:
    """Communicators that a rank holds buffers for: the whole job, and each kind of parallelism with several ranks."""
    sizes = (job.world_size, job.parallel.tensor, job.parallel.pipeline, job.data)
    return sum(size > 1 for size in sizes)


def _forward_only(memory: StageMemory) -> float:
    """Nothing is kept for a backward pass; the buffers for gradients and the optimizer's state do not exist yet."""
    kept = memory.weights + memory.fp8_copies + memory.logits_and_loss + memory.nccl + memory.context
    return kept + memory.working * (1 + h100.FRAGMENTATION)
