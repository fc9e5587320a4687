"""Tokenized rows on disk: plain numpy files, memory-mapped, published whole or not at all.

A cache is a folder of flat arrays. An example has one segment (a dialogue) or two (chosen, rejected), and segment s of
example i is tokens[offsets[i * segments + s] : offsets[i * segments + s + 1]].

    tokens.npy       int32 [T]      all token ids, back to back
    loss_mask.npy    bool  [T]      token t of its sequence is predicted (never the first of a sequence)
    offsets.npy      int64 [N * segments + 1]
    loss_tokens.npy  int32 [N]      predicted tokens of the example, all segments
    origins.npy      int64 [N, 2]   number of the source (in config order) and row number (1 = first) in it
    target_<name>.npy float32 [N] or [N, A]; NaN where missing
    meta.json        written last
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nemo_align.data.cache_folder import writing_cache
from nemo_align.data.plain_arrays import load_array
from nemo_align.data.tokenized_rows_writer import FORMAT_VERSION, TokenizedRowsWriter

log = logging.getLogger("nemo_align")

_DTYPES = {
    "tokens": np.dtype(np.int32),
    "loss_mask": np.dtype(np.bool_),
    "offsets": np.dtype(np.int64),
    "loss_tokens": np.dtype(np.int32),
    "origins": np.dtype(np.int64),
}
_DELETE = "delete the folder, it is built again"


class TokenizedRows:
    """One prepared data set, opened read-only; N examples, S segments each (1, or 2 for pairs).

    Attributes: `lengths` int32 [N, S] tokens, `loss_tokens` int32 [N], `targets` name -> float32 [N] or [N, A]
    (NaN = missing), `origins` int64 [N, 2] (source number, row number), `fingerprint`, `report` (counts), `sources`
    (names, in config order), `attributes` (column names of target "labels").
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.folder / 'meta.json'} is damaged ({error}); {_DELETE}") from None
        if meta["format"] != FORMAT_VERSION:
            raise ValueError(
                f"{folder}: cache of format {meta['format']}, this version reads {FORMAT_VERSION}; delete it"
            )
        self.fingerprint: str = meta["fingerprint"]
        self.kind: str = meta["kind"]
        self.report: dict[str, Any] = meta["report"]
        self.sources: list[str] = meta["sources"]
        self.attributes: list[str] = meta["attributes"]
        self.num_segments: int = meta["segments"]
        self._tokens = self._load("tokens")
        self._loss_mask = self._load("loss_mask")
        self._offsets = self._load("offsets")
        self.loss_tokens = self._load("loss_tokens")
        self.origins = self._load("origins")
        self.targets: dict[str, np.ndarray] = {name: self._load(f"target_{name}") for name in meta["targets"]}
        self.lengths: np.ndarray = np.diff(self._offsets).astype(np.int32).reshape(-1, self.num_segments)
        self._check()

    def _load(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        array = load_array(path, remedy=_DELETE)
        wanted = _DTYPES.get(name, np.dtype(np.float32))
        if array.dtype != wanted:
            raise ValueError(f"{path} holds {array.dtype}, not {wanted}; {_DELETE}")
        return array

    def _check(self) -> None:
        """A cut or mixed-up cache is found here, not as a strange loss later."""
        examples = len(self.lengths)
        agree = (
            len(self._tokens) == len(self._loss_mask) == int(self._offsets[-1])
            and len(self.loss_tokens) == len(self.origins) == examples
            and all(len(values) == examples for values in self.targets.values())
            and self._offsets[0] == 0
            and (self.lengths > 0).all()
        )
        if not agree:
            raise ValueError(f"{self.folder}: the sizes of its arrays disagree (damaged cache); delete the folder")

    def __len__(self) -> int:
        return len(self.lengths)

    def sequences(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens int32 [L], loss_mask bool [L]) of each segment of example `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        first = index * self.num_segments
        edges = [int(edge) for edge in self._offsets[first : first + self.num_segments + 1]]
        return [(self._tokens[start:end], self._loss_mask[start:end]) for start, end in itertools.pairwise(edges)]

    def example_fingerprint(self, index: int) -> bytes:
        """16 bytes that name the tokens and masks of example `index`, whatever file it came from."""
        digest = hashlib.blake2b(digest_size=16)
        for tokens, loss_mask in self.sequences(index):
            digest.update(len(tokens).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
            digest.update(np.packbits(loss_mask).tobytes())
        return digest.digest()

    def summary(self) -> str:
        """The counts as one line for the log."""
        counts = ", ".join(
            f"{name.replace('_', ' ')} {value:,}"
            for name, value in self.report.items()
            if isinstance(value, int) and value
        )
        return f"{'+'.join(self.sources)}: {len(self):,} examples ({counts})"


def open_or_build(
    cache_dir: Path,
    *,
    kind: str,
    fingerprint: str,
    segments: int,
    build: Callable[[TokenizedRowsWriter], Mapping[str, Any]],
    sources: Sequence[str],
    targets: Mapping[str, int | None] | None = None,
    attributes: Sequence[str] = (),
) -> TokenizedRows:
    """The cache named by `fingerprint`; built first if it is not there.

    `build` fills the writer and returns the report. Rank 0 calls this before a barrier and the other ranks after it, so
    that they only open; where the folder is not shared between machines several build, and the first rename wins.
    Raises ValueError for a `cache_dir` that cannot be written, or if no example is left.
    """
    folder = Path(cache_dir) / f"{kind}_{fingerprint[:20]}"
    if (folder / "meta.json").is_file():
        return _opened(folder)
    with writing_cache(Path(cache_dir)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        building = Path(tempfile.mkdtemp(prefix=f"{_unfinished_prefix(folder)}{os.getpid()}.", dir=folder.parent))
        try:
            building.chmod(0o755)  # mkdtemp's 0700 would shut out colleagues who share the cache
            writer = TokenizedRowsWriter(
                building, segments=segments, targets=targets or {}, rejected_path=rejected_path(folder)
            )
            try:
                report = build(writer)
            except ValueError:
                writer.publish_rejected()  # when nothing is left, to see why
                raise
            writer.publish_rejected()  # before the cache appears
            if writer.num_examples == 0:
                raise ValueError(f"data ({', '.join(sources)}): no example is left. Counts: {json.dumps(dict(report))}")
            writer.finish(kind=kind, fingerprint=fingerprint, report=report, sources=sources, attributes=attributes)
            try:
                os.rename(building, folder)
            except OSError:
                if not (folder / "meta.json").is_file():
                    raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return _opened(folder)


def _opened(folder: Path) -> TokenizedRows:
    rows = TokenizedRows(folder)
    log.info("%s", rows.summary())
    if rows.report.get("quarantined"):
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in rows.report["quarantined_by_reason"].items())
        log.warning(
            "%s: %s of %s rows are left out as wrong (%s): see %s",
            "+".join(rows.sources),
            f"{rows.report['quarantined']:,}",
            f"{rows.report['rows']:,}",
            reasons,
            rejected_path(folder),
        )
    return rows


def rejected_path(folder: Path) -> Path:
    """The JSON-lines file of the rows that `data.bad_rows=quarantine` left out of the cache `folder`."""
    return folder.with_name(f"{folder.name}.rejected.jsonl")


def _unfinished_prefix(folder: Path) -> str:
    return f".{folder.name}.{socket.gethostname()}."


def _remove_unfinished(folder: Path) -> None:
    """Take away what processes of this machine left that were killed while they built the same cache."""
    prefix = _unfinished_prefix(folder)
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
        if not psutil.pid_exists(int(left.name.removeprefix(prefix).split(".")[0])):
            shutil.rmtree(left, ignore_errors=True)
