"""Pretraining data: Megatron-core's GPTDataset and blends, in phases; and held-out sets read whole, once.

Samples run over document borders and hold `sequence_length` predicted tokens; end-of-document tokens are predicted like
all others. The order is Megatron-core's and depends on the number of samples asked for (one source that needs one epoch
more is shuffled anew from its first sample on). So each phase is a dataset of its own with a fixed number of samples,
whenever a run stops, and that number is part of the source's fingerprint, which a resume compares.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nemo_align.config.data import BlendSourceConfig, IndexedSourceConfig
from nemo_align.data.batch import Batch
from nemo_align.data.cache_folder import writing_cache
from nemo_align.data.cache_key import indexed_hash
from nemo_align.data.collate import collate_rows
from nemo_align.data.indexed import check_indexed_dataset, check_window, has_outside
from nemo_align.data.plain_arrays import load_array, without_pickles
from nemo_align.data.sampler import EpochSampler
from nemo_align.data.source import Step
from nemo_align.data.step_plan import StepLayout, plan_windows
from nemo_align.runtime import watchdog

if TYPE_CHECKING:
    from nemo_align.data.tokenizer import Tokenizer

logger = logging.getLogger("nemo_align")


@dataclass(frozen=True)
class PretrainingPhase:
    """One blend and the number of samples that training draws from it, from its steps and batch sizes."""

    name: str
    blend: Mapping[str, BlendSourceConfig]
    num_samples: int


def check_pretraining_files(
    phases: Sequence[PretrainingPhase],
    validation: Mapping[str, IndexedSourceConfig],
    vocab_size: int,
    cache_dir: str | Path,
    *,
    contents: bool,
) -> None:
    """Refuse what the sources below could not read right. ValueError names key or file and the remedy.

    `contents` reads indices and token ids too, not just headers and sizes, and leaves in `cache_dir` the hashes that
    the sources below ask for: work for one rank, before whose verdict no other may enter Megatron-core's barriers
    (`rank_zero_first`)."""
    for phase in phases:
        _check_blend(phase, vocab_size, contents=contents)
    for source in validation.values():
        check_indexed_dataset(source.path, vocab_size=vocab_size, contents=contents)
    if contents:
        for source in itertools.chain(validation.values(), *(phase.blend.values() for phase in phases)):
            indexed_hash(source.path, Path(cache_dir))


class PretrainingSource:
    """Steps over the phases, one after another; sample numbers run through all of them."""

    kind = "samples"

    def __init__(
        self,
        phases: Sequence[PretrainingPhase],
        *,
        tokenizer: Tokenizer,
        seed: int,
        cache_dir: str | Path,
        layout: StepLayout,
        data_rank: int,
    ) -> None:
        """Build on every rank: rank 0 writes the sample indices to `cache_dir`, then the others read them, so that the
        folder must be visible to all. `layout.capacity` is the sequence length. Raises ValueError for files whose
        headers are wrong; their contents are `check_pretraining_files`' to check, before.

        More than one source in a phase needs an initialised process group (as Megatron-core 0.16 does)."""
        assert phases and all(phase.num_samples > 0 for phase in phases), phases
        self.layout = layout
        self.data_rank = data_rank
        for phase in phases:
            _check_blend(phase, tokenizer.vocab_size, contents=False)
        self.fingerprint = _fingerprint(phases, layout.capacity, seed, tokenizer, Path(cache_dir))
        # Megatron-core's cache knows its data by path alone: files written anew under the same name would be read with
        # the old indices. The folder's name holds their content.
        cache = Path(cache_dir) / f"pretraining_{self.fingerprint.rpartition('-')[2]}"
        if _is_rank_zero():
            with writing_cache(Path(cache_dir)):
                _drop_damaged(cache)
        self._datasets = [_build(phase, layout.capacity, tokenizer, seed, cache) for phase in phases]
        self._ends = list(itertools.accumulate(phase.num_samples for phase in phases))
        self.num_examples = self._ends[-1]
        self._vocab_size = tokenizer.vocab_size

    def step(self, consumed: int, batch_size: int) -> Step:
        """Samples consumed .. consumed + batch_size - 1. Phases end where the caller counted their steps to end."""
        end = consumed + batch_size
        assert end <= self.num_examples, f"samples up to {end} asked for, the phases hold {self.num_examples}"
        return self._step(range(consumed, end))

    def evaluation(self, batch_size: int) -> Iterator[Step]:
        for start in range(0, self.num_examples, batch_size):
            yield self._step(range(start, min(start + batch_size, self.num_examples)))

    def window(self, sample: int) -> np.ndarray:
        """Token ids [sequence_length + 1] of a sample: its tokens and the one that follows them.

        Raises ValueError with file and document for an id outside the vocabulary."""
        phase = bisect.bisect_right(self._ends, sample)
        number = sample - (self._ends[phase - 1] if phase else 0)
        dataset, number = _in_one_file(self._datasets[phase], number)
        # Not dataset[number]: that makes masks which nobody reads, and turns ids of -1 into 0.
        # Newer Megatron-core adds a third value, the documents' lengths.
        ids, sequences = dataset._query_document_sample_shuffle_indices(number)[:2]
        if has_outside(ids, self._vocab_size):
            file = dataset.dataset
            for sequence in sequences.tolist():
                start = int(file.index.sequence_pointers[sequence]) // file.index.dtype().itemsize
                check_window(file.path_prefix, file.get(sequence), start, sequence, self._vocab_size)
            raise AssertionError(f"sample {sample} is padded")  # never: the last, short one is left out
        return ids

    def _step(self, samples: range) -> Step:
        return _window_step(self, samples, [self.layout.capacity] * len(samples))


class HeldOutSource:
    """One `.bin`/`.idx` pair in windows of the sequence length: every token is predicted exactly once.

    Documents are read one after another, behind an end-of-document token, which is what training shows before a
    document; so the very first token is predicted too. The last window is short and padded."""

    kind = "windows"

    def __init__(
        self,
        source: IndexedSourceConfig,
        *,
        tokenizer: Tokenizer,
        cache_dir: str | Path,
        layout: StepLayout,
        data_rank: int,
        seed: int = 0,
    ) -> None:
        """`cache_dir`: where the hash of the files is remembered."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        info = check_indexed_dataset(source.path, vocab_size=tokenizer.vocab_size, contents=False)
        self.layout = layout
        self.data_rank = data_rank
        self.num_tokens = info.num_tokens
        self.num_examples = -(-info.num_tokens // layout.capacity)
        content = f"{indexed_hash(source.path, Path(cache_dir))}/{layout.capacity}/{tokenizer.fingerprint}"
        self.fingerprint = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        self._prefix = source.path
        self._vocab_size = tokenizer.vocab_size
        self._eod = tokenizer.eod
        self._dataset = IndexedDataset(source.path)
        self._ends = np.cumsum(self._dataset.sequence_lengths, dtype=np.int64)  # in tokens, per sequence
        self._sampler = EpochSampler(self.num_examples, seed)

    def step(self, consumed: int, batch_size: int) -> Step:
        return self._step(self._sampler.batch(consumed, batch_size).tolist())

    def evaluation(self, batch_size: int) -> Iterator[Step]:
        for start in range(0, self.num_examples, batch_size):
            yield self._step(range(start, min(start + batch_size, self.num_examples)))

    def window(self, number: int) -> np.ndarray:
        """Ids [2 .. sequence_length + 1]: the last token before the window, then the window's tokens.

        Raises ValueError with file and document for an id outside the vocabulary."""
        start = number * self.layout.capacity
        stop = min(start + self.layout.capacity, self.num_tokens)
        if number == 0:
            return np.concatenate([[self._eod], self._read(0, stop)])
        return self._read(start - 1, stop)

    def _read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start .. stop - 1 of all sequences in a row."""
        parts = []
        while start < stop:
            sequence = int(np.searchsorted(self._ends, start, side="right"))
            begins = int(self._ends[sequence - 1]) if sequence else 0
            end = min(stop, int(self._ends[sequence]))
            ids = self._dataset.get(sequence, offset=start - begins, length=end - start)
            check_window(self._prefix, ids, start, sequence, self._vocab_size)
            parts.append(ids)
            start = end
        return np.concatenate(parts).astype(np.int64)

    def _step(self, windows: Sequence[int]) -> Step:
        length = self.layout.capacity
        return _window_step(self, windows, [min(length, self.num_tokens - number * length) for number in windows])


def _window_step(source: PretrainingSource | HeldOutSource, samples: Sequence[int], predicted: Sequence[int]) -> Step:
    plan = plan_windows(samples, predicted, source.layout)

    def build(examples: tuple[int, ...]) -> Batch:
        windows = [source.window(example) for example in examples]
        return collate_rows(windows, examples, source.layout.micro_batch_size, plan.length)

    return Step(plan, source.data_rank, build)


def _in_one_file(dataset: Any, number: int) -> tuple[Any, int]:
    """The GPTDataset that a sample of a phase comes from, and its number there."""
    from megatron.core.datasets.blended_dataset import BlendedDataset

    if isinstance(dataset, BlendedDataset):
        return dataset.datasets[dataset.dataset_index[number]], dataset.dataset_sample_index[number]
    return dataset, number


class _DatasetTokenizer:
    """What GPTDataset asks of a tokenizer, and no more. It has no `pad`: GPTDataset takes every token of that id out of
    the loss and replaces it, and an id that one model pads with may be a token of the data."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.vocab_size
        self.eod = tokenizer.eos_id
        self.unique_identifiers = OrderedDict(fingerprint=tokenizer.fingerprint)


def _build(
    phase: PretrainingPhase, sequence_length: int, tokenizer: Tokenizer, seed: int, cache: Path
) -> torch.utils.data.Dataset:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    watchdog.beat(f"indexing data.phases.{phase.name}")
    blend = ([source.path for source in phase.blend.values()], [source.weight for source in phase.blend.values()])
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[blend, None, None],
        path_to_cache=str(cache),
        tokenizer=_DatasetTokenizer(tokenizer),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,  # S x S per sample; our kernels are causal
    )
    sizes = [phase.num_samples, 0, 0]  # training, validation, test
    # Every rank reads the indices, and between the check of rank 0 and that reading a file could be swapped.
    with without_pickles(), writing_cache(cache.parent):
        try:
            dataset = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]
        except Exception as error:
            if isinstance(error.__cause__, OSError):  # of a disk that cannot be written
                raise error.__cause__ from None
            raise
    assert len(dataset) >= phase.num_samples, (phase.name, len(dataset), phase.num_samples)
    logger.info("phase %s: %d samples of %d tokens", phase.name, phase.num_samples, sequence_length)
    return dataset


