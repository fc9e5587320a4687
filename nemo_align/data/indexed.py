"""Megatron's pretraining files: `<prefix>.bin` (token ids back to back) and `<prefix>.idx` (where documents lie in it).

Written by Megatron-core's own builder. Read by Megatron-core too, but only after `check_indexed_dataset`: the reader
trusts the counts in the file, and a wrong one ends in a crash, in garbage, or in ids outside the vocabulary.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_FIXED_BYTES = 34  # magic 9, version 8, dtype code 1, sequence count 8, document count 8
_TOKEN_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # 6 and 7 are floats
_SAMPLED_BLOCKS, _BLOCK_TOKENS = 256, 16384  # 4 Mi tokens: a set up to that size is read completely
_REWRITE = "write the pair again (nemo-align's prepare_pretraining, or Megatron-LM's tools/preprocess_data.py)"


@dataclass(frozen=True)
class IndexedDatasetInfo:
    """What a `.bin`/`.idx` pair holds."""

    prefix: str
    dtype: np.dtype  # of a token id
    num_sequences: int
    num_documents: int
    num_tokens: int
    bin_bytes: int
    idx_bytes: int


def write_indexed_dataset(
    prefix: str | Path, documents: Iterable[Sequence[int]], vocab_size: int, eod: int | None
) -> IndexedDatasetInfo:
    """Write `documents` (token ids), each followed by `eod` unless that is None; empty documents are left out.

    The pair appears under its name only when whole. Raises ValueError for an id outside the vocabulary (naming the
    document, 1 = first) and when there is no document at all."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # imports torch: seconds

    prefix = Path(prefix)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    pending = {suffix: Path(f"{prefix}.pending-{os.getpid()}{suffix}") for suffix in (".bin", ".idx")}
    builder = IndexedDatasetBuilder(str(pending[".bin"]), dtype=DType.optimal_dtype(vocab_size))
    written = 0
    try:
        for number, document in enumerate(documents, start=1):
            ids = np.asarray(document, dtype=np.int64)
            if not ids.size:
                continue
            if ids.min() < 0 or ids.max() >= vocab_size:
                outside = int(ids[(ids < 0) | (ids >= vocab_size)][0])
                raise ValueError(
                    f"{prefix}: document {number} has token id {outside}, the vocabulary {vocab_size} tokens"
                )
            if eod is not None:
                ids = np.append(ids, eod)
            builder.add_document(ids, [len(ids)])
            written += 1
        if not written:
            raise ValueError(f"{prefix}: there are no documents to write")
        builder.finalize(str(pending[".idx"]))
        for suffix in (".bin", ".idx"):  # the index last: without it there is no set
            os.replace(pending[suffix], f"{prefix}{suffix}")
    finally:
        builder.data_file.close()
        for file in pending.values():
            file.unlink(missing_ok=True)
    return check_indexed_dataset(prefix, vocab_size=vocab_size)


def check_indexed_dataset(
    prefix: str | Path, *, vocab_size: int | None = None, contents: bool = True, complete: bool = False
) -> IndexedDatasetInfo:
    """Refuse a pair that Megatron-core could not read right; ValueError names the file, what is wrong and the remedy.

    `contents=False` looks at the two headers and sizes only (every rank does that; one rank checks the contents).
    `vocab_size`: also look for token ids outside of it, in evenly spaced blocks, or everywhere if `complete`."""
    prefix = str(prefix)
    for suffix in (".idx", ".bin"):
        if not os.path.isfile(prefix + suffix):
            hint = " (leave the suffix off the path)" if prefix.endswith((".bin", ".idx")) else ""
            raise ValueError(f"{prefix}{suffix}: no such file; a blend names prefixes of .bin/.idx pairs{hint}")
    info, start = _header(prefix)
    if contents:
        lengths = np.memmap(f"{prefix}.idx", dtype="<i4", mode="r", offset=start, shape=(info.num_sequences,))
        _check_index(info, lengths, start)
        if vocab_size is not None:
            _check_ids(info, lengths, vocab_size, complete)
    return info


