"""Micro-batches from tokenized rows on disk: labels, masks, positions, segments, targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_align.data.batch import Batch
from nemo_align.data.collate import collate_packed, collate_rows
from nemo_align.data.source import RowSource
from nemo_align.data.step_plan import StepLayout
from nemo_align.data.tokenized_rows import TokenizedRows, open_or_build

NUM_ROWS = 37


def _build(folder: Path, segments: int = 1) -> TokenizedRows:
    """Rows of distinct token ids, so that a token names the example and place it came from."""
    rng = np.random.default_rng(0)

    def build(writer) -> dict[str, int]:
        for row in range(NUM_ROWS):
            sequences = []
            for segment in range(segments):
                tokens = 1000 * row + 100 * segment + np.arange(1, int(rng.integers(3, 40)))
                mask = rng.random(len(tokens)) < 0.5
                mask[0] = False
                sequences.append((tokens.tolist(), mask.tolist()))
            writer.add(sequences, origin=(0, row + 1), targets={"labels": [row, np.nan]})
        return {"kept": NUM_ROWS}

    return open_or_build(
        folder,
        kind="test",
        fingerprint=f"rows{segments}",
        segments=segments,
        build=build,
        sources=["a"],
        targets={"labels": 2},
        attributes=["x", "y"],
    )


@pytest.fixture
def rows(tmp_path: Path) -> TokenizedRows:
    return _build(tmp_path)


def test_labels_stay_inside_their_segment(rows: TokenizedRows) -> None:
    examples = (3, 11, 5)
    batch = collate_packed(rows, examples, 160, rows.targets)
    borders = batch.cu_seqlens.tolist()
    assert borders[0] == 0 and borders[-1] == 160 and batch.cu_seqlens.dtype == torch.int32
    for number, example in enumerate(examples):
        ((tokens, mask),) = rows.sequences(example)
        start, end = borders[number], borders[number + 1]
        assert batch.tokens[0, start:end].tolist() == tokens.tolist()
        assert batch.loss_mask[0, start:end].tolist() == [*mask[1:].astype(float), 0.0]
        expected = [token if predicted else 0 for token, predicted in zip(tokens[1:], mask[1:], strict=True)]
        assert batch.labels[0, start:end].tolist() == [*expected, 0]
        assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
        assert (batch.segment_of_token[start:end] == number).all()
        assert batch.read_positions[number] == end - 1
    assert (batch.segment_of_token[borders[3] :] == 3).all() and batch.loss_mask[0, borders[3] :].sum() == 0
    assert batch.loss_tokens == sum(int(rows.loss_tokens[example]) for example in examples)
    assert batch.max_seqlen == max(np.diff(borders))
    assert batch.targets["labels"][:, 0].tolist() == [3.0, 11.0, 5.0] and batch.targets["labels"][:, 1].isnan().all()


def test_a_full_row_has_no_padding_segment(rows: TokenizedRows) -> None:
    length = int(rows.lengths[4].sum())
    assert collate_packed(rows, (4,), length).cu_seqlens.tolist() == [0, length]


def test_pairs_alternate_chosen_and_rejected(tmp_path: Path) -> None:
    rows = _build(tmp_path, segments=2)
    batch = collate_packed(rows, (1, 2), 200)
    borders = batch.cu_seqlens.tolist()
    first_tokens = [int(batch.tokens[0, border]) for border in borders[:4]]
    assert first_tokens == [1001, 1101, 2001, 2101]
    assert batch.segment_of_token[torch.tensor(borders[:4])].tolist() == [0, 1, 2, 3]
    assert batch.read_positions.tolist() == [borders[1] - 1, borders[3] - 1]


def test_an_empty_micro_batch_is_all_padding(rows: TokenizedRows) -> None:
    batch = collate_packed(rows, (), 16, rows.targets)
    assert batch.num_examples == 0 and batch.cu_seqlens.tolist() == [0, 16] and batch.loss_tokens == 0
    assert batch.targets["labels"].shape == (0, 2) and batch.read_positions.shape == (0,)
    assert (batch.segment_of_token == 0).all() and batch.loss_mask.sum() == 0


def _predictions(batch: Batch) -> list[tuple[int, int]]:
    """(token, its label) wherever a label is predicted."""
    where = batch.loss_mask == 1
    return list(zip(batch.tokens[where].tolist(), batch.labels[where].tolist(), strict=True))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("data_parallel", [1, 3])
def test_the_layout_never_changes_what_is_predicted(rows: TokenizedRows, packing: bool, data_parallel: int) -> None:
    layout = StepLayout(capacity=100, data_parallel=data_parallel, packing=packing, micro_batch_size=2)
    seen: list[tuple[int, int]] = []
    for rank in range(data_parallel):
        step = RowSource(rows, layout=layout, data_rank=rank, seed=1).step(30, 16)  # crosses the epoch border
        batches = list(step.micro_batches())
        assert len(batches) == step.plan.num_micro_batches
        assert {batch.tokens.shape for batch in batches} == {(1, step.plan.length)}
        seen += [pair for batch in batches for pair in _predictions(batch)]
    whole = RowSource(rows, layout=StepLayout(capacity=10_000), data_rank=0, seed=1).step(30, 16)
    (batch,) = whole.micro_batches()
    assert sorted(seen) == sorted(_predictions(batch))
    assert len(seen) == whole.plan.loss_tokens


def test_evaluation_reads_every_row_once_and_iterators_are_independent(rows: TokenizedRows) -> None:
    extra = {"reference": np.arange(NUM_ROWS, dtype=np.float64)}
    source = RowSource(rows, layout=StepLayout(capacity=100), data_rank=0, seed=1, extra_targets=extra)
    seen = []
    for step in source.evaluation(10):
        first, second = step.micro_batches(), step.micro_batches()
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one.tokens, other.tokens)
            assert one.targets["reference"].tolist() == one.examples.tolist()
            seen += one.examples.tolist()
    assert sorted(seen) == list(range(NUM_ROWS))


def test_too_small_a_micro_batch_is_refused_before_training(rows: TokenizedRows) -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        RowSource(rows, layout=StepLayout(capacity=8), data_rank=0, seed=1)


def test_pretraining_rows_are_padded_with_masked_tokens() -> None:
    windows = [np.array([5, 6, 7, 8, 9]), np.array([3, 4])]
    batch = collate_rows(windows, [10, 11], micro_batch_size=3, length=4)
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [3, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 8, 9], [4, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.loss_mask.sum(dim=1).tolist() == [4, 1, 0] and batch.loss_tokens == 5
    assert batch.cu_seqlens is None and batch.position_ids[2].tolist() == [0, 1, 2, 3]
