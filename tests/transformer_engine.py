"""Transformer Engine without a GPU: its modules are built and their state moved, not run. For fresh processes only."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

needed = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine: pip install nemo_align[gpu]"
)


def pretend_gpu(device: str = "meta") -> None:
    """An H100 that nothing may be computed on, whose memory is that of `device`."""
    import torch

    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: torch.device(device)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="H100"
    )


def pretend_gpu_in_host_memory() -> None:
    """The same with tensors that hold values: what is asked of CUDA is answered by the CPU facade, and the optimizer is
    torch's (Transformer Engine's own is a CUDA kernel)."""
    import torch

    from nemo_align.runtime import cpu_facade

    cpu_facade._GPU_ONLY_PACKAGES = ()
    cpu_facade.install()
    pretend_gpu("cpu")
    from megatron.core import optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer
    from transformer_engine.pytorch import quantization

    optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, True
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = False
    create = quantization.RecipeState.create
    quantization.RecipeState.create = staticmethod(
        lambda *args, **options: create(*args, **(options | {"device": torch.device("cpu")}))
    )


@contextmanager
def config_fields(**fields: object) -> Iterator[None]:
    """Inside, models are built with these fields of Megatron-core's config changed."""
    import nemo_align.model.build as build

    real = build.build_transformer_config

    def changed(*arguments):
        config = real(*arguments)
        for name, value in fields.items():
            setattr(config, name, value)
        return config

    build.build_transformer_config = changed
    try:
        yield
    finally:
        build.build_transformer_config = real
