"""The one place that decides between a GPU and the CPU.

Everything else asks here, so that a machine without a GPU takes the same path through the program: Megatron-core's
own layers and schedules, with gloo in place of NCCL and `cpu_facade` answering for CUDA.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from nemo_align.runtime import cpu_facade


def use_gpu() -> bool:
    """Whether CUDA is there. The facade does not change this answer."""
    return torch.cuda.is_available()


def install() -> None:
    """Make Megatron-core usable on this machine. Call before the first Megatron import; again is free."""
    if not use_gpu():
        cpu_facade.install()


def device() -> torch.device:
    """The device of this process: its current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu() else torch.device("cpu")


def select(local_rank: int) -> torch.device:
    """Make the GPU of `local_rank` current and return its device (the CPU without a GPU).

    A process that sees a single GPU uses it whatever its local rank: SLURM may bind one GPU to each task.

    Raises:
        ValueError: there are fewer GPUs than processes on this machine.
    """
    if not use_gpu():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise ValueError(
            f"local rank {local_rank} has no GPU: this machine shows {count}. Start at most {count} processes per "
            "machine (ntasks-per-node, --nproc-per-node), or check CUDA_VISIBLE_DEVICES."
        )
    torch.cuda.set_device(local_rank if count > 1 else 0)
    return device()


def total_memory() -> int | None:
    """Bytes that torch can give on this process' GPU; None on a CPU."""
    return torch.cuda.get_device_properties(device()).total_memory if use_gpu() else None


def peak_memory_gib() -> float | None:
    """GiB that tensors of this process held at most on its GPU so far (caches not counted); None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if use_gpu() else None


def backend() -> str:
    """The backend of torch.distributed for `device()`."""
    return "nccl" if use_gpu() else "gloo"


def accelerator_name() -> str:
    """Name of the GPU, or of the processor: it goes into reports beside the measured speed."""
    return torch.cuda.get_device_name() if use_gpu() else _processor_name()


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux: platform.processor() is empty or only the architecture there
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