def _header(prefix: str) -> tuple[IndexedDatasetInfo, int]:
    idx, bin_bytes = f"{prefix}.idx", os.path.getsize(f"{prefix}.bin")
    idx_bytes = os.path.getsize(idx)
    with open(idx, "rb") as file:
        head = file.read(_FIXED_BYTES)
    if len(head) < _FIXED_BYTES or not head.startswith(_MAGIC):
        raise ValueError(f"{idx}: not an index of Megatron's format (it does not start with MMIDIDX); {_REWRITE}")
    version, code, num_sequences, document_entries = struct.unpack("<QBQQ", head[len(_MAGIC) :])
    if version != 1:
        raise ValueError(f"{idx}: version {version}, only 1 is known; {_REWRITE}")
    if code not in _TOKEN_DTYPES:
        raise ValueError(f"{idx}: number format {code} is none for token ids; {_REWRITE}")
    expected = _FIXED_BYTES + 12 * num_sequences + 8 * document_entries
    if idx_bytes != expected:
        if idx_bytes == expected + num_sequences:
            raise ValueError(f"{idx}: a multimodal index (it has sequence modes); only text is supported")
        raise ValueError(
            f"{idx}: {idx_bytes:,} bytes, but its {num_sequences:,} sequences and {document_entries:,} document "
            f"entries need {expected:,} (cut off or damaged); {_REWRITE}"
        )
    dtype = np.dtype(_TOKEN_DTYPES[code])
    num_tokens, rest = divmod(bin_bytes, dtype.itemsize)
    if not document_entries:
        raise ValueError(f"{idx}: no document borders, not even the first (damaged); {_REWRITE}")
    if not num_sequences or not num_tokens:
        raise ValueError(f"{prefix}: {num_sequences:,} sequences and {num_tokens:,} tokens, so nothing to train on")
    if rest:
        raise ValueError(f"{prefix}.bin: {bin_bytes:,} bytes are no whole number of {dtype} ids (cut off); {_REWRITE}")
    info = IndexedDatasetInfo(prefix, dtype, num_sequences, document_entries - 1, num_tokens, bin_bytes, idx_bytes)
    return info, _FIXED_BYTES


def _check_index(info: IndexedDatasetInfo, lengths: np.ndarray, start: int) -> None:
    idx = f"{info.prefix}.idx"
    if lengths.min() < 0:
        raise ValueError(f"{idx}: a sequence of negative length (damaged); {_REWRITE}")
    total = int(lengths.sum(dtype=np.int64))
    if total != info.num_tokens:
        raise ValueError(
            f"{info.prefix}.bin: holds {info.num_tokens:,} tokens, its .idx lists {total:,}: cut off while writing, or "
            f"the two files do not belong together; {_REWRITE}"
        )
    pointers = np.memmap(idx, dtype="<i8", mode="r", offset=start + lengths.nbytes, shape=lengths.shape)
    ends = pointers + lengths.astype(np.int64) * info.dtype.itemsize
    if pointers[0] != 0 or not np.array_equal(pointers[1:], ends[:-1]):
        raise ValueError(f"{idx}: its sequences do not lie back to back in the .bin (damaged); {_REWRITE}")
    documents = np.memmap(
        idx, dtype="<i8", mode="r", offset=start + lengths.nbytes + pointers.nbytes, shape=(info.num_documents + 1,)
    )
    if documents[0] != 0 or documents[-1] != info.num_sequences or (np.diff(documents) < 0).any():
        raise ValueError(f"{idx}: document borders do not run from 0 to {info.num_sequences:,} (damaged); {_REWRITE}")


def _check_ids(info: IndexedDatasetInfo, lengths: np.ndarray, vocab_size: int, complete: bool) -> None:
    tokens = np.memmap(f"{info.prefix}.bin", dtype=info.dtype, mode="r")
    step = _BLOCK_TOKENS
    if not complete:
        step = max(step, info.num_tokens // _SAMPLED_BLOCKS)
    for block in range(0, info.num_tokens, step):
        ids = tokens[block : block + _BLOCK_TOKENS]
        if has_outside(ids, vocab_size):
            position = block + _first_outside(ids, vocab_size)
            sequence = int(np.searchsorted(np.cumsum(lengths, dtype=np.int64), position, side="right"))
            raise _outside(info.prefix, position, sequence, int(tokens[position]), vocab_size)


def has_outside(ids: np.ndarray, vocab_size: int) -> bool:
    """Whether some token id (of at least one) is outside the vocabulary."""
    return bool(ids.min() < 0 or ids.max() >= vocab_size)


def check_window(prefix: str | Path, ids: np.ndarray, start: int, sequence: int, vocab_size: int) -> None:
    """Refuse `ids` outside the vocabulary as they are read: a large set was checked in samples only.

    `start`: token of the `.bin` (0 = first) that `ids` begin with; `sequence` (0 = first): where they lie. ValueError
    names file, token and sequence."""
    if ids.size and has_outside(ids, vocab_size):
        first = _first_outside(ids, vocab_size)
        raise _outside(prefix, start + first, sequence, int(ids[first]), vocab_size)


def _first_outside(ids: np.ndarray, vocab_size: int) -> int:
    return int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])


def _outside(prefix: str | Path, position: int, sequence: int, token: int, vocab_size: int) -> ValueError:
    return ValueError(
        f"{prefix}.bin: token {position:,} (sequence {sequence + 1:,}) has id {token}, but the vocabulary has "
        f"{vocab_size:,} tokens; set data.tokenizer to the one that the data was prepared with, or prepare the data "
        "again"
    )
