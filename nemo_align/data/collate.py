"""From the examples of a micro-batch to its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from nemo_align.data.batch import Batch

if TYPE_CHECKING:
    from nemo_align.data.tokenized_rows import TokenizedRows


def collate_packed(
    rows: TokenizedRows,
    examples: Sequence[int],
    length: int,
    targets: dict[str, np.ndarray] | None = None,
) -> Batch:
    """Lay the segments of `examples` one after another into one row of `length` tokens; the rest is padding.

    Labels are shifted inside each segment: the last token of a segment predicts nothing, and the first is never
    predicted. Padding is a segment of its own behind all others, so that attention never mixes it with real tokens.
    `targets`: arrays [N] or [N, A] over the whole dataset; their rows of `examples` travel with the micro-batch.
    """
    tokens = np.zeros(length, dtype=np.int64)
    labels = np.zeros(length, dtype=np.int64)
    loss_mask = np.zeros(length, dtype=np.float32)
    positions = np.zeros(length, dtype=np.int64)
    segment_of_token = np.zeros(length, dtype=np.int64)
    borders = [0]
    read_positions = []

    for example in examples:
        for number, (sequence, predicted) in enumerate(rows.sequences(example)):
            start, end = borders[-1], borders[-1] + len(sequence)
            assert end <= length, f"example {example} does not fit a micro-batch of {length} tokens"
            tokens[start:end] = sequence
            mask = np.asarray(predicted[1:], dtype=bool)
            labels[start : end - 1] = np.where(mask, sequence[1:], 0)
            loss_mask[start : end - 1] = mask
            positions[start:end] = np.arange(end - start)
            segment_of_token[start:end] = len(borders) - 1
            if number == 0:
                read_positions.append(end - 1)
            borders.append(end)
    if borders[-1] < length:
        positions[borders[-1] :] = np.arange(length - borders[-1])
        segment_of_token[borders[-1] :] = len(borders) - 1
        borders.append(length)

    chosen = np.asarray(examples, dtype=np.int64)
    return Batch(
        tokens=torch.from_numpy(tokens)[None],
        position_ids=torch.from_numpy(positions)[None],
        labels=torch.from_numpy(labels)[None],
        loss_mask=torch.from_numpy(loss_mask)[None],
        loss_tokens=int(loss_mask.sum()),
        examples=torch.from_numpy(chosen),
        read_positions=torch.tensor(read_positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=int(np.diff(borders).max()),
        segment_of_token=torch.from_numpy(segment_of_token),
        targets={name: torch.from_numpy(np.asarray(values)[chosen]) for name, values in (targets or {}).items()},
    )


def collate_rows(windows: Sequence[np.ndarray], examples: Sequence[int], micro_batch_size: int, length: int) -> Batch:
    """Pretraining rows: each window holds the tokens of one sample and, behind them, the token that follows.

    windows: up to micro_batch_size arrays of 2 .. length + 1 tokens. Shorter windows and missing rows are padded with
    masked tokens, behind everything real, where causal attention cannot see them.
    """
    assert len(windows) == len(examples) <= micro_batch_size
    tokens = np.zeros((micro_batch_size, length), dtype=np.int64)
    labels = np.zeros((micro_batch_size, length), dtype=np.int64)
    loss_mask = np.zeros((micro_batch_size, length), dtype=np.float32)
    for row, window in enumerate(windows):
        num_predicted = len(window) - 1
        tokens[row, :num_predicted] = window[:-1]
        labels[row, :num_predicted] = window[1:]
        loss_mask[row, :num_predicted] = 1
    positions = torch.arange(length, dtype=torch.int64).expand(micro_batch_size, length).contiguous()
    return Batch(
        tokens=torch.from_numpy(tokens),
        position_ids=positions,
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        loss_tokens=int(loss_mask.sum()),
        examples=torch.tensor(list(examples), dtype=torch.int64),
        read_positions=torch.tensor([len(window) - 2 for window in windows], dtype=torch.int64),
    )
