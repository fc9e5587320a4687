"""`preference`: DPO, IPO and reward-aware preference optimization (arXiv 2406.11704, section 3.3.2).

The policy starts from the previous stage, which is also the reference. Its log-probabilities are computed once, before
the first step, and cached; training then holds one model.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nemo_align.config.choices import NEEDS_REWARDS
from nemo_align.config.stages import PreferenceStageConfig
from nemo_align.data.batch import Batch
from nemo_align.data.preference import tokenize_preference
from nemo_align.objectives.output import ObjectiveOutput
from nemo_align.objectives.preference import METRIC_NAMES, preference, response_log_probs
from nemo_align.runtime.signals import StopRequest
from nemo_align.runtime.topology import Topology
from nemo_align.stages.reference import reference_log_probs
from nemo_align.stages.rows import cache_directory, num_examples, row_source, tokenize_all
from nemo_align.stages.token_log_probs import token_log_probs
from nemo_align.training.run import run_training
from nemo_align.training.session import open_session
from nemo_align.training.task import Task


class PreferenceObjective:
    """A preference loss on the log-ratios of each pair, plus a weighted SFT loss on chosen; divided by the pairs."""

    metric_names = METRIC_NAMES

    def __init__(self, config: PreferenceStageConfig, topology: Topology) -> None:
        self.config = config.preference
        self.vocab_size = config.model.vocab_size
        self.topology = topology

    def __call__(self, output: Tensor, batch: Batch) -> ObjectiveOutput:
        log_probs, _ = token_log_probs(output, batch, self.topology, self.vocab_size)
        targets = batch.targets
        gap = None
        if self.config.preference_loss in NEEDS_REWARDS:
            gap = targets["chosen_reward"] - targets["rejected_reward"]
        return preference(
            response_log_probs(log_probs, batch.loss_mask, batch.segment_of_token, batch.num_examples),
            targets["reference_chosen_logps"],
            targets["reference_rejected_logps"],
            gap,
            self.config,
        )


def run(config: PreferenceStageConfig, topology: Topology, stop: StopRequest) -> Callable[[], None] | None:
    """Optimize preferences against the initial weights."""
    session = open_session(config, topology, stop)

    def tokenize(rows):
        return tokenize_preference(
            config.data,
            rows,
            session.tokenizer,
            cache_dir=cache_directory(session),
            seed=config.runtime.seed,
            preference_loss=config.preference.preference_loss,
        )

    train, validation = tokenize_all(session, tokenize)
    reference = reference_log_probs(
        session, {"train": train, **{f"validation/{name}": rows for name, rows in validation.items()}}
    )
    task = Task(
        verb="preference",
        tokenizer=session.tokenizer,
        objective=PreferenceObjective(config, topology),
        train=row_source(session, train, kind="pairs", extra_targets=reference.values["train"]),
        validation={
            name: row_source(session, rows, kind="pairs", extra_targets=reference.values[f"validation/{name}"])
            for name, rows in validation.items()
        },
        forward_only={"reference": reference.totals},
    )
    return run_training(session, task, num_examples(config, len(train)))
