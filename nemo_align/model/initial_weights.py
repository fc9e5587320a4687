"""Random initial weights that are the same for every layout.

Megatron-core draws weights in the order in which a rank builds its modules, so another pipeline split or vocabulary
padding gives another model. Here each weight has a generator of its own, seeded by its name in the whole model, draws
the whole matrix and keeps its shard: tensor, pipeline and interleaving do not matter, nor does the number format
(drawn in fp32, then rounded). Generators of a CPU and of a GPU differ.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_align.config.model import ModelConfig

_LAYER_PREFIX = "decoder.layers."
_VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
_RESIDUAL_OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


@torch.no_grad()
def initialize_weights(chunk: nn.Module, model: ModelConfig, seed: int) -> None:
    """Fills the matrices of a model chunk: normal with model.init_std, and init_std / sqrt(2 x layers) for the two
    projections of each layer that write to the residual stream. Padding rows of the vocabulary are zero. Norms keep
    what their modules gave them (LayerNorm1P: weight 0, bias 0)."""
    tensor, rank = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    for name, weight in _matrices(chunk):
        std = model.init_std
        if name.endswith(_RESIDUAL_OUTPUTS):
            std /= math.sqrt(2 * model.num_layers)
        shape, axis = list(weight.shape), weight.partition_dim
        shape[axis] *= tensor
        whole = torch.empty(shape, dtype=torch.float32, device=weight.device)
        rows = model.vocab_size if name in _VOCABULARY_WEIGHTS else shape[0]
        whole[rows:].zero_()
        whole[:rows].normal_(0.0, std, generator=generator_of(name, seed, weight.device))
        weight.copy_(whole.chunk(tensor, dim=axis)[rank])


def generator_of(name: str, seed: int, device: torch.device) -> torch.Generator:
    """The generator of the weight with this name in the whole model."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()  # 56 bits: positive in an int64
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big"))


def _matrices(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights split over the tensor group, with their names in the whole model (layers numbered from 0)."""
    for name, parameter in chunk.named_parameters():
        if parameter.is_meta:  # a dry run has no values, and Transformer Engine then has not marked what is split
            continue
        if not getattr(parameter, "tensor_model_parallel", False):
            # Its module has given it its values. A matrix has none yet: Megatron was told to leave them unset.
            assert parameter.dim() == 1 or name == "reward_head.weight", f"{name} is not split over the tensor group"
            continue
        if name.startswith(_LAYER_PREFIX):
            index, rest = name.removeprefix(_LAYER_PREFIX).split(".", 1)
            name = f"{_LAYER_PREFIX}{chunk.decoder.layers[int(index)].layer_number - 1}.{rest}"
        yield name, parameter
