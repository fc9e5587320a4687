"""`reward`: masked mean squared error on named attributes (HelpSteer2, arXiv 2406.08673; 2406.11704, section 3.1).

A linear head in fp32 reads the hidden state of the reward token that ends each rated response.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from nemo_align.config.stages import RewardStageConfig
from nemo_align.data.batch import Batch
from nemo_align.data.regression import tokenize_regression
from nemo_align.data.source import StepSource
from nemo_align.objectives.output import ObjectiveOutput
from nemo_align.objectives.regression import metric_names, read_predictions, regression
from nemo_align.objectives.regression_metrics import regression_metrics
from nemo_align.runtime.signals import StopRequest
from nemo_align.runtime.topology import Topology
from nemo_align.stages.rows import cache_directory, num_examples, row_source, tokenize_all
from nemo_align.training.run import run_training
from nemo_align.training.session import open_session
from nemo_align.training.task import Task

logger = logging.getLogger("nemo_align")


class RegressionObjective:
    """Squared error of every given label, divided by their global number."""

    def __init__(self, attributes: list[str]) -> None:
        self.attributes = attributes
        self.metric_names = metric_names(attributes)

    def __call__(self, output: Tensor, batch: Batch) -> ObjectiveOutput:
        return regression(read_predictions(output, batch.read_positions), batch.targets["labels"], self.attributes)


def mean_labels(labels: np.ndarray) -> np.ndarray:
    """Mean label of each attribute [A] over the rows [N, A] that have it (not NaN); 0 for one that no row has."""
    given = ~np.isnan(labels)
    total = np.where(given, labels, 0).sum(axis=0, dtype=np.float64)
    return (total / np.maximum(given.sum(axis=0), 1)).astype(np.float32)


def run(config: RewardStageConfig, topology: Topology, stop: StopRequest) -> Callable[[], None] | None:
    """Train a multi-attribute reward model."""
    session = open_session(config, topology, stop, reward=config.reward, load_head=config.reward.load_head)

    def tokenize(rows):
        return tokenize_regression(
            config.data,
            rows,
            session.tokenizer,
            cache_dir=cache_directory(session),
            seed=config.runtime.seed,
            attributes=config.reward.attributes,
        )

    train, validation = tokenize_all(session, tokenize)
    training_mean = mean_labels(train.targets["labels"])
    if config.reward.head_bias and config.reward.head_bias_from_labels and not config.reward.load_head:
        logger.info("the reward head's bias starts at the mean labels %s", training_mean.round(3).tolist())
        for chunk in session.model_chunks:
            if chunk.post_process:
                chunk.reward_head.start_at(torch.from_numpy(training_mean))

    def set_metrics(examples: Mapping[str, np.ndarray], source: StepSource) -> dict[str, float]:
        labels = source.targets["labels"][examples["index"].astype(np.int64)]
        return regression_metrics(examples["predictions"], labels, config.reward.attributes, training_mean)

    task = Task(
        verb="reward",
        tokenizer=session.tokenizer,
        objective=RegressionObjective(config.reward.attributes),
        train=row_source(session, train, kind="rated responses"),
        validation={name: row_source(session, rows, kind="rated responses") for name, rows in validation.items()},
        set_metrics=set_metrics,
        reward=config.reward,
        computes_logits=False,
    )
    return run_training(session, task, num_examples(config, len(train)))
