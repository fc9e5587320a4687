"""`dry_run=true`: checks a run as far as it goes without GPU, other ranks and data, and says what it would do.

The parts are those of the real run: its configuration, ranks built by its own code in the world they would be in, its
batch and learning-rate schedules, its files where they are here, its checkpoints.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from nemo_align.config import build
from nemo_align.config.data import RowsConfig
from nemo_align.config.errors import ConfigError
from nemo_align.config.job_size import job_layout
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.runtime import ParallelConfig
from nemo_align.config.stages import (
    PretrainStageConfig,
    RewardStageConfig,
    ScoreStageConfig,
    TrainStageConfig,
    WorkerConfig,
)
from nemo_align.data.batch_schedule import BatchSchedule
from nemo_align.data.tokenizer import Tokenizer
from nemo_align.dry_run import blends, checkpoints, place, ranks, rows, steps
from nemo_align.dry_run.findings import Findings, Section
from nemo_align.model.counts import count_parameters
from nemo_align.runtime import device, signal_lead
from nemo_align.stages.pretrain import phases_with_samples, pretraining_layout
from nemo_align.stages.rows import num_examples as examples_of
from nemo_align.stages.score import EXAMPLES_PER_STEP
from nemo_align.training.schedule_length import num_steps
from nemo_align.training.session import tokenizer_of
from nemo_align.training.step_layout import micro_batch_capacity, step_layout

device.install()  # before the imports of Megatron-core that the first rank makes

# What an example of a verb is called.
EXAMPLES = {"sft": "dialogues", "reward": "rated responses", "preference": "pairs"}


def dry_run(
    verb: str,
    config: WorkerConfig,
    *,
    launched: int | None = None,
    written_before: Path | None = None,
    lead: int | None = None,
) -> str:
    """What the run would do, as text.

    `launched`: processes of the job that this process belongs to, if any; `written_before`: folder in which the earlier
    stages of a pipeline will have written what this one reads; `lead`: seconds before its time limit at which the job
    is told to stop, unless the environment says.

    Raises:
        ConfigError: why the run would be refused; with dry_run_strict also what is not on this machine.
    """
    findings = Findings()
    if build.missing_keys(config.model):
        raise ConfigError(
            f"the model is that of checkpoint.init_from={config.checkpoint.init_from}, which is not on this machine: "
            "name it for the dry run, model=<name>"
        )
    parallel = job_layout(config, launched)
    reward = _reward(config)
    count = count_parameters(config.model)
    sections = [
        Section(
            f"{config.experiment}: {verb} of {config.model.name}, "
            f"{count.total - (0 if reward is None else count.output):,} parameters",
            [],
        ),
        place.section(verb, config, parallel, findings),
    ]
    with findings.collecting():
        chosen = ranks.chosen_ranks(config.dry_run_ranks, parallel)
        built = [
            ranks.build_rank(config.model, parallel, config.precision, rank=rank, reward=reward) for rank in chosen
        ]
        training = isinstance(config, TrainStageConfig)
        sections.append(ranks.section(built, parallel, config.precision, findings, training))
    with findings.collecting():
        sections += _work(verb, config, parallel, reward, findings, signal_lead.configured() if lead is None else lead)
    if config.dry_run_strict:
        findings.problems += [f"{keys[0]}={path} is not on this machine" for path, keys in findings.absent.items()]
    if findings.problems:
        raise ConfigError.of(f"{config.experiment}: {problem}" for problem in findings.problems)
    sections += _closing(config, findings, written_before)
    return "\n".join(map(str, sections)) + "\n"


def _work(
    verb: str,
    config: WorkerConfig,
    parallel: ParallelConfig,
    reward: RewardConfig | None,
    findings: Findings,
    lead: int,
) -> list[Section]:
    """Data, steps, learning rate and checkpoints."""
    if isinstance(config, ScoreStageConfig):
        return [_inputs(config, findings)]
    assert isinstance(config, TrainStageConfig)
    if isinstance(config, PretrainStageConfig):
        sections, batches, num_examples = _pretraining(config, parallel, findings)
    else:
        sections, batches, num_examples = _rows(verb, config, parallel, findings)
    with findings.collecting():
        marks = _phase_starts(config) if isinstance(config, PretrainStageConfig) else []
        sections.append(steps.learning_rate_section(config, batches, num_examples, marks))
    total = None if num_examples is None else num_steps(config.train, batches, num_examples)
    sections.append(checkpoints.section(config, place.num_nodes(parallel), total, reward, findings, lead))
    return sections


def _pretraining(
    config: PretrainStageConfig, parallel: ParallelConfig, findings: Findings
) -> tuple[list[Section], BatchSchedule, int]:
    batches = BatchSchedule(config.train, tokens_per_example=config.data.sequence_length)
    with findings.collecting():
        pretraining_layout(config, place.first_gpu(parallel))
    phases = phases_with_samples(config, batches)
    num_samples = sum(phase.num_samples for phase in phases)
    with findings.collecting():
        _tokenizer(config, findings)
    sections = [
        blends.section(config, phases, findings),
        steps.pretraining_section(config, batches, num_samples, parallel),
    ]
    return sections, batches, num_samples


def _phase_starts(config: PretrainStageConfig) -> list[int]:
    """First step (1 = first) of every phase but the first."""
    ends = itertools.accumulate(phase.steps for phase in config.data.phases.values())
    return [end + 1 for end in ends][:-1]


def _rows(
    verb: str, config: TrainStageConfig, parallel: ParallelConfig, findings: Findings
) -> tuple[list[Section], BatchSchedule, int | None]:
    kind = EXAMPLES[verb]
    batches = BatchSchedule(config.train)
    layout = step_layout(
        config.model,
        parallel,
        config.precision,
        place.first_gpu(parallel),
        capacity=micro_batch_capacity(config),
        packing=config.train.packing,
        micro_batch_size=config.train.micro_batch_size,
    )
    counts = rows.count_sources("data.train.{}.path", config.data.train, findings)
    held_out = rows.count_sources("data.validation.{}.path", config.data.validation, findings)
    data = [f"{name}: {_count(count)} ({config.data.train[name].path})" for name, count in counts.items()]
    for name, count in held_out.items():
        data.append(f"held out: {name}: {_count(count)} ({config.data.validation[name].path})")
    complete = None not in counts.values()
    available = sum(count.rows for count in counts.values() if count is not None)
    sample = None
    with findings.collecting():
        tokenizer = _tokenizer(config, findings)
        if complete and tokenizer is not None:
            sample = rows.sample_step(config, tokenizer, layout)
            data.append(_sampled(sample, kind, findings))
    if not complete and config.dry_run_rows is not None:
        data.append(f"reckoned with: {config.dry_run_rows:,} {kind} to train on (dry_run_rows)")
    per_epoch = available if complete else config.dry_run_rows
    known = per_epoch is not None or config.train.epochs is None
    num_examples = examples_of(config, per_epoch or 0) if known else None
    if verb == "preference":
        data.append("before the first step: one forward-only pass over all pairs, for the reference log-probabilities")
    plan = None if sample is None else sample.step
    sections = [
        Section("data", data),
        steps.rows_section(config, batches, num_examples, layout, parallel, kind, plan),
    ]
    return sections, batches, num_examples


def _inputs(config: ScoreStageConfig, findings: Findings) -> Section:
    with findings.collecting():
        _tokenizer(config, findings)
    sources = {name: RowsConfig(path=path) for name, path in config.inputs.items()}
    lines = []
    for name, count in rows.count_sources("inputs.{}", sources, findings).items():
        lines.append(f"{name}: {_count(count)} ({config.inputs[name]}) -> {config.run_dir}/{name}.jsonl")
    tokens = config.micro_batch_tokens or config.data.sequence_length
    lines.append(f"{EXAMPLES_PER_STEP} responses at a time, micro-batches of {tokens:,} tokens")
    return Section("scores", lines)


def _tokenizer(config: WorkerConfig, findings: Findings) -> Tokenizer | None:
    """The tokenizer, None if it is not on this machine."""
    path = config.data.tokenizer
    if path is None or not Path(path).exists():
        if path is not None:
            findings.is_absent("data.tokenizer", path)
        return None
    return tokenizer_of(config)


def _sampled(sample: rows.Sample | None, kind: str, findings: Findings) -> str:
    if sample is None:
        findings.warnings.append("of the first rows none is left to train on: look at data.select and data.overlong")
        return "of the first rows none is left"
    return (
        f"the first {sample.num_rows} rows give {sample.kept} {kind} of {sample.mean_tokens:,.0f} tokens on average, "
        f"{sample.longest:,} at most"
    )


def _count(count: rows.RowCount | None) -> str:
    return "not on this machine" if count is None else str(count)


def _reward(config: WorkerConfig) -> RewardConfig | None:
    """The reward head that the stage trains or reads; HelpSteer2's where its checkpoint is not here to say."""
    if isinstance(config, RewardStageConfig):
        return config.reward
    if not isinstance(config, ScoreStageConfig):
        return None
    return RewardConfig(attributes=list(config.weights)) if config.weights else RewardConfig()


def _closing(config: WorkerConfig, findings: Findings, written_before: Path | None) -> list[Section]:
    sections = []
    lines = [
        f"{path} ({keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''})"
        for path, keys in findings.absent.items()
        if written_before is None or not Path(path).is_relative_to(written_before)
    ]
    if lines:
        root = config.data.root
        if not Path(root).exists() and any(Path(path).is_relative_to(root) for path in findings.absent):
            lines.append(f"data.root={root} does not exist: data.root=<folder> moves all files below it")
        sections.append(Section("not on this machine (dry_run_strict=true refuses this)", lines))
    if findings.warnings:
        sections.append(Section("warnings", findings.warnings))
    return sections
