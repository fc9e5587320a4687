"""The peak rate that MFU is measured against: the datasheet's dense figure, or on a CPU what it really multiplies."""

from __future__ import annotations

import time

import torch

from nemo_align.config.runtime import PrecisionConfig
from nemo_align.config.training import TrackingConfig
from nemo_align.runtime.device import accelerator_name, use_gpu

# Dense TFLOP/s per GPU from NVIDIA's datasheets, which often print twice that (with structured sparsity). The first
# name that occurs in the device's name counts, so a longer one stands before one that it contains (GB200 before B200).
# fp32 is the rate without TF32, which Megatron-core does not switch on.
DATASHEET_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB200", {"bf16": 2450, "fp8": 4900}),  # as NVIDIA's own recipes count it
    ("B200", {"bf16": 2250, "fp8": 4500}),
    ("GH200", {"bf16": 989, "fp8": 1979, "fp32": 67}),
    ("H200", {"bf16": 989, "fp8": 1979, "fp32": 67}),
    ("H100 NVL", {"bf16": 835, "fp8": 1671, "fp32": 60}),
    ("H100 PCIe", {"bf16": 756, "fp8": 1513, "fp32": 51}),
    ("H100", {"bf16": 989, "fp8": 1979, "fp32": 67}),
    ("H800", {"bf16": 989, "fp8": 1979, "fp32": 67}),
    ("A100", {"bf16": 312, "fp32": 19.5}),
    ("A800", {"bf16": 312, "fp32": 19.5}),
)

# Square matrices to multiply: the rate rises with the size until caches or memory limit it. Each gets its own
# window of time, the same for all workers, so that they load the cores together as in training.
MEASURED_SIZES = (256, 512, 1024)
WINDOW_SECONDS = 0.1


def peak_tflops(
    tracking: TrackingConfig, precision: PrecisionConfig, device_name: str | None = None
) -> tuple[float, str]:
    """Peak TFLOP/s of one device and, in words, where the figure is from.

    A collective call where the peak is measured: all workers multiply at the same moment and take the mean, so
    that workers who share cores are each given their share. `device_name`: what torch calls the GPU; None: this one.
    """
    if tracking.peak_tflops is not None:
        return tracking.peak_tflops, "tracking.peak_tflops"
    number_format = precision.dtype if precision.fp8 == "none" else "fp8"
    if device_name is None and not use_gpu():
        threads = torch.get_num_threads()
        rate = measure_matmul_tflops(_torch_dtype(precision.dtype), torch.device("cpu"))
        return rate, f"measured at start: {precision.dtype} matrix multiply on CPU, {threads} thread(s) per worker"
    name = device_name if device_name is not None else accelerator_name()
    rate = datasheet_tflops(name, number_format)
    if rate is not None:
        return rate, f"datasheet, dense {number_format}, {name}"
    rate = measure_matmul_tflops(_torch_dtype(precision.dtype), torch.device("cuda", torch.cuda.current_device()), 8192)
    return rate, (
        f"measured at start: {precision.dtype} matrix multiply on {name} "
        f"(no datasheet figure for {number_format} is known; set tracking.peak_tflops)"
    )


def datasheet_tflops(device_name: str, number_format: str) -> float | None:
    """Dense peak of a GPU (bf16 | fp8 | fp32); None if the table does not have it."""
    words = device_name.lower()
    for name, rates in DATASHEET_TFLOPS:
        if name.lower() in words:
            return rates.get(number_format)
    return None


def measure_matmul_tflops(dtype: torch.dtype, device: torch.device, *sizes: int) -> float:
    """Best sustained rate over the sizes, in about a third of a second; the mean over the workers if there are any."""
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    best = 0.0
    for size in sizes or MEASURED_SIZES:
        left = torch.randn(size, size).to(device, dtype)
        product = torch.empty_like(left)
        torch.mm(left, left, out=product)  # allocations and kernel choice stay out of the window
        if parallel:
            torch.distributed.barrier()
        best = max(best, _rate(left, product, device))
    if parallel:
        total = torch.tensor([best], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        best = float(total) / torch.distributed.get_world_size()
    return best


def _rate(left: torch.Tensor, product: torch.Tensor, device: torch.device) -> float:
    """TFLOP/s of left @ left, repeated for a window of time."""
    begin = time.perf_counter()
    repeats = 0
    while (elapsed := time.perf_counter() - begin) < WINDOW_SECONDS:
        torch.mm(left, left, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        repeats += 1
    return 2 * left.shape[0] ** 3 * repeats / elapsed / 1e12


def _torch_dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
