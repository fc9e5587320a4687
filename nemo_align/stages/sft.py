"""`sft`: next token on assistant turns only (arXiv 2406.11704, section 3.3.1).

Code SFT and General SFT are two runs of this verb, the second starting from the checkpoint of the first.
"""

from __future__ import annotations

from collections.abc import Callable

from nemo_align.config.stages import SftStageConfig
from nemo_align.data.sft import tokenize_sft
from nemo_align.runtime.signals import StopRequest
from nemo_align.runtime.topology import Topology
from nemo_align.stages.language_model import LanguageModelObjective
from nemo_align.stages.rows import cache_directory, num_examples, row_source, tokenize_all
from nemo_align.training.run import run_training
from nemo_align.training.session import open_session
from nemo_align.training.task import Task


def run(config: SftStageConfig, topology: Topology, stop: StopRequest) -> Callable[[], None] | None:
    """Fine-tune on dialogues."""
    session = open_session(config, topology, stop)

    def tokenize(rows):
        return tokenize_sft(
            config.data, rows, session.tokenizer, cache_dir=cache_directory(session), seed=config.runtime.seed
        )

    train, validation = tokenize_all(session, tokenize)
    task = Task(
        verb="sft",
        tokenizer=session.tokenizer,
        objective=LanguageModelObjective(config.model.vocab_size, topology),
        train=row_source(session, train, kind="dialogues"),
        validation={name: row_source(session, rows, kind="dialogues") for name, rows in validation.items()},
    )
    return run_training(session, task, num_examples(config, len(train)))
