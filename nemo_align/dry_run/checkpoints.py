"""What a run saves, when, and how many bytes that takes."""

from __future__ import annotations

import shutil
from pathlib import Path

from nemo_align.config.objectives import RewardConfig
from nemo_align.config.stages import TrainStageConfig
from nemo_align.dry_run.findings import Findings, Section, number_of_bytes
from nemo_align.model.counts import checkpoint_bytes
from nemo_align.runtime import signal_lead
from nemo_align.runtime.folders import existing_folder


def bytes_of_checkpoint(config: TrainStageConfig, reward: RewardConfig | None) -> int:
    """Bytes of one checkpoint with optimizer state: all ranks together, without tokenizer and metadata."""
    head = None if reward is None else len(reward.attributes) * (config.model.hidden_size + reward.head_bias)
    return checkpoint_bytes(config.model, config.parallel, config.precision, reward_head=head)


def periodic_saves(config: TrainStageConfig, steps: int | None) -> int:
    """Saves before the final one; where nobody said how many steps there are, as many as stay."""
    every = config.checkpoint.save_every
    if every is None:
        return 0
    return (steps - 1) // every if steps else config.checkpoint.keep_last


def most_kept(config: TrainStageConfig, steps: int | None) -> int:
    """Checkpoints that a run leaves behind. It never has more: each is written before the oldest is deleted, the final
    one beside those that stay."""
    return 1 + min(config.checkpoint.keep_last, periodic_saves(config, steps))


def section(
    config: TrainStageConfig,
    num_nodes: int,
    steps: int | None,
    reward: RewardConfig | None,
    findings: Findings,
    lead: int,
) -> Section:
    """When checkpoints are written, their size, the disk that they need at most, and the rate at which they must be
    written to be whole when the job, told to stop `lead` seconds before, comes to its time limit."""
    checkpoint, size = config.checkpoint, bytes_of_checkpoint(config, reward)
    lines = [f"{number_of_bytes(size)} each, with optimizer state, in {config.run_dir}/checkpoints"]
    if checkpoint.save_every is None:
        lines.append("at the end and on a stop signal only (checkpoint.save_every=null)")
        if num_nodes > 1:
            findings.warnings.append(
                f"checkpoint.save_every=null: the first of {num_nodes} nodes that fails costs the whole run. Set the "
                "steps between two saves"
            )
    else:
        every = checkpoint.save_every
        count = f"{periodic_saves(config, steps)} of them, " if steps else ""
        how = "beside the training steps, from a copy in host memory" if checkpoint.asynchronous else "training waits"
        lines.append(
            f"every {every:,} steps: {count}the newest {checkpoint.keep_last} stay (load under this layout, any "
            f"parallel.data); written {how}"
        )
    last = "after the last step" if steps is None else f"after step {steps:,}"
    lines.append(f"{last}: the final one stays, and loads under any layout")
    lines.append(f"disk at most {number_of_bytes(size * most_kept(config, steps))}{_free(Path(config.run_dir))}")
    lines.append(_lead_line(size, lead, checkpoint.asynchronous))
    if checkpoint.export_hf:
        lines.append(f"at the end also {config.run_dir}/hf for Hugging Face")
    return Section("checkpoints", lines)


def _lead_line(size: int, lead: int, asynchronous: bool) -> str:
    told = f"told to stop {lead} s before a time limit, a job"
    longest = signal_lead.longest_save(lead, asynchronous=asynchronous)
    if not longest:
        return f"{told} has no time to save"
    saves = ", the save in flight and one more" if asynchronous else " and a save"
    return f"{told} finishes its step{saves}: {number_of_bytes(size / longest)}/s or more, the step aside"


def _free(run_dir: Path) -> str:
    return f" (free here: {number_of_bytes(shutil.disk_usage(existing_folder(run_dir)).free)})"
