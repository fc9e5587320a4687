"""Parameters of every pipeline stage and model chunk, in closed form.

h hidden, f feed-forward, q heads x head_dim, k groups x head_dim, V padded vocabulary, t tensor-parallel size.

    split over t       a layer: h (q + 2k) + q h + 2 h f       embedding: V h        output projection: V h
    on every rank      a layer: 4 h (two LayerNorms, weight and bias)       final norm: 2 h       reward head: A (h + 1)
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import ParallelConfig
from nemo_align.model.counts import head_dim, padded_vocab_size


@dataclass(frozen=True, kw_only=True)
class RewardHeadSize:
    """What a reward model has in place of the output projection."""

    attributes: int
    bias: bool

    def parameters(self, model: ModelConfig) -> int:
        return self.attributes * (model.hidden_size + int(self.bias))


@dataclass(frozen=True)
class ChunkParameters:
    """Parameters of one rank's model chunk."""

    layers: int  # matrices of the layers, this rank's part
    embedding: int  # this rank's part
    output: int  # output projection, this rank's part
    norms: int  # whole on every tensor rank
    head: int  # reward head, fp32, whole on every tensor rank

    @property
    def split(self) -> int:
        """Of these every tensor rank has others."""
        return self.layers + self.embedding + self.output

    @property
    def replicated(self) -> int:
        """Of these every tensor rank has the same."""
        return self.norms + self.head

    @property
    def total(self) -> int:
        return self.split + self.replicated

    def __add__(self, other: ChunkParameters) -> ChunkParameters:
        return ChunkParameters(
            self.layers + other.layers,
            self.embedding + other.embedding,
            self.output + other.output,
            self.norms + other.norms,
            self.head + other.head,
        )


def layer_matrices(model: ModelConfig, tensor: int) -> int:
    """Matrix weights of one layer on one tensor rank."""
    h, q, k = model.hidden_size, model.num_attention_heads * head_dim(model), model.num_query_groups * head_dim(model)
    return (h * (q + 2 * k) + q * h + 2 * h * model.ffn_hidden_size) // tensor


def chunk_parameters(
    model: ModelConfig, parallel: ParallelConfig, stage: int, chunk: int, head: RewardHeadSize | None = None
) -> ChunkParameters:
    """Chunk `chunk` (0 .. virtual_pipeline - 1) of pipeline stage `stage`. `head`: of a reward model."""
    layers = model.num_layers // (parallel.pipeline * parallel.virtual_pipeline)
    is_first = stage == 0 and chunk == 0
    is_last = stage == parallel.pipeline - 1 and chunk == parallel.virtual_pipeline - 1
    vocabulary = padded_vocab_size(model, parallel.tensor) * model.hidden_size // parallel.tensor
    return ChunkParameters(
        layers=layers * layer_matrices(model, parallel.tensor),
        embedding=vocabulary if is_first else 0,
        output=vocabulary if is_last and head is None else 0,
        norms=(4 * layers + 2 * is_last) * model.hidden_size,
        head=head.parameters(model) if is_last and head is not None else 0,
    )


def stage_chunks(
    model: ModelConfig, parallel: ParallelConfig, stage: int, head: RewardHeadSize | None = None
) -> list[ChunkParameters]:
    """All chunks of a pipeline stage, on each of its ranks."""
    return [chunk_parameters(model, parallel, stage, chunk, head) for chunk in range(parallel.virtual_pipeline)]


def stage_parameters(
    model: ModelConfig, parallel: ParallelConfig, stage: int, head: RewardHeadSize | None = None
) -> ChunkParameters:
    """The chunks of a stage together."""
    first, *others = stage_chunks(model, parallel, stage, head)
    for chunk in others:
        first += chunk
    return first


def total_parameters(model: ModelConfig, parallel: ParallelConfig, head: RewardHeadSize | None = None) -> int:
    """Of the whole model, what tensor ranks replicate counted once. Padding rows of the vocabulary are counted."""
    stages = [stage_parameters(model, parallel, stage, head) for stage in range(parallel.pipeline)]
    return sum(parallel.tensor * stage.split + stage.replicated for stage in stages)
