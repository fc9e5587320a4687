"""Whether a converted checkpoint holds what its source holds: both read back, tensor by tensor, in bounded memory."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from nemo_align.checkpoint import checksums
from nemo_align.checkpoint.conversion.model import Model
from nemo_align.checkpoint.keys import HEAD_PREFIX
from nemo_align.checkpoint.streaming import transfer
from nemo_align.checkpoint.streaming.tensors import RowSource, converted, num_bytes, row_bytes
from nemo_align.checkpoint.streaming.torch_dist import slabs
from nemo_align.checkpoint.streaming.transfer import Progress

# A reward model's head, and in a Hugging Face folder its final norm, are fp32 whatever the rest is.
_OWN_FORMAT = (HEAD_PREFIX, "decoder.final_layernorm.")

logger = logging.getLogger("nemo_align")


def verify_tensors(source: Model, made: Model, *, workers: int, progress: Progress | None = None) -> None:
    """Compare every tensor of `made`, mapped back to Megatron-core's names and order of rows, with the source's.

    `made` is opened from its files as any checkpoint is, so its own reader and the inverse mapping are used. Where the
    number format was changed, the source's values are rounded first.

    Raises:
        ValueError: tensors that differ, listed with the rows.
    """
    if source.tensors.keys() != made.tensors.keys():
        raise ValueError(f"{made.path} holds other tensors than {source.path}")
    progress = progress or Progress()
    expected = {
        key: converted(tensor, made.tensors[key].dtype if key.startswith(_OWN_FORMAT) else made.dtype, key)
        for key, tensor in source.tensors.items()
    }
    stretches = [
        (key, first, last) for key, tensor in expected.items() for first, last in slabs(tensor, transfer.PART_BYTES)
    ]
    progress.begin(sum(map(num_bytes, expected.values())), 0)
    try:
        with ThreadPoolExecutor(workers) as pool:
            compare = partial(_differs, expected, made.tensors, progress)
            problems = [problem for problem in pool.map(compare, stretches) if problem is not None]
    finally:
        progress.end()
    if problems:
        listed = "; ".join(problems[:6])
        raise ValueError(f"{made.path} differs from {source.path}: {listed}. Remove it and convert again")
    total = sum(map(num_bytes, expected.values()))
    rounded = [key for key, tensor in expected.items() if tensor.dtype.itemsize < source.tensors[key].dtype.itemsize]
    how = f" ({len(rounded)} of them after rounding)" if rounded else ""
    logger.info("verified: %d tensors, %s bytes, each equal to the source's%s", len(expected), f"{total:,}", how)


def _differs(
    expected: dict[str, RowSource],
    found: dict[str, RowSource],
    progress: Progress,
    stretch: tuple[str, int, int],
) -> str | None:
    key, first, last = stretch
    want, have = expected[key], found[key]
    if (want.shape, want.dtype) != (have.shape, have.dtype):
        return f"{key} is {have.dtype} {list(have.shape)}, {want.dtype} {list(want.shape)} expected"
    digests = []
    for tensor in (want, have):
        running = checksums.new_hash()
        for block in transfer.blocks(tensor, first, last):
            running.update(block)
        digests.append(running.hexdigest())
    progress.advance((last - first) * row_bytes(want))
    return None if digests[0] == digests[1] else f"{key}, rows {first:,} to {last:,}"
