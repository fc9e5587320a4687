"""`score`: a trained reward model writes rewards into rows. Nothing is trained.

Rewards keep full precision: the gaps between them are what reward-aware preference optimization fits.
"""

from __future__ import annotations

import logging

import numpy as np
from torch import Tensor

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
from nemo_align.runtime.agreement import on_main
from nemo_align.runtime.exit_codes import STOPPED_AFTER_SAVING
from nemo_align.runtime.rank_order import rank_zero_first
from nemo_align.runtime.signals import StopRequest
from nemo_align.runtime.topology import Topology
from nemo_align.stages.rows import cache_directory, packed_source
from nemo_align.training.cached_pass import compute_missing, open_cache
from nemo_align.training.example_cache import ExampleCache
from nemo_align.training.forward_totals import ForwardTotals, Stopped
from nemo_align.training.metrics import MetricsWriter
from nemo_align.training.peak import peak_tflops
from nemo_align.training.result import StageResult, read_result, write_result
from nemo_align.training.session import Session, open_session, resolve_initial
from nemo_align.training.step_layout import micro_batch_capacity
from nemo_align.training.throughput import Throughput

logger = logging.getLogger("nemo_align")

# Examples of one call of the pipeline schedule: enough micro-batches to keep every stage busy.
EXAMPLES_PER_STEP = 256


class ReadScores:
    """Forward-only objective: the head's output at the reward token of each example. It has no loss."""

    metric_names = ()

    def __init__(self, names: tuple[str, ...]) -> None:
        """`names`: one for each output of the head."""
        self.names = names

    def __call__(self, output: Tensor, batch: Batch) -> ObjectiveOutput:
        predictions = read_predictions(output, batch.read_positions).detach()
        zero = predictions.new_zeros(())
        examples = dict(zip(self.names, predictions.unbind(dim=1), strict=True))
        return ObjectiveOutput(loss=zero, count=zero, examples=examples)


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
    names = tuple(f"score_{number}" for number in range(len(reward.attributes)))
    cache = open_cache(session, cache_directory(session), kind="scores", names=names)
    totals, outputs, num_examples, num_tokens = ForwardTotals(), {}, 0, 0
    for name, path in config.inputs.items():
        source = RowsConfig(path=path)

        def tokenize(source: RowsConfig = source) -> TokenizedRows:
            return tokenize_scoring(
                config.data, source, session.tokenizer, cache_dir=cache_directory(session), seed=config.runtime.seed
            )

        rows = rank_zero_first(topology, stop, tokenize)
        try:
            scores = _score(session, name, rows, cache, totals)
        except Stopped:
            logger.info("stopped by a signal while scoring %s: what was scored is cached", name)
            raise SystemExit(STOPPED_AFTER_SAVING) from None
        outputs[name] = f"{name}.jsonl"
        num_examples += len(rows)
        num_tokens += int(rows.lengths.sum())
        target = session.run_dir / outputs[name]

        def write(source=source, rows=rows, scores=scores, target=target, name=name) -> None:
            if topology.is_main:
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

        rank_zero_first(topology, stop, write)  # a failure here must reach the ranks that would go on
    _write_result(session, totals, outputs, num_examples, num_tokens)


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


def _score(session: Session, name: str, rows: TokenizedRows, cache: ExampleCache, totals: ForwardTotals) -> np.ndarray:
    """Scores [examples, attributes] in the order of the rows, on every rank."""
    config = session.config
    source = packed_source(session, rows, kind="responses", capacity=micro_batch_capacity(config))
    steps = source.evaluation(EXAMPLES_PER_STEP)
    compute_missing(session, f"score {name}", rows, steps, ReadScores(cache.names), cache, totals)
    columns = cache.columns(rows.example_fingerprint(index) for index in range(len(rows)))
    return np.stack([columns[name] for name in cache.names], axis=1)


def _write_result(
    session: Session, totals: ForwardTotals, outputs: dict[str, str], num_examples: int, num_tokens: int
) -> None:
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
            tokens=num_tokens,
            seconds=session.elapsed(),
            layout=topology.layout(),
            input=config.checkpoint.init_from,
            peak_tflops=peak,
            peak_source=source,
            forward_only={"score": rates},
            outputs=outputs,
        ),
    )
