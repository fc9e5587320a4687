"""The order of the examples: one seeded permutation per epoch, addressed by the number of examples consumed."""

from __future__ import annotations

import numpy as np


class EpochSampler:
    """Example indices of the batch after `consumed` examples. Holds no state but two cached permutations.

    The order depends on (seed, epoch, num_examples) only: never on the layout, the batch size or the numpy version
    (it sorts the raw Philox stream, which numpy keeps; `Generator.permutation` may change between releases).
    """

    def __init__(self, num_examples: int, seed: int) -> None:
        if num_examples < 1:
            raise ValueError("the dataset has no examples; look at the counts of dropped rows in the log")
        self.num_examples = num_examples
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def batch(self, consumed: int, batch_size: int) -> np.ndarray:
        """Indices int64 [batch_size]; crosses epoch borders, so a batch may even exceed the dataset."""
        parts = []
        while batch_size > 0:
            epoch, start = divmod(consumed, self.num_examples)
            part = self.permutation(epoch)[start : start + batch_size]
            parts.append(part)
            consumed += len(part)
            batch_size -= len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """All indices in the order of `epoch`, int64 [num_examples]."""
        if epoch not in self._permutations:
            while len(self._permutations) > 1:  # a batch touches at most an epoch and the next, one after the other
                del self._permutations[next(iter(self._permutations))]
            stream = np.random.Philox(np.random.SeedSequence([self.seed, epoch]))
            self._permutations[epoch] = np.argsort(stream.random_raw(self.num_examples), kind="stable")
        return self._permutations[epoch]
