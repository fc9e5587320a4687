"""`.bin/.idx` between us, megatron-core's reader and builder, and the format as its bytes say.

tests/unit/data/test_indexed.py has the damaged files; here are whole ones, read by everyone alike.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_align.data.indexed import check_indexed_dataset, write_indexed_dataset

# uint16 ends at 65,535; megatron-core's builder leaves it at 65,500 already.
VOCABULARIES = {
    100: np.uint16,
    32_000: np.uint16,
    65_499: np.uint16,
    65_500: np.int32,
    65_537: np.int32,
    256_000: np.int32,
}
CODES = {np.uint8: 1, np.int32: 4, np.int64: 5, np.uint16: 8}


def parse(prefix: Path) -> dict[str, np.ndarray]:
    """The pair read by its layout alone: little-endian header, lengths int32, byte offsets int64, borders int64."""
    data = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sequences, borders = struct.unpack_from("<9sQBQQ", data)
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    dtype = {number: kind for kind, number in CODES.items()}[code]
    lengths = np.frombuffer(data, "<i4", sequences, 34)
    pointers = np.frombuffer(data, "<i8", sequences, 34 + 4 * sequences)
    documents = np.frombuffer(data, "<i8", borders, 34 + 12 * sequences)
    assert len(data) == 34 + 12 * sequences + 8 * borders
    tokens = np.frombuffer(Path(f"{prefix}.bin").read_bytes(), np.dtype(dtype).newbyteorder("<"))
    return {"lengths": lengths, "pointers": pointers, "documents": documents, "tokens": tokens, "dtype": dtype}


def assert_read_alike(prefix: Path, sequences: list[list[int]], documents: list[int], dtype: type) -> None:
    """Our check, the bytes and both of megatron-core's readers (mapped and not) agree on every number."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # imports torch: seconds

    info = check_indexed_dataset(prefix)
    lengths = [len(sequence) for sequence in sequences]
    assert info.dtype == dtype
    assert (info.num_sequences, info.num_documents) == (len(sequences), len(documents) - 1)
    assert info.num_tokens == sum(lengths)
    raw = parse(prefix)
    assert raw["dtype"] is dtype
    offsets = np.cumsum([0, *lengths])[:-1]
    assert raw["lengths"].tolist() == lengths
    assert raw["pointers"].tolist() == (offsets * np.dtype(dtype).itemsize).tolist()
    assert raw["documents"].tolist() == documents
    assert raw["tokens"].tolist() == [token for sequence in sequences for token in sequence]
    for mapped in (True, False):
        theirs = IndexedDataset(str(prefix), mmap=mapped)
        assert len(theirs) == len(sequences) and theirs.index.dtype is dtype
        assert theirs.sequence_lengths.tolist() == lengths
        assert theirs.index.sequence_pointers.tolist() == raw["pointers"].tolist()
        assert theirs.document_indices.tolist() == documents
        for number, sequence in enumerate(sequences):
            found = theirs[number]
            assert found.dtype == dtype and found.tolist() == sequence
            assert theirs.get(number, offset=len(sequence) // 2).tolist() == sequence[len(sequence) // 2 :]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("eod", [None, 3])
def test_what_we_write(vocab_size, eod, tmp_path):
    chance = np.random.default_rng(vocab_size)
    written = [chance.integers(0, vocab_size, size).tolist() for size in (1, 0, 700, 5, 0, 64)]
    written.append([0, vocab_size - 1])  # the ends of the vocabulary
    write_indexed_dataset(tmp_path / "set", written, vocab_size, eod)
    ending = [] if eod is None else [eod]
    sequences = [document + ending for document in written if document]
    assert_read_alike(tmp_path / "set", sequences, list(range(len(sequences) + 1)), VOCABULARIES[vocab_size])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 256_000 - 1), max_size=20), min_size=1, max_size=12))
def test_whatever_we_write(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("set")
    if not any(written):
        with pytest.raises(ValueError, match="no documents"):
            write_indexed_dataset(folder / "set", written, 256_000, None)
        return
    write_indexed_dataset(folder / "set", written, 256_000, None)
    sequences = [document for document in written if document]
    assert_read_alike(folder / "set", sequences, list(range(len(sequences) + 1)), np.int32)


@pytest.mark.parametrize("dtype", CODES)
def test_what_megatron_writes(dtype, tmp_path):
    """Documents of several sequences, as its sentence splitting makes them; int64 too, which we never write."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    chance = np.random.default_rng(5)
    top = 200 if dtype is np.uint8 else 60_000
    documents = [[chance.integers(0, top, size).tolist() for size in sizes] for sizes in ((3, 1), (9,), (2, 2, 40))]
    builder = IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(np.array([token for part in document for token in part]), [len(part) for part in document])
    builder.finalize(str(tmp_path / "set.idx"))
    assert_read_alike(tmp_path / "set", [part for document in documents for part in document], [0, 2, 3, 6], dtype)
    check_indexed_dataset(tmp_path / "set", vocab_size=top, complete=True)


def test_megatron_merges_what_we_write(tmp_path):
    """Its builder appends whole sets, as its merging tool does."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    parts = [[[1, 2, 3], [4]], [[5, 6], [7, 8, 9], [10]]]
    for number, part in enumerate(parts):
        write_indexed_dataset(tmp_path / f"part{number}", part, 70_000, None)
    builder = IndexedDatasetBuilder(str(tmp_path / "set.bin"), dtype=DType.optimal_dtype(70_000))
    for number in range(len(parts)):
        builder.add_index(str(tmp_path / f"part{number}"))
    builder.finalize(str(tmp_path / "set.idx"))
    assert_read_alike(tmp_path / "set", [document for part in parts for document in part], [0, 1, 2, 3, 4, 5], np.int32)