def _check_blend(phase: PretrainingPhase, vocab_size: int, *, contents: bool) -> None:
    if not phase.blend:
        raise ValueError(f"data.phases.{phase.name}.blend: name at least one source")
    for name, source in phase.blend.items():
        if not source.weight > 0:
            raise ValueError(f"data.phases.{phase.name}.blend.{name}.weight={source.weight}: must be above 0")
        check_indexed_dataset(source.path, vocab_size=vocab_size, contents=contents)


def _drop_damaged(cache: Path) -> None:
    """Remove index files that a killed run left cut off, so that they are built again, and any that holds pickled
    objects: Megatron-core 0.16 would unpickle them, and what it writes itself are plain integers."""
    for file in cache.glob("*.npy"):
        try:
            load_array(file, remedy="built again")
        except ValueError as error:
            logger.warning("%s", error)
            file.unlink()


def _fingerprint(
    phases: Sequence[PretrainingPhase], sequence_length: int, seed: int, tokenizer: Tokenizer, cache_dir: Path
) -> str:
    """`<phase>=<samples>+...-<hash>`: a change of a sample count can be read from it, others change the hash.

    Sets are known by name and content, not by folder: data may be moved between a stop and a resume."""
    content = [
        [phase.name, phase.num_samples]
        + [
            [Path(source.path).name, source.weight, indexed_hash(source.path, cache_dir)]
            for source in phase.blend.values()
        ]
        for phase in phases
    ]
    text = json.dumps([content, sequence_length, seed, tokenizer.fingerprint])
    counts = "+".join(f"{phase.name}={phase.num_samples}" for phase in phases)
    return f"{counts}-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _is_rank_zero() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
