"""`score`: a trained reward model writes rewards into rows. Nothing is trained.

Rewards keep full precision: the gaps between them are what reward-aware preference optimization fits.
"""

from __future__ import annotations

import logging

import numpy as np
from torch import Tensor

from nemo_align.checkpoint.agreement import on_main
from nemo_align.checkpoint.store import CheckpointReference
from nemo_align.config.data import RowsConfig
from nemo_align.config.hf_model import hf_reward_config
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.stages import ScoreStageConfig
from nemo_align.data.batch import Batch
from nemo_align.data.scoring import tokenize_scoring, write_scored_rows
from nemo_align.data.tokenized_rows import TokenizedRows
from nemo_align.objectives.output import ObjectiveOutput
from nemo_align.objectives.regression import read_predictions
from nemo_align.runtime.exit_codes import STOPPED_AFTER_SAVING
from nemo_align.runtime.rank_order import rank_zero_first
from nemo_align.runtime.signals import StopRequest
from nemo_align.runtime.topology import Topology
from nemo_align.stages.rows import cache_directory, packed_source
from nemo_align.training.forward import forward_mode, forward_steps
from nemo_align.training.forward_totals import ForwardTotals, Stopped
from nemo_align.training.metrics import MetricsWriter
from nemo_align.training.peak import peak_tflops
from nemo_align.training.progress import Progress
from nemo_align.training.result import StageResult, read_result, write_result
from nemo_align.training.session import Session, open_session, resolve_initial
from nemo_align.training.throughput import Throughput

logger = logging.getLogger("nemo_align")

# Examples of one call of the pipeline schedule: enough micro-batches to keep every stage busy.
EXAMPLES_PER_STEP = 256


class ReadScores:
    """Forward-only objective: the head's output at the reward token of each example. It has no loss."""

    metric_names = ()

    def __call__(self, output: Tensor, batch: Batch) -> ObjectiveOutput:
        predictions = read_predictions(output, batch.read_positions).detach()
        zero = predictions.new_zeros(())
        return ObjectiveOutput(loss=zero, count=zero, examples={"predictions": predictions})


def run(config: ScoreStageConfig, topology: Topology, stop: StopRequest) -> None:
    """Score every row of `inputs` and write `<run_dir>/<name>.jsonl` for each."""
    if on_main(topology, lambda: read_result(config.run_dir) is not None):
        logger.info("%s is complete already", config.experiment)
        return
    reward = reward_of(resolve_initial(config, topology))
    weights = config.weights or reward.weights
    if weights is None or set(weights) != set(reward.attributes):
        raise ValueError(
            f"weights={weights}: the reward model {config.checkpoint.init_from} scores {', '.join(reward.attributes)}; "
            "give one weight for each, such as " + " ".join(f"weights.{name}=1" for name in reward.attributes)
        )
    session = open_session(config, topology, stop, reward=reward, load_head=True)
    totals, outputs, num_examples = ForwardTotals(), {}, 0
    for name, path in config.inputs.items():
        source = RowsConfig(path=path)

        def tokenize(source: RowsConfig = source) -> TokenizedRows:
            return tokenize_scoring(
                config.data, source, session.tokenizer, cache_dir=cache_directory(session), seed=config.runtime.seed
            )

        rows = rank_zero_first(topology, tokenize)
        try:
            scores = _score(session, name, rows, totals)
        except Stopped:
            logger.info("stopped by a signal while scoring %s: it is scored again from its start", name)
            raise SystemExit(STOPPED_AFTER_SAVING) from None
        outputs[name] = f"{name}.jsonl"
        num_examples += len(rows)
        if topology.is_main:
            target = session.run_dir / outputs[name]
            written = write_scored_rows(
                target,
                source,
                rows,
                scores,
                attributes=reward.attributes,
                weights=weights,
                seed=config.runtime.seed,
            )
            logger.info("%s: %d rows scored -> %s", name, written, target)
    _write_result(session, totals, outputs, num_examples)


def reward_of(reference: CheckpointReference) -> RewardConfig:
    """Attributes, weights and head of a reward model. Raises ValueError if it is none."""
    if reference.kind == "hf":
        reward = hf_reward_config(reference.path)
    else:
        described = reference.manifest["reward"]
        reward = RewardConfig(**described) if described else None
    if reward is None:
        raise ValueError(
            f"checkpoint.init_from={reference.path} is no reward model: score needs one that nemo-align reward made"
        )
    return reward


def _score(session: Session, name: str, rows: TokenizedRows, totals: ForwardTotals) -> np.ndarray:
    """Scores [examples, attributes] in the order of the rows, on every rank."""
    config = session.config
    source = packed_source(
        session, rows, kind="responses", capacity=config.micro_batch_tokens or config.data.sequence_length
    )
    steps = -(-len(rows) // EXAMPLES_PER_STEP)
    parts = []
    progress = Progress(f"score {name}", steps, enabled=session.topology.is_main)
    with progress, forward_mode(session.model_chunks):
        outcomes = forward_steps(
            session.model_chunks,
            source.evaluation(EXAMPLES_PER_STEP),
            ReadScores(),
            session.topology,
            session.stop,
            totals,
            collect_examples=True,
        )
        for number, outcome in enumerate(outcomes, start=1):
            parts.append(outcome.examples["predictions"])
            progress.update(number)
    return np.concatenate(parts)


def _write_result(session: Session, totals: ForwardTotals, outputs: dict[str, str], num_examples: int) -> None:
    config, topology = session.config, session.topology
    peak, source = peak_tflops(config.tracking, config.precision)
    throughput = Throughput(
        config.model,
        world_size=topology.world_size,
        peak_tflops=peak,
        peak_source=source,
        with_logits=False,
    )
    rates = throughput.forward(totals)
    if not topology.is_main:
        return
    logger.info("%s", throughput.describe())
    writer = MetricsWriter(session.run_dir)
    writer.write({"kind": "forward", "name": "score", "step": 0, **rates})
    writer.close()
    write_result(
        session.run_dir,
        StageResult(
            verb="score",
            experiment=config.experiment,
            examples=num_examples,
            tokens=totals.tokens,
            seconds=session.elapsed(),
            layout=topology.layout(),
            input=config.checkpoint.init_from,
            peak_tflops=peak,
            peak_source=source,
            forward_only={"score": rates},
            outputs=outputs,
        ),
    )
