"""One global batch through Megatron-core's pipeline schedules, and the sums that come out of it.

Shapes: B rows of a micro-batch, S tokens of a row, E examples of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemo_align.data.batch import Batch
from nemo_align.data.source import Step
from nemo_align.model.packed import packed_seq_params
from nemo_align.objectives.output import ObjectiveOutput
from nemo_align.runtime.topology import Topology


class Objective(Protocol):
    """What a stage learns: a function of the model's output and the batch, and the names of what it measures."""

    metric_names: tuple[str, ...]

    def __call__(self, output: Tensor, batch: Batch) -> ObjectiveOutput: ...


@dataclass
class StepOutcome:
    """Sums over the whole step, the same on every rank."""

    sums: dict[str, tuple[float, float]]  # name -> (global sum, global count)
    examples: dict[str, np.ndarray] = field(default_factory=dict)  # forward-only: per example, with "index" [E]

    @property
    def metrics(self) -> dict[str, float]:
        """Global sum / global count; a metric that nothing was counted for is absent."""
        return {name: total / count for name, (total, count) in self.sums.items() if count > 0}


def run_step(
    model_chunks: list[torch.nn.Module],
    step: Step,
    objective: Objective,
    topology: Topology,
    *,
    forward_only: bool = False,
    collect_examples: bool = False,
) -> StepOutcome:
    """Run every micro-batch of `step`, forward and (unless `forward_only`) backward.

    After it the gradients in the model are those of (sum of losses / global count), reduced over all ranks.
    `collect_examples` gathers the objective's per-example outputs from all data-parallel ranks.
    """
    outputs: list[tuple[Tensor, ObjectiveOutput]] = []

    def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        batch = next(batches).to(topology.device)
        packed = None if batch.cu_seqlens is None else packed_seq_params(batch.cu_seqlens, batch.max_seqlen)
        output = model(batch.tokens, batch.position_ids, None, packed_seq_params=packed)

        def loss(logits: Tensor) -> tuple[Tensor, Tensor, dict]:
            result = objective(logits, batch)
            outputs.append((batch.examples, _detached(result)))
            count = torch.as_tensor(result.count, device=logits.device).to(torch.int)
            return result.loss, count, {}

        return output, loss

    # Every model chunk of an interleaved schedule walks the micro-batches on its own.
    iterators = [step.micro_batches() for _ in model_chunks]
    rows = next(step.micro_batches()).tokens.shape[0] if topology.pipeline > 1 else 1
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model_chunks if len(model_chunks) > 1 else model_chunks[0],
        num_microbatches=step.plan.num_micro_batches,
        seq_length=step.plan.length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    sums = _reduce_sums(outputs, objective.metric_names, topology)
    examples = _gather_examples(outputs, topology) if collect_examples else {}
    return StepOutcome(sums=sums, examples=examples)


def _detached(result: ObjectiveOutput) -> ObjectiveOutput:
    """Without the graph, so that keeping it until the step's end holds no activations."""
    return ObjectiveOutput(loss=result.loss.detach(), count=result.count, sums=result.sums, examples=result.examples)


def _reduce_sums(
    outputs: list[tuple[Tensor, ObjectiveOutput]], metric_names: tuple[str, ...], topology: Topology
) -> dict[str, tuple[float, float]]:
    """One all-reduce over data-parallel ranks and one broadcast to the other pipeline stages per step."""
    names = ("loss", *metric_names)
    totals = torch.zeros(len(names), 2, dtype=torch.float64, device=topology.device)
    if topology.is_last_stage:
        for _, result in outputs:
            pairs = [(result.loss, result.count), *(result.sums[name] for name in metric_names)]
            for row, (total, count) in enumerate(pairs):
                totals[row, 0] += total
                totals[row, 1] += count
        if topology.data > 1:
            torch.distributed.all_reduce(totals, group=topology.data_group)
    if topology.pipeline > 1:
        _broadcast_from_last_stage(totals, topology)
    return {name: (total, count) for name, (total, count) in zip(names, totals.tolist(), strict=True)}


def _broadcast_from_last_stage(tensor: Tensor, topology: Topology) -> None:
    group = topology.pipeline_group
    torch.distributed.broadcast(tensor, src=torch.distributed.get_process_group_ranks(group)[-1], group=group)


def _gather_examples(outputs: list[tuple[Tensor, ObjectiveOutput]], topology: Topology) -> dict[str, np.ndarray]:
    """Per-example outputs of all data-parallel ranks, on every rank, in the order of the dataset."""
    gathered: list[dict[str, np.ndarray]] = [{} for _ in range(topology.data)]
    if topology.is_last_stage:
        parts = [
            {"index": index.cpu().numpy(), **{name: value.float().cpu().numpy() for name, value in r.examples.items()}}
            for index, r in outputs
            if index.numel()
        ]
        mine = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
        torch.distributed.all_gather_object(gathered, mine, group=topology.data_group)
    if topology.pipeline > 1:
        group = topology.pipeline_group
        last = torch.distributed.get_process_group_ranks(group)[-1]
        torch.distributed.broadcast_object_list(gathered, src=last, group=group)
    filled = [part for part in gathered if part]
    if not filled:
        return {}
    merged = {name: np.concatenate([part[name] for part in filled]) for name in filled[0]}
    order = np.argsort(merged["index"], kind="stable")
    return {name: values[order] for name, values in merged.items()}
