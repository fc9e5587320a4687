"""The micro-batch: the one typed object that goes from the data to the model and the objective.

Shapes: B rows, S tokens of a row, E examples, A attributes. Packed micro-batches have B = 1 and segments one after
another; pretraining micro-batches have B >= 1 rows without segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass(kw_only=True)
class Batch:
    """One micro-batch of one data-parallel rank."""

    tokens: Tensor  # [B, S] int64
    position_ids: Tensor  # [B, S] int64, from 0 in each segment
    labels: Tensor  # [B, S] int64: the token after tokens[t] in the same segment; 0 where loss_mask is 0
    loss_mask: Tensor  # [B, S] float32, 1 where labels[t] is predicted
    loss_tokens: int  # sum of loss_mask, known on the host so that no kernel has to be waited for
    examples: Tensor  # [E] int64: dataset index of each example; E = 0 in an empty micro-batch
    read_positions: Tensor  # [E] int64: last token of each example's first segment, where the reward is read
    cu_seqlens: Tensor | None = None  # [segments + 1] int32 segment borders over all of S; None: rows are not packed
    max_seqlen: int | None = None  # longest segment
    segment_of_token: Tensor | None = None  # [S] int64; chosen0, rejected0, chosen1, ... for pairs; padding comes last
    targets: dict[str, Tensor] = field(default_factory=dict)  # [E] or [E, A]; NaN is a missing label

    @property
    def num_examples(self) -> int:
        return self.examples.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same micro-batch on `device`; to a GPU through pinned memory, without waiting for the copy."""
        if device.type == "cpu":
            return self
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = _to_gpu(value, device)
            elif isinstance(value, dict):
                moved[item.name] = {name: _to_gpu(tensor, device) for name, tensor in value.items()}
        return replace(self, **moved)


def _to_gpu(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True)
