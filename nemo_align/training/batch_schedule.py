"""Global batch size as a function of what has been trained on, with the report's ramp (arXiv 2406.11704, Table 2)."""

from __future__ import annotations

from nemo_align.config.training import BatchRampConfig, TrainConfig


class BatchSchedule:
    """Batch sizes of a stage, in examples.

    Without a ramp every batch has `train.global_batch_size` examples. With one, the batch that starts at `n` trained
    tokens has the size of the last ramp entry whose `from_tokens` is at most `n`. The answer depends on the number of
    consumed examples alone, so a resumed run continues the ramp where it stopped.
    """

    def __init__(self, train: TrainConfig, tokens_per_example: int | None = None) -> None:
        """`tokens_per_example`: length of a pretraining sample; needed only with a ramp."""
        ramp = train.batch_ramp or [BatchRampConfig(from_tokens=0, global_batch_size=train.global_batch_size)]
        if train.batch_ramp and tokens_per_example is None:
            raise ValueError(
                "train.batch_ramp counts tokens, so it needs samples of one length: use it with pretrain only"
            )
        per_example = tokens_per_example or 1
        # An example belongs to a ramp entry from the first batch that begins at or after its threshold.
        self._starts = [-(-int(entry.from_tokens) // per_example) for entry in ramp]
        self._sizes = [entry.global_batch_size for entry in ramp]
        assert self._starts[0] == 0 and self._starts == sorted(self._starts), self._starts

    def batch_size(self, consumed_examples: int) -> int:
        """Size of the batch that begins after `consumed_examples` examples."""
        size = self._sizes[0]
        for start, candidate in zip(self._starts, self._sizes, strict=True):
            if consumed_examples >= start:
                size = candidate
        return size

    def examples_after(self, steps: int) -> int:
        """Examples consumed by the first `steps` batches."""
        consumed = 0
        for level, size in enumerate(self._sizes):
            if level + 1 == len(self._sizes):
                return consumed + steps * size
            to_next = max(0, -(-(self._starts[level + 1] - consumed) // size))
            taken = min(steps, to_next)
            consumed += taken * size
            steps -= taken
            if steps == 0:
                return consumed
        raise AssertionError("the last level returns")

    def levels(self, steps: int) -> list[tuple[int, int]]:
        """(batch size, how many of the first `steps` batches have it), in order; sizes without a batch are left out."""
        found: list[tuple[int, int]] = []
        consumed = 0
        for level, size in enumerate(self._sizes):
            last = level + 1 == len(self._sizes)
            taken = steps if last else min(steps, max(0, -(-(self._starts[level + 1] - consumed) // size)))
            consumed += taken * size
            steps -= taken
            if taken:
                found.append((size, taken))
        return found

    def steps_for(self, examples: int) -> int:
        """Number of batches that consume `examples` examples; the last one may be short."""
        consumed = steps = 0
        for level, size in enumerate(self._sizes):
            end = examples if level + 1 == len(self._sizes) else min(examples, self._starts[level + 1])
            taken = max(0, -(-(end - consumed) // size))
            consumed += taken * size
            steps += taken
        return steps
