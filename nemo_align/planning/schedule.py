"""Megatron-core's pipeline schedules: what each rank does in which order, what it holds, and how long a step takes.

1F1B (`virtual_pipeline` 1) and the interleaved schedule (arXiv 2104.04473, section 2.2). The order of forward and
backward passes is that of `megatron.core.pipeline_parallel.schedules`; the time is that of the slowest chain through
it, found by walking through the order, so uneven stages (the output projection on the last) need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Operation = tuple[bool, int, int]  # (is a backward pass, chunk, micro-batch)


def warmup_passes(stage: int, pipeline: int, virtual: int, micro_batches: int) -> int:
    """Forward passes of chunks before the first backward pass, without the one that comes just before it."""
    if virtual == 1:
        return min(pipeline - stage - 1, micro_batches)
    return min(2 * (pipeline - stage - 1) + (virtual - 1) * pipeline, micro_batches * virtual)


def chunks_in_flight(stage: int, pipeline: int, virtual: int, micro_batches: int) -> int:
    """The most forward passes of a chunk whose activations a rank holds at one time."""
    return min(warmup_passes(stage, pipeline, virtual, micro_batches) + 1, micro_batches * virtual)


def order(stage: int, pipeline: int, virtual: int, micro_batches: int) -> list[Operation]:
    """The passes of one stage in order. Interleaved: groups of `pipeline` micro-batches go chunk after chunk."""
    forwards = [
        (chunk, micro_batch)
        for start in range(0, micro_batches, pipeline)
        for chunk in range(virtual)
        for micro_batch in range(start, min(start + pipeline, micro_batches))
    ]
    backwards = [
        (virtual - 1 - chunk, micro_batch)
        for start in range(0, micro_batches, pipeline)
        for chunk in range(virtual)
        for micro_batch in range(start, min(start + pipeline, micro_batches))
    ]
    if virtual == 1:
        forwards = backwards = [(0, micro_batch) for micro_batch in range(micro_batches)]
    warmup = warmup_passes(stage, pipeline, virtual, micro_batches)
    passes: list[Operation] = [(False, *forward) for forward in forwards[:warmup]]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        passes += [(False, *forward), (True, *backward)]
    return passes + [(True, *backward) for backward in backwards[len(forwards) - warmup :]]


@dataclass(frozen=True)
class PassSeconds:
    """Seconds of each pass: [stage][chunk]."""

    forward: Sequence[Sequence[float]]
    backward: Sequence[Sequence[float]]

    def busy(self, stage: int) -> float:
        """Of one micro-batch through all chunks of a stage."""
        return sum(self.forward[stage]) + sum(self.backward[stage])


# Micro-batches that are walked through one by one: further ones each add what the slowest stage takes.
_WALKED_ROUNDS = 3


def step_seconds(times: PassSeconds, micro_batches: int, transfer_seconds: float, *, beside: bool) -> float:
    """From the first forward pass to the last backward pass.

    `transfer_seconds`: from the end of a pass to the moment where the neighbour can use its result. `beside`: transfers
    run beside the passes and only delay what needs them, as an interleaved schedule can; else, as in 1F1B, the two
    ranks send and receive between their passes and wait for it.
    """
    pipeline, virtual = len(times.forward), len(times.forward[0])
    walked = min(micro_batches, _WALKED_ROUNDS * pipeline) if pipeline > 1 else 1
    slowest = max(times.busy(stage) for stage in range(pipeline))
    blocking = transfer_seconds if pipeline > 1 and not beside else 0.0
    rest = (micro_batches - walked) * (slowest + 2 * virtual * blocking)
    return _walk(times, walked, transfer_seconds, blocking) + rest


def _walk(times: PassSeconds, micro_batches: int, transfer: float, blocking: float) -> float:
    pipeline, virtual = len(times.forward), len(times.forward[0])
    orders = [order(stage, pipeline, virtual, micro_batches) for stage in range(pipeline)]
    position, clock = [0] * pipeline, [0.0] * pipeline
    done: dict[tuple[bool, int, int, int], float] = {}  # (backward, stage, chunk, micro-batch) -> end
    last_stage, last_chunk = pipeline - 1, virtual - 1
    waiting = True
    while waiting:
        waiting, moved = False, False
        for stage in range(pipeline):
            passes = orders[stage]
            while position[stage] < len(passes):
                backward, chunk, micro_batch = passes[position[stage]]
                if not backward:
                    if stage > 0:
                        needed = (False, stage - 1, chunk, micro_batch)
                    elif chunk > 0:
                        needed = (False, last_stage, chunk - 1, micro_batch)
                    else:
                        needed = None
                elif stage < last_stage:
                    needed = (True, stage + 1, chunk, micro_batch)
                elif chunk < last_chunk:
                    needed = (True, 0, chunk + 1, micro_batch)
                else:
                    needed = (False, stage, chunk, micro_batch)
                start = clock[stage]
                if needed is not None:
                    if needed not in done:
                        waiting = True
                        break
                    delay = 0.0 if needed[1] == stage else transfer
                    start = max(start, done[needed] + delay)
                seconds = (times.backward if backward else times.forward)[stage][chunk]
                clock[stage] = start + seconds + blocking
                done[(backward, stage, chunk, micro_batch)] = start + seconds
                position[stage] += 1
                moved = True
        assert moved or not waiting, "the order of passes has a cycle"
    return max(clock)
