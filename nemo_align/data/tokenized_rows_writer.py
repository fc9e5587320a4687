"""Writing a cache of tokenized rows, example by example. tokenized_rows.py describes the files and reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

FORMAT_VERSION = 1  # part of every cache key: raise it when the meaning of a file or of a rendering changes
_REJECTED = "rejected.jsonl"  # while the cache is being built


class _GrowingArray:
    """A .npy file appended to; its header is rewritten in place at the end.

    numpy pads a header so that the first dimension may grow to 21 digits without the header getting longer.
    """

    def __init__(self, path: Path, dtype: Any, width: int | None = None) -> None:
        self._dtype = np.dtype(dtype)
        self._width = width
        self._count = 0
        self._file: BinaryIO = path.open("wb")
        self._header()
        self._data_start = self._file.tell()

    def _header(self) -> None:
        shape = (self._count,) if self._width is None else (self._count, self._width)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def extend(self, values: Any) -> None:
        array = np.ascontiguousarray(values, dtype=self._dtype)
        assert array.shape[1:] == (() if self._width is None else (self._width,)), (array.shape, self._width)
        self._file.write(array.tobytes())
        self._count += len(array)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        assert self._file.tell() == self._data_start, "the .npy header grew"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class TokenizedRowsWriter:
    """Fills a folder example by example. `targets`: name -> number of columns, or None for one value per example."""

    def __init__(
        self, folder: Path, *, segments: int, targets: Mapping[str, int | None], rejected_path: Path | None = None
    ) -> None:
        self.folder = folder
        self.rejected_path = rejected_path  # where rejected rows will lie
        self._rejected: TextIO | None = None
        self.segments = segments
        self.target_widths = dict(targets)
        self.num_examples = 0
        self._end = 0
        self._arrays = {
            "tokens": _GrowingArray(folder / "tokens.npy", np.int32),
            "loss_mask": _GrowingArray(folder / "loss_mask.npy", np.bool_),
            "offsets": _GrowingArray(folder / "offsets.npy", np.int64),
            "loss_tokens": _GrowingArray(folder / "loss_tokens.npy", np.int32),
            "origins": _GrowingArray(folder / "origins.npy", np.int64, 2),
        }
        self._arrays["offsets"].extend([0])
        for name, width in self.target_widths.items():
            self._arrays[f"target_{name}"] = _GrowingArray(folder / f"target_{name}.npy", np.float32, width)

    def add(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[bool]]],
        *,
        origin: tuple[int, int],
        targets: Mapping[str, Any] | None = None,
    ) -> None:
        """One example: its (tokens, loss_mask) per segment, (source number, row number), and its targets."""
        assert len(sequences) == self.segments, (len(sequences), self.segments)
        targets = targets or {}
        assert targets.keys() == self.target_widths.keys(), (sorted(targets), sorted(self.target_widths))
        loss_tokens = 0
        for tokens, loss_mask in sequences:
            mask = np.asarray(loss_mask, dtype=np.bool_)
            assert len(tokens) == len(mask) > 0, (len(tokens), len(mask))
            assert not mask[0], "nothing predicts the first token of a sequence"
            self._arrays["tokens"].extend(tokens)
            self._arrays["loss_mask"].extend(mask)
            self._end += len(tokens)
            self._arrays["offsets"].extend([self._end])
            loss_tokens += int(mask.sum())
        self._arrays["loss_tokens"].extend([loss_tokens])
        self._arrays["origins"].extend([origin])
        for name, value in targets.items():
            self._arrays[f"target_{name}"].extend([value])
        self.num_examples += 1

    def reject(self, described: Mapping[str, Any]) -> None:
        """Write a row that is left out, one JSON object per line."""
        if self._rejected is None:
            self._rejected = (self.folder / _REJECTED).open("w", encoding="utf-8", newline="\n")
        self._rejected.write(json.dumps(described) + "\n")

    def publish_rejected(self) -> None:
        """Put the rejected rows, if any, where they are looked for: beside the folder of the cache."""
        if self._rejected is not None:
            self._rejected.flush()
            os.fsync(self._rejected.fileno())
            self._rejected.close()
            assert self.rejected_path is not None
            os.replace(self.folder / _REJECTED, self.rejected_path)
            self._rejected = None

    def finish(
        self,
        *,
        kind: str,
        fingerprint: str,
        report: Mapping[str, Any],
        sources: Sequence[str],
        attributes: Sequence[str],
    ) -> None:
        """Close the arrays, then write meta.json: a folder without it is no cache."""
        for array in self._arrays.values():
            array.close()
        meta = {
            "format": FORMAT_VERSION,
            "kind": kind,
            "fingerprint": fingerprint,
            "segments": self.segments,
            "targets": list(self.target_widths),
            "attributes": list(attributes),
            "sources": list(sources),
            "report": dict(report),
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=2, allow_nan=False) + "\n", encoding="utf-8")
