"""`pretrain`: next token on Megatron `.bin`/`.idx` blends, in phases under one learning-rate schedule.

Continued pretraining (arXiv 2406.11704, section 2.3) is this verb started from a pretrained checkpoint with two phases:
a re-weighted blend, then one with question-answer text and weak areas, under a steeper decay.
"""

from __future__ import annotations

from collections.abc import Callable

from nemo_align.config.stages import PretrainStageConfig
from nemo_align.data.batch_schedule import BatchSchedule
from nemo_align.data.pretraining import (
    HeldOutSource,
    PretrainingPhase,
    PretrainingSource,
    check_pretraining_files,
)
from nemo_align.data.step_plan import StepLayout
from nemo_align.runtime.rank_order import rank_zero_first
from nemo_align.runtime.signals import StopRequest
from nemo_align.runtime.topology import Topology
from nemo_align.stages.language_model import LanguageModelObjective
from nemo_align.stages.rows import cache_directory
from nemo_align.training.run import run_training
from nemo_align.training.session import open_session
from nemo_align.training.step_layout import micro_batch_capacity, step_layout
from nemo_align.training.task import Task


def run(config: PretrainStageConfig, topology: Topology, stop: StopRequest) -> Callable[[], None] | None:
    """Pretrain, or continue pretraining."""
    session = open_session(config, topology, stop)
    batches = BatchSchedule(config.train, tokens_per_example=config.data.sequence_length)
    layout = pretraining_layout(config, topology)
    phases, vocab_size = phases_with_samples(config, batches), session.tokenizer.vocab_size
    cache = cache_directory(session)

    def check_files() -> None:
        check_pretraining_files(phases, config.data.validation, vocab_size, cache, contents=topology.is_main)

    rank_zero_first(topology, stop, check_files)
    train = PretrainingSource(
        phases,
        tokenizer=session.tokenizer,
        seed=config.runtime.seed,
        cache_dir=cache,
        layout=layout,
        data_rank=topology.data_rank,
    )
    validation = {
        name: HeldOutSource(
            source, tokenizer=session.tokenizer, cache_dir=cache, layout=layout, data_rank=topology.data_rank
        )
        for name, source in config.data.validation.items()
    }
    task = Task(
        verb="pretrain",
        tokenizer=session.tokenizer,
        objective=LanguageModelObjective(config.model.vocab_size, topology),
        train=train,
        validation=validation,
    )
    return run_training(session, task, train.num_examples, batches=batches)


def pretraining_layout(config: PretrainStageConfig, topology: Topology) -> StepLayout:
    """How a batch is laid out. Raises ValueError for a sequence length that the layout or precision cannot have."""
    layout = step_layout(
        config.model,
        config.parallel,
        config.precision,
        topology,
        capacity=micro_batch_capacity(config),
        packing=False,
        micro_batch_size=config.train.micro_batch_size,
    )
    if layout.capacity != config.data.sequence_length:
        raise ValueError(
            f"data.sequence_length={config.data.sequence_length} is not a multiple of {layout.pad_to}, which "
            f"parallel.sequence and precision.fp8 ask for: use {layout.capacity}"
        )
    return layout


def phases_with_samples(config: PretrainStageConfig, batches: BatchSchedule) -> list[PretrainingPhase]:
    """Samples of each phase from its steps. They follow from the config alone, whenever a run stops."""
    phases, steps, consumed = [], 0, 0
    for name, phase in config.data.phases.items():
        steps += phase.steps
        end = batches.examples_after(steps)
        phases.append(PretrainingPhase(name=name, blend=phase.blend, num_samples=end - consumed))
        consumed = end
    return phases
