"""One stage from its initial weights to its result: the last lines of every training verb."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from nemo_align.checkpoint.store import checkpoint_path
from nemo_align.data.batch_schedule import BatchSchedule
from nemo_align.runtime import watchdog
from nemo_align.training.loop import Trainer
from nemo_align.training.result import RESULT_FILE, read_result, write_result
from nemo_align.training.session import Session
from nemo_align.training.task import Task

logger = logging.getLogger("nemo_align")

HF_FOLDER = "hf"


def run_training(
    session: Session, task: Task, num_examples: int, *, batches: BatchSchedule | None = None
) -> Callable[[], None] | None:
    """Train on `num_examples` examples, save and write result.json.

    Returns what rank 0 has to do once it has left the process groups (the export, if asked for): the others would wait
    for it in a collective with a timeout, and an export of a large model takes longer.

    `batches`: the batch schedule when it has a ramp; by default every batch has `train.global_batch_size` examples.
    """
    config = session.config
    trainer = Trainer(session, task, batches or BatchSchedule(config.train), num_examples)
    logger.info(
        "%s: %d %s, %d steps of %d, layout %s",
        config.experiment,
        num_examples,
        task.train.kind,
        trainer.num_steps,
        config.train.global_batch_size,
        session.topology.layout(),
    )
    validation = trainer.run()
    if validation is None:
        logger.info("%s is complete already: %s", config.experiment, session.run_dir / RESULT_FILE)
    else:
        trainer.telemetry.finish(validation, trainer.validation_totals)
    if config.checkpoint.export_hf and session.topology.is_main:
        return partial(_export, session.run_dir, trainer.state.step)
    return None


def _export(run_dir: Path, step: int) -> None:
    """Write <run_dir>/hf unless it is there. After result.json, whose metrics the model card shows."""
    result = read_result(run_dir)
    assert result is not None, "written when the training ended"
    if result.hf is not None:
        return
    from nemo_align.checkpoint.conversion.convert import export_hf  # not needed by most runs

    # An earlier process may have died between the export and the next line.
    # Its files were hashed when it was saved.
    export_hf(checkpoint_path(run_dir, step), run_dir / HF_FOLDER, overwrite=True, verify=False, beat=watchdog.beat)
    write_result(run_dir, replace(result, hf=HF_FOLDER))
