"""How long a periodic save stops training: written at once, and beside the steps, in turn on the same state.

    python tools/bench/save_blocking.py [--ranks 2] [--million 70] [--saves 4] [--folder DIR]

Real ranks on gloo, data parallel with the distributed optimizer; the state is weights, fp32 master weights and Adam's
moments. Each pair saves one state twice: blocked seconds are what the training loop waits for. Beside the steps, the
ranks go on with a matrix multiplication in place of training steps, so that the writing has something to compete with,
and agree once per round as the loop does. One save of each kind goes before and is not counted: it plans the save, and
its first pages of memory are the system's to find. Medians over the pairs; the slowest rank counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


class NoTokenizer:
    """A tokenizer has no part in this measurement."""

    def save(self, folder: Path) -> None:
        folder.mkdir()


def measure(rank: int, ranks: int, million: int, saves: int, folder: str, results) -> None:
    """One rank; rank 0 puts the figures into `results`."""
    import torch

    from nemo_align.checkpoint.saver import Saver
    from nemo_align.config.model import ModelConfig
    from nemo_align.config.runtime import ParallelConfig, PrecisionConfig, RuntimeConfig
    from nemo_align.config.training import OptimizerConfig
    from nemo_align.runtime import device, topology
    from nemo_align.runtime.agreement import gather, highest
    from nemo_align.runtime.launch_environment import LaunchEnvironment

    device.install()
    environment = LaunchEnvironment(rank, ranks, rank, ranks, f"file://{folder}/store", "local")
    parallel, precision = ParallelConfig(data=ranks), PrecisionConfig(dtype="bf16")
    grid = topology.initialize(parallel, RuntimeConfig(threads=1), environment)

    from nemo_align.model.build import build_model
    from nemo_align.training.optimizer import ScheduleLength, build_optimizer, wrap_data_parallel

    hidden, vocabulary = 512, 16_000
    per_layer = hidden * hidden * (4 + 8)  # attention and a feed-forward part of four times the width, not gated
    model = ModelConfig(
        name="bench",
        num_layers=max(1, round((million * 1e6 - 2 * vocabulary * hidden) / per_layer)),
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=8,
        num_query_groups=8,
        head_dim=64,
        vocab_size=vocabulary,
        max_sequence_length=64,
    )
    chunks = wrap_data_parallel(build_model(model, parallel, precision, grid, reward_head=None), parallel, precision)
    length = ScheduleLength(warmup=1, decay=100)
    optimizer, scheduler = build_optimizer(chunks, OptimizerConfig(lr=1e-4), parallel, precision, length)
    num_parameters = sum(parameter.numel() for parameter in chunks[0].parameters())
    saver, found = Saver(folder, grid, keep_last=1), {"at_once": [], "beside": [], "written": []}
    square = torch.randn(512, 512)
    for number in range(1, 2 * saves + 3):
        beside = number % 2 == 0
        torch.distributed.barrier()
        begin = time.perf_counter()
        saver.start(
            number,
            model_chunks=chunks,
            optimizer=optimizer,
            scheduler=scheduler,
            state={},
            verb="sft",
            model_config=model,
            reward_config=None,
            dtype="bf16",
            tokenizer=NoTokenizer(),
            final=False,
            copy=beside,
        )
        if beside:
            report = None
            while report is None:
                for _ in range(20):
                    square = torch.tanh(square @ square)
                report = saver.advance(highest(grid, [saver.status])[0])
            blocked = report.blocked_seconds
        else:
            report = saver.wait()
            blocked = time.perf_counter() - begin
        if number > 2:
            found["beside" if beside else "at_once"].append(max(gather(blocked)))
            if beside:
                found["written"].append(max(gather(report.background_seconds)))
    topology.destroy()
    if rank == 0:
        medians = {f"{name}_seconds": statistics.median(values) for name, values in found.items()}
        ratio = medians["at_once_seconds"] / medians["beside_seconds"]
        shown = {name: round(value, 3) for name, value in medians.items()}
        gigabytes = round(report.num_bytes / 1e9, 3)
        results.put({"parameters": num_parameters, "gigabytes": gigabytes, **shown, "ratio": round(ratio, 2)})


def main() -> None:
    """Start the ranks and print one line of JSON."""
    import torch.multiprocessing as processes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--million", type=int, default=70, help="parameters of the model")
    parser.add_argument("--saves", type=int, default=4, help="pairs that count")
    parser.add_argument("--folder", default=None, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="save_blocking_", dir=options.folder)
    context = processes.get_context("spawn")
    results = context.SimpleQueue()
    try:
        arguments = (options.ranks, options.million, options.saves, folder, results)
        processes.spawn(measure, arguments, nprocs=options.ranks)
        print(json.dumps({"ranks": options.ranks, "pairs": options.saves, **results.get()}))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
