"""A checkpoint of any format, opened: its architecture, and each tensor as a recipe under Megatron-core's name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from nemo_align.checkpoint import checksums
from nemo_align.checkpoint.huggingface.weight_map import EMBEDDING, HEAD_BIAS, HEAD_WEIGHT, weight_map
from nemo_align.checkpoint.streaming.locations import Extent
from nemo_align.checkpoint.streaming.tensors import RowSource
from nemo_align.config.model import ModelConfig
from nemo_align.config.validation_model import check_model
from nemo_align.data.tokenizer import SENTENCEPIECE_FILE, load_tokenizer

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()} | {torch.float16: "fp16"}
_LISTED = 6  # names in an error
_SAMPLE_BYTES, _SAMPLE_EVERY = 1 << 12, 1 << 26


@dataclass(kw_only=True)
class Model:
    """A checkpoint to read. `tensors` are without vocabulary padding, in the order of the forward pass."""

    kind: str  # hf | megatron | nemo
    path: Path
    config: ModelConfig
    reward: dict | None  # the manifest's entry of a reward model
    tensors: dict[str, RowSource]
    tokenizer: Path | Extent | None  # a folder, or the SentencePiece file itself
    identity: str  # changes when a file does
    verb: str = "convert"  # the stage that made it
    step: int = 0
    run_dir: Path | None = None  # of the run that made it
    files: dict[str, dict] = field(default_factory=dict)  # known checksums of files in `path`, as a manifest has them
    notes: list[str] = field(default_factory=list)  # what the user should know
    merged: dict | None = None  # how it was made of others
    stored: dict[str, str] = field(default_factory=dict)  # where the source keeps a tensor, if under another name
    identify: Callable[[], str] | None = None  # the identity of what lies there now

    def __post_init__(self) -> None:
        """Raise ValueError on sizes that make no model and on number formats that weights do not come in."""
        if problems := list(check_model(self.config)):
            raise ValueError(f"{self.path} describes no model: {'; '.join(problems)}")
        for key, tensor in self.tensors.items():
            if tensor.dtype not in DTYPE_NAMES:
                raise ValueError(
                    f"{self.path}: {key} is {tensor.dtype}, only {', '.join(DTYPE_NAMES.values())} is read"
                )

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights (a reward head may have another)."""
        return self.tensors[EMBEDDING].dtype

    @property
    def has_head_bias(self) -> bool:
        return HEAD_BIAS in self.tensors


def expected_shapes(config: ModelConfig, reward: dict | None) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by Megatron-core's name, without vocabulary padding."""
    weights = weight_map(config, has_output_layer=reward is None)
    shapes = {weight.megatron: weight.megatron_shape for weight in weights}
    if reward is not None:
        shapes[HEAD_WEIGHT] = (len(reward["attributes"]), config.hidden_size)
        if reward["head_bias"]:
            shapes[HEAD_BIAS] = (len(reward["attributes"]),)
    return shapes


def describe_problems(
    expected: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
    *,
    ignored: Iterable[str] = (),
    padded: Iterable[str] = (),
) -> list[str]:
    """What is missing, left over or of another shape, for an error. `padded` names may have more rows."""
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing: {listed(missing)}")
    if left := sorted(found.keys() - expected.keys() - set(ignored)):
        problems.append(f"left over: {listed(left)}")
    padded = set(padded)
    for key in sorted(expected.keys() & found.keys()):
        have, want = tuple(found[key]), expected[key]
        fits = have[1:] == want[1:] and have[:1] >= want[:1] if key in padded else have == want
        if not fits:
            problems.append(f"{key} has shape {list(have)}, {list(want)} expected")
    return problems


def listed(names: list[str]) -> str:
    """Some names and how many there are."""
    return f"{', '.join(names[:_LISTED])} ({len(names)} in all)"


def origin_of(model: Model) -> dict:
    """What a target records of its source."""
    origin = {"format": model.kind, "identity": model.identity, "verb": model.verb, "step": model.step}
    return origin if model.merged is None else {**origin, "merged": model.merged}


@contextmanager
def tokenizer_folder(model: Model) -> Iterator[Path | None]:
    """The tokenizer of a model as a folder that `load_tokenizer` reads; None if it has none."""
    if not isinstance(model.tokenizer, Extent):
        yield model.tokenizer
        return
    with TemporaryDirectory(prefix="nemo_align-tokenizer-") as folder:
        (Path(folder) / SENTENCEPIECE_FILE).write_bytes(model.tokenizer.read())
        yield Path(folder)


def tokens_beyond(model: Model) -> list[str]:
    """A note if the tokenizer has tokens without an embedding: a text with one of them cannot be computed."""
    with tokenizer_folder(model) as folder:
        count = 0 if folder is None else load_tokenizer(folder).vocab_size
    rows = model.config.vocab_size
    if count <= rows:
        return []
    return [f"{model.path}: the tokenizer has {count:,} tokens and the model {rows:,}: those beyond have no embedding"]


def files_identity(extents: dict[str, Extent]) -> str:
    """A fingerprint of files: path, name, size, time of change, and 4 KiB of every 64 MiB. Times alone may be equal in
    unpacked archives and mounted buckets; reading 680 GB to name a job would cost more than it saves."""
    described = [
        [name, str(Path(extent.path).resolve()), extent.start, extent.num_bytes, _changed(extent.path), _sample(extent)]
        for name, extent in extents.items()
    ]
    return checksums.digest_of([json.dumps(sorted(described)).encode()])


def _sample(extent: Extent) -> str:
    running = checksums.new_hash()
    for start in range(0, extent.num_bytes, _SAMPLE_EVERY):
        running.update(extent.part(start, min(_SAMPLE_BYTES, extent.num_bytes - start)).read())
    return running.hexdigest()


def _changed(path: str) -> int:
    return Path(path).stat().st_mtime_ns
