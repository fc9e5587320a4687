"""Where a run would run and go: its layout, its run directory, the weights that it starts from."""

from __future__ import annotations

from pathlib import Path

from nemo_align.checkpoint import store
from nemo_align.checkpoint.layout import refuse_layout
from nemo_align.config import run_directory
from nemo_align.config.compose import to_yaml
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.config.stages import TrainStageConfig, WorkerConfig
from nemo_align.dry_run.findings import Findings, Section
from nemo_align.runtime.topology import Topology
from nemo_align.training.result import read_result

GPUS_PER_NODE = 8


def num_nodes(parallel: ParallelConfig) -> int:
    """Nodes of 8 GPUs that the job takes."""
    assert parallel.data is not None
    return -(-parallel.tensor * parallel.pipeline * parallel.data // GPUS_PER_NODE)


def first_gpu(parallel: ParallelConfig) -> Topology:
    """The place of rank 0 of the job, on a GPU: what the layout of a step depends on is the same on all ranks."""
    import torch

    assert parallel.data is not None
    return Topology(
        world_size=parallel.tensor * parallel.pipeline * parallel.data,
        rank=0,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        data=parallel.data,
        sequence=parallel.sequence and parallel.tensor > 1,
        tensor_rank=0,
        pipeline_rank=0,
        data_rank=0,
        device=torch.device("cuda"),
    )


def run_directory_line(verb: str, config: WorkerConfig, parallel: ParallelConfig) -> str:
    """Whether the run is new, resumes, or is complete.

    Raises:
        ConfigError: the directory belongs to another run, or the layout cannot resume from what is there.
    """
    run_dir = Path(config.run_dir)
    path = run_dir / run_directory.CONFIG_FILE
    if not path.exists():
        return f"run directory {run_dir}: new"
    run_directory.refuse_other(verb, path, to_yaml(config), run_directory.may_change(verb, config))
    refuse_layout(run_dir, parallel)
    if read_result(run_dir) is not None:
        return f"run directory {run_dir}: complete already, the command would do nothing"
    newest = next(iter(store.candidates(run_dir)), None)
    return f"run directory {run_dir}: resumes from {'the start' if newest is None else newest.name}"


def layout_lines(parallel: ParallelConfig, precision: PrecisionConfig, training: bool) -> list[str]:
    """World size, layout and number formats in words."""
    assert parallel.data is not None
    size = parallel.tensor * parallel.pipeline * parallel.data
    nodes, rest = divmod(size, GPUS_PER_NODE)
    shown = "" if rest else f", {nodes} node{'s' * (nodes > 1)} of {GPUS_PER_NODE}"
    yes = [
        text
        for text, on in (
            ("sequence parallel", parallel.sequence),
            ("distributed optimizer", training and parallel.distributed_optimizer),
            ("gradients reduced during the backward pass", training and parallel.overlap_grad_reduce),
            ("parameters gathered during the forward pass", training and parallel.overlap_param_gather),
            ("tensor-parallel communication beside the products", parallel.overlap_tensor),
        )
        if on
    ]
    recompute = {
        "none": "activations kept",
        "selective": "core attention recomputed",
        "full": f"layers recomputed, {parallel.recompute_layers} at a time",
        "block": f"{parallel.recompute_layers} layers of each chunk recomputed",
    }[parallel.recompute]
    chunks = f" in {parallel.virtual_pipeline} interleaved chunks" if parallel.virtual_pipeline > 1 else ""
    lines = [
        f"{size} processes{shown}: tensor {parallel.tensor} x pipeline {parallel.pipeline}{chunks} x data "
        f"{parallel.data}"
    ]
    reduced = "fp32" if precision.grad_reduce_fp32 or precision.dtype == "fp32" else "bf16"
    weights = f"weights in {precision.dtype}"
    lines.append(", ".join([*yes, recompute, weights, f"gradients in {reduced}"] if training else [*yes, weights]))
    if precision.fp8 != "none":
        lines.append(
            f"matrix products in FP8 ({precision.fp8}): checked as configuration only, its layers need a GPU with "
            "Transformer Engine"
        )
    return lines


def initial_line(config: WorkerConfig, findings: Findings) -> str:
    """The weights that the run starts from."""
    init_from = config.checkpoint.init_from
    if init_from is None:
        return f"initial weights: random, seed {config.runtime.seed}"
    if not Path(init_from).exists():
        findings.is_absent("checkpoint.init_from", init_from)
    carried = isinstance(config, TrainStageConfig) and config.checkpoint.load_optimizer
    return f"initial weights: {init_from}{', with its optimizer state' if carried else ''}"


def section(verb: str, config: WorkerConfig, parallel: ParallelConfig, findings: Findings) -> Section:
    """Run directory, layout, precision, initial weights."""
    lines = layout_lines(parallel, config.precision, isinstance(config, TrainStageConfig))
    lines.append(initial_line(config, findings))
    with findings.collecting():
        lines.append(run_directory_line(verb, config, parallel))
    return Section("run", lines)
