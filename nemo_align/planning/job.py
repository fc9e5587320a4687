"""What is planned: a model under a layout, and the work of one optimizer step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.model.counts import bf16_layers
from nemo_align.planning.parameters import RewardHeadSize


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """One optimizer step. Where examples differ in length, the mean over many steps."""

    examples: float  # of the global batch
    micro_batches: float  # per data-parallel rank, empty ones included
    tokens: int  # of one micro-batch, padding included
    squared_tokens: float  # of one micro-batch: sum of squared segment lengths, padding included
    real_tokens: float  # of the whole step, over all data-parallel ranks
    real_squared_tokens: float  # the same: sum of squared segment lengths
    rows: int = 1  # sequences side by side in a micro-batch; packed rows are one
    counts: tuple[int, ...] = ()  # micro-batches of each step that the mean was taken of, if they differ

    def micro_batch_counts(self) -> Counter[int]:
        """How many steps have how many micro-batches."""
        return Counter(self.counts or (int(self.micro_batches),))

    @property
    def most_micro_batches(self) -> int:
        return max(self.micro_batch_counts())


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training step of one stage of the recipe. `parallel.data` is a number here."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    work: StepWork
    head: RewardHeadSize | None = None  # of a reward model, which has no output projection

    @property
    def data(self) -> int:
        assert self.parallel.data is not None
        return self.parallel.data

    @property
    def world_size(self) -> int:
        return self.parallel.tensor * self.parallel.pipeline * self.data

    @property
    def layers_per_chunk(self) -> int:
        return self.model.num_layers // (self.parallel.pipeline * self.parallel.virtual_pipeline)

    @property
    def sequence_split(self) -> int:
        """Ranks over which sequence parallelism splits what is not split by tensor parallelism."""
        return self.parallel.tensor if self.parallel.sequence else 1

    @property
    def value_bytes(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.precision.dtype == "bf16" else 4

    @property
    def recomputed_layers(self) -> int:
        """Layers of a model chunk whose activations are computed again as a whole."""
        most = {"full": self.layers_per_chunk, "block": self.parallel.recompute_layers}
        return min(self.layers_per_chunk, most.get(self.parallel.recompute, 0))

    def fp8_layers(self, stage: int, chunk: int) -> list[bool]:
        """Whether each layer of a model chunk multiplies in FP8: the first and last of the model may not."""
        size = self.layers_per_chunk
        begin = (chunk * self.parallel.pipeline + stage) * size
        if self.precision.fp8 == "none":
            return [False] * size
        first, last = bf16_layers(self.precision)
        return [first <= layer < self.model.num_layers - last for layer in range(begin, begin + size)]

    @property
    def is_interleaved(self) -> bool:
        return self.parallel.virtual_pipeline > 1
