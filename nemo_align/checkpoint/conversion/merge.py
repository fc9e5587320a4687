"""`nemo-align merge`: one model from several of the same architecture, streamed as conversions are.

linear: the weighted sum of the tensors ("model soups", arXiv 2203.05482). slerp: spherical linear interpolation between
two models, tensor by tensor, each taken as one vector (Shoemake, SIGGRAPH 1985). Sums are in fp32.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from nemo_align.checkpoint import checksums
from nemo_align.checkpoint.conversion import job
from nemo_align.checkpoint.conversion.convert import detect, lay_out, open_source
from nemo_align.checkpoint.conversion.job import Settings
from nemo_align.checkpoint.conversion.model import DTYPE_NAMES, Model, tokenizer_folder
from nemo_align.checkpoint.conversion.progress import progress_of
from nemo_align.checkpoint.streaming import transfer
from nemo_align.checkpoint.streaming.tensors import RowSource, num_bytes, read, row_bytes, row_values, scratch
from nemo_align.checkpoint.streaming.torch_dist import slabs
from nemo_align.checkpoint.streaming.transfer import Progress
from nemo_align.config.conversion import MergeConfig
from nemo_align.config.sizes import parse_size
from nemo_align.data.tokenizer import load_tokenizer

# Vectors this close to one line have no arc to speak of, and sin(angle) in the denominator would amplify rounding.
_NEARLY_PARALLEL = 1 - 1e-6
_BLOCK_VALUES = 1 << 19

logger = logging.getLogger("nemo_align")


def merge(config: MergeConfig) -> Path:
    """Merge `sources` into `target`; returns it.

    Raises:
        ValueError: sources that differ in architecture, attributes or tokenizer (named), and what `convert` refuses.
    """
    workers = transfer.num_workers(parse_size(config.max_memory, "max_memory"), config.workers)
    models = [open_source(source, detect(source)) for source in config.sources]
    _check_alike(models)
    if config.method == "slerp":
        parts = _angles(models[0], models[1], config.t, workers, progress_of("measuring angles"))
        described = {"method": "slerp", "t": config.t}
    else:
        weights = _weights(config)
        parts = dict.fromkeys(models[0].tensors, weights)
        described = {"method": "linear", "weights": weights}
    tensors: dict[str, RowSource] = {
        key: WeightedSum([model.tensors[key] for model in models], parts[key]) for key in models[0].tensors
    }
    described["sources"] = [model.identity for model in models]
    described["paths"] = [str(model.path) for model in models]
    merged = replace(
        models[0],
        kind="merge",
        tensors=tensors,
        files={},
        run_dir=None,
        tokenizer=next((model.tokenizer for model in models if model.tokenizer is not None), None),
        merged=described,
        identity=checksums.digest_of([repr(described).encode()]),
    )
    dtype = config.dtype or DTYPE_NAMES[max((model.dtype for model in models), key=lambda dtype: dtype.itemsize)]
    target = lay_out(merged, config.target_format, dtype=dtype, shard_size=config.shard_size)
    target.options["merge"] = described
    settings = Settings(workers=workers, algorithm=config.checksum, progress=progress_of("merging"))
    if job.carry_out(models, target, Path(config.target), settings):
        logger.info("merged %d checkpoints to %s: %d tensors", len(models), config.target, len(target.planned))
    else:
        logger.info("%s was merged before from the same sources: verified, left alone", config.target)
    return Path(config.target)


class WeightedSum:
    """The sum of tensors of one shape, each times its weight, in fp32."""

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float]) -> None:
        self.sources, self._weights = tuple(sources), tuple(weights)
        self.shape, self.dtype = sources[0].shape, torch.float32
        assert all(source.shape == self.shape for source in sources)

    def read_rows(self, first: int, last: int, out: memoryview) -> None:
        total = torch.frombuffer(out, dtype=torch.float32).zero_()
        for source, weight in zip(self.sources, self._weights, strict=True):
            with scratch((last - first) * row_bytes(source)) as one:
                source.read_rows(first, last, one)
                total.add_(torch.frombuffer(one, dtype=source.dtype), alpha=weight)


def _weights(config: MergeConfig) -> list[float]:
    given = config.weights if config.weights is not None else [1.0] * len(config.sources)
    total = sum(given) if config.normalize else 1.0
    return [weight / total for weight in given]


def _angles(first: Model, second: Model, t: float, workers: int, progress: Progress) -> dict[str, list[float]]:
    """The two weights of slerp for each tensor, from the angle between the two."""
    stretches = [(key, *rows) for key, tensor in first.tensors.items() for rows in slabs(tensor, transfer.PART_BYTES)]
    progress.begin(sum(map(num_bytes, first.tensors.values())), 0)

    def products(stretch: tuple[str, int, int]) -> tuple[str, torch.Tensor]:
        key, begin, end = stretch
        pair = (first.tensors[key], second.tensors[key])
        found = _products(pair, begin, end)
        progress.advance((end - begin) * row_bytes(pair[0]))
        return key, found

    sums = {key: torch.zeros(3, dtype=torch.float64) for key in first.tensors}
    try:
        with ThreadPoolExecutor(workers) as pool:
            for key, found in pool.map(products, stretches):  # in order: the sums are the same every time
                sums[key] += found
    finally:
        progress.end()
    return {key: slerp_weights(*found.tolist(), t) for key, found in sums.items()}


def _products(pair: tuple[RowSource, RowSource], begin: int, end: int) -> torch.Tensor:
    """[a.a, b.b, a.b] over some rows, in fp64, a little at a time."""
    total = torch.zeros(3, dtype=torch.float64)
    step = max(1, _BLOCK_VALUES // row_values(pair[0]))
    for first in range(begin, end, step):
        a, b = (read(source, first, min(first + step, end)).double().flatten() for source in pair)
        total += torch.stack([a @ a, b @ b, a @ b])
    return total


def slerp_weights(aa: float, bb: float, ab: float, t: float) -> list[float]:
    """Weights of a and b at `t` on the arc between them, from their products; on the line where there is no arc."""
    cosine = ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else 1.0
    if abs(cosine) >= _NEARLY_PARALLEL:
        return [1 - t, t]
    angle = math.acos(cosine)
    return [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _check_alike(models: list[Model]) -> None:
    first = models[0]
    for other in models[1:]:
        ours, theirs = vars(first.config), vars(other.config)
        differing = [
            f"{key} is {theirs[key]}, not {value}"
            for key, value in ours.items()
            if key not in ("name", "make_vocab_size_divisible_by") and theirs[key] != value
        ]
        if (first.reward or {}).get("attributes") != (other.reward or {}).get("attributes"):
            differing.append("one is a reward model of other attributes, or none")
        elif (first.reward or {}).get("weights") != (other.reward or {}).get("weights"):
            differing.append("the weights of the scalar reward differ")
        if not differing and first.tensors.keys() != other.tensors.keys():
            differing.append(f"only one has {', '.join(sorted(first.tensors.keys() ^ other.tensors.keys()))}")
        if differing:
            raise ValueError(f"{other.path} cannot be merged with {first.path}: {'; '.join(differing)}")
    known = {print_: model.path for model in models if (print_ := _tokenizer(model)) is not None}
    if len(known) > 1:
        raise ValueError(f"the sources have different tokenizers: {', '.join(map(str, known.values()))}")


def _tokenizer(model: Model) -> str | None:
    with tokenizer_folder(model) as folder:
        return None if folder is None else load_tokenizer(folder).fingerprint
