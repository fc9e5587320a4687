"""Random number generators: seeding them for a place in the topology, and their states for checkpoints."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nemo_align.runtime import device

if TYPE_CHECKING:
    from nemo_align.runtime.topology import Topology

# Megatron's own spacing. Tensor-parallel ranks get different seeds from Megatron's tracker; data-parallel ranks share
# theirs, or their replicas of the weights would differ.
_SEEDS_PER_PIPELINE_RANK = 100


def seed_everything(seed: int, topology: Topology) -> None:
    """Seed Python, numpy, torch and Megatron's tracker for this rank. The topology must be initialised."""
    from megatron.core import tensor_parallel

    seed += _SEEDS_PER_PIPELINE_RANK * topology.pipeline_rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of every generator, as numbers, strings and tensors only: it can be read back without unpickling code."""
    from megatron.core import tensor_parallel

    version, words, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "algorithm": algorithm,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if device.use_gpu() else None,
        "tracker": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned.

    A state saved on the other kind of device cannot be used for the device's generators: their seeds stay as they are.
    """
    from megatron.core import tensor_parallel

    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["algorithm"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    torch.set_rng_state(state["torch"].cpu())
    saved_on_gpu = state["cuda"] is not None
    if saved_on_gpu != device.use_gpu():
        return
    if saved_on_gpu:
        torch.cuda.set_rng_state(state["cuda"].cpu())
    tensor_parallel.get_cuda_rng_tracker().set_states({name: value.cpu() for name, value in state["tracker"].items()})
