"""Answers to the questions that Megatron-core asks CUDA, for a machine that has none.

Megatron-core has no CPU path: it asks `torch.cuda` for the current device and stream, creates small tensors on
`device="cuda"`, keeps CUDA random states, and compares names of CUDA tensor types. Each of these questions gets the
CPU's answer here, and nothing else changes: `torch.cuda.is_available()` stays False, and the arithmetic is torch's own.

Cost. A `TorchFunctionMode` could rewrite `device="cuda"` in one place, but it sits in the way of every torch call: an
8x8 addition went from 1.15 to 2.7 us, a view from 0.87 to 2.1 us. Wrapping the few factories that Megatron calls costs
about 0.2 us for each call of a factory and nothing for any other operation, so that is what is done.

tests/unit/runtime/test_cpu_facade.py has a test for each answer.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.jit._builtins
import torch.utils._device

# Factories that Megatron-core calls with a literal device="cuda".
_FACTORIES = (
    *("tensor", "zeros", "ones", "empty", "full", "arange"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
)
_TYPE_NAMES = ("FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor", "IntTensor", "LongTensor", "ByteTensor")
# With one of these importable Megatron-core picks its CUDA kernels whether or not there is a GPU.
_GPU_ONLY_PACKAGES = ("transformer_engine", "transformer_engine_torch", "apex")

_CPU = torch.device("cpu")
_installed = False


def install() -> None:
    """Install every answer, once per process.

    Raises:
        RuntimeError: Transformer Engine or Apex was imported before: Megatron-core may have chosen their kernels.
        ModuleNotFoundError: psutil is missing, without which Megatron's checkpoint writer dies and the save hangs.
    """
    global _installed
    if _installed:
        return
    assert not torch.cuda.is_available(), "the CPU facade must never hide a GPU"
    importlib.import_module("psutil")
    _hide_gpu_packages()
    _answer_device_questions()
    _answer_random_states()
    _answer_tensor_types()
    _answer_factories()
    with _quiet_about_missing_kernels():
        _import_megatron_uncompiled()
        _patch_megatron()
    _installed = True


def _hide_gpu_packages() -> None:
    for name in _GPU_ONLY_PACKAGES:
        if sys.modules.get(name) is not None:
            raise RuntimeError(f"{name} was imported before nemo_align's CPU facade: call device.install() first")
        sys.modules[name] = None  # type: ignore[assignment]  # makes every import of it a ModuleNotFoundError


def _answer_device_questions() -> None:
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.current_stream = lambda device=None: torch.cpu.current_stream()
    torch.cuda.default_stream = lambda device=None: torch.cpu.current_stream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.Stream = _Stream
    torch.cuda.Event = _Event
    torch.Tensor.cuda = _tensor_cuda


class _Stream(torch.cpu.Stream):
    """Stands for torch.cuda.Stream: the CPU has one queue, so there is nothing to order."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        super().__init__()


class _Event(torch.cpu.Event):
    """Stands for torch.cuda.Event, whose options mean nothing on a CPU."""

    def __init__(self, **options: Any) -> None:
        super().__init__()


def _tensor_cuda(
    self: torch.Tensor, device: Any = None, non_blocking: bool = False, memory_format: Any = torch.preserve_format
) -> torch.Tensor:
    """Stands for Tensor.cuda: like the real one on a tensor that is there already, it returns the tensor itself."""
    return self.to(_CPU, memory_format=memory_format)


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
    torch.set_rng_state(new_state)


def _answer_random_states() -> None:
    """There is one generator. Megatron sees it both as the CPU's and as CUDA's."""
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = _get_rng_state
        module.set_rng_state = _set_rng_state
        module.manual_seed = torch.default_generator.manual_seed


def _answer_tensor_types() -> None:
    """The CPU types under the CUDA names: they stay types, which Megatron calls and uses in isinstance."""
    for name in _TYPE_NAMES:
        setattr(torch.cuda, name, getattr(torch, name))


def _answer_factories() -> None:
    # torch keeps a set of its factories for `with torch.device(...)`, built on first use from these very names. Let it
    # see the originals: they are what torch passes on, and without them that context would stop working.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _with_cpu_for_cuda(getattr(torch, name)))


def _with_cpu_for_cuda(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        # A torch.device("cuda") is left alone: nothing in Megatron asks so, and torch's own error should show.
        if device.__class__ is str and device.startswith("cuda"):
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)  # refused without an accelerator
        return factory(*args, **kwargs)

    torch.jit._builtins._register_builtin(wrapper, f"aten::{factory.__name__}")  # scripted functions know it too
    return wrapper


@contextlib.contextmanager
def _quiet_about_missing_kernels() -> Iterator[None]:
    """Keep back what every worker would otherwise warn of: the packages hidden above and the CUDA that is not there."""
    extension_logger = logging.getLogger("torch.utils.cpp_extension")
    level = extension_logger.level
    extension_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Apex are not installed.*")
            warnings.filterwarnings("ignore", message="absl.logging is not installed.*")
            yield
    finally:
        extension_logger.setLevel(level)


def _import_megatron_uncompiled() -> None:
    """Import Megatron-core with its `jit_fuser` doing nothing.

    It is torch.compile, taken at import: on a CPU the first step would spend many seconds in a C++ compiler, or fail
    where there is none, to fuse functions that are a negligible part of a step.
    """
    if "megatron.core.jit" in sys.modules:
        return
    compile_ = torch.compile
    torch.compile = _no_compile
    try:
        importlib.import_module("megatron.core")
        importlib.import_module("megatron.core.jit")
    finally:
        torch.compile = compile_


def _no_compile(function: Callable | None = None, **_: Any) -> Callable:
    return function if function is not None else lambda decorated: decorated


def _patch_megatron() -> None:
    """The names that Megatron-core copied at import, and the functions that compare type names."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = _megatron_get_rng_state
    random._set_cuda_rng_state = _megatron_set_rng_state
    # With a single generator, whatever is drawn inside Megatron's fork() changes "the CPU state" too: as intended.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())

    clip_grads = importlib.import_module("megatron.core.optimizer.clip_grads")
    optimizer = importlib.import_module("megatron.core.optimizer.optimizer")
    distributed = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    clip = _naming_cuda_types(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = clip
    optimizer.clip_grad_by_total_norm_fp32 = clip
    for cls in (optimizer.Float16OptimizerWithFloat16Params, distributed.DistributedOptimizer):
        cls.__init__ = _naming_cuda_types(cls.__init__)


def _megatron_get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    assert not graph_safe, "CUDA graphs need a GPU"
    return torch.get_rng_state()


def _megatron_set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    assert not graph_safe, "CUDA graphs need a GPU"
    torch.set_rng_state(new_state)


def _naming_cuda_types(function: Callable) -> Callable:
    """`function`, during which `Tensor.type()` gives CPU tensors the name of their CUDA type.

    Only the few functions that compare those names run so; everyone else sees torch's own answer.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    original = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) and self.is_cpu else answer

    torch.Tensor.type = type_
    try:
        yield
    finally:
        torch.Tensor.type = original
