"""What a forward-only pass computes for each example, on disk: reference log-probabilities, scores.

Computed once (design: one model in memory, never two), published every few seconds, so an interrupted pass goes on
where it stopped. Layout: `<cache>/<kind>/<key>/part_<n>.npz` with arrays `fingerprints` [n, 16] uint8 and one float32
array [n] per name, plus `about.json`. The key covers what changes the values: the checkpoint's manifest, number
formats and kernels. A parallel layout changes them only by rounding, so another layout reuses them with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from nemo_align.data.cache_folder import writing_cache
from nemo_align.runtime.topology import Topology
from nemo_align.training.metrics import write_atomically

logger = logging.getLogger("nemo_align")

# A kill loses what was computed since the last part; each part costs a flush to the disk.
PUBLISH_SECONDS = 5.0
_ABOUT = "about.json"


class ExampleCache:
    """Per-example float32 values keyed by the 16-byte fingerprint of the example's tokens and mask."""

    def __init__(
        self, root: Path, *, kind: str, identity: dict[str, str], layout: dict[str, int], names: tuple[str, ...]
    ) -> None:
        """
        Args:
            kind: what the values are (reference_log_probs, scores), for the folder and messages.
            identity: all that the values depend on.
            names: of the values stored for each example.
        """
        key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
        self._root = Path(root)
        self.directory = self._root / kind / key
        self.kind = kind.replace("_", " ")
        self.names = names
        self._identity = identity
        self._layout = layout
        self._values: dict[bytes, tuple[float, ...]] = {}
        self._num_parts = 0
        self._pending: list[tuple[list[bytes], list[np.ndarray]]] = []
        self._published = time.monotonic()

    def share(self, topology: Topology) -> int:
        """Load on rank 0 and give every rank the same, so that all agree on what is missing; returns the count."""
        if topology.is_main:
            self.load()
        shared = [self._values, self._num_parts]
        torch.distributed.broadcast_object_list(shared, src=0)
        self._values, self._num_parts = shared
        return len(self._values)

    def load(self) -> int:
        """Read what earlier runs computed; returns the number of examples known. A damaged part is left out."""
        self._values.clear()
        parts = sorted(self.directory.glob("part_*.npz"))
        self._num_parts = 1 + max((int(part.stem.split("_")[1]) for part in parts), default=-1)
        for part in parts:
            try:
                with np.load(part, allow_pickle=False) as arrays:
                    fingerprints = np.ascontiguousarray(arrays["fingerprints"])
                    columns = [arrays[name] for name in self.names]
            except Exception as error:  # whatever a damaged zip raises: its examples are computed again
                logger.warning("%s in %s cannot be read (%s): computed again", self.kind, part, error)
                continue
            for row, values in zip(fingerprints, zip(*columns, strict=True), strict=True):
                self._values[row.tobytes()] = tuple(float(value) for value in values)
        self._warn_of_layout()
        return len(self._values)

    def __contains__(self, fingerprint: bytes) -> bool:
        return fingerprint in self._values

    def add(self, fingerprints: Iterable[bytes], columns: dict[str, np.ndarray], *, write: bool) -> None:
        """Keep one float32 value of each name per fingerprint; with `write` they go into the next part (`flush`)."""
        fingerprints = list(fingerprints)
        ordered = [np.asarray(columns[name], dtype=np.float32) for name in self.names]
        for fingerprint, values in zip(fingerprints, zip(*ordered, strict=True), strict=True):
            self._values[fingerprint] = tuple(float(value) for value in values)
        if write and fingerprints:
            self._pending.append((fingerprints, ordered))
            if time.monotonic() - self._published > PUBLISH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Publish what was added since the last part. Raises ValueError with path and cause if that cannot be done."""
        self._published = time.monotonic()
        if not self._pending:
            return
        fingerprints = [fingerprint for keys, _ in self._pending for fingerprint in keys]
        columns = [np.concatenate(parts) for parts in zip(*(ordered for _, ordered in self._pending), strict=True)]
        self._publish(fingerprints, columns)
        self._pending.clear()
        self._num_parts += 1

    def columns(self, fingerprints: Iterable[bytes]) -> dict[str, np.ndarray]:
        """float32 arrays, one per name, in the order of `fingerprints`, which must all be known."""
        rows = np.array([self._values[fingerprint] for fingerprint in fingerprints], dtype=np.float32)
        rows = rows.reshape(-1, len(self.names))
        return {name: rows[:, column].copy() for column, name in enumerate(self.names)}

    def _publish(self, fingerprints: list[bytes], ordered: list[np.ndarray]) -> None:
        # Runs that share the cache folder write parts of their own.
        part = self.directory / f"part_{self._num_parts:06d}_{secrets.token_hex(4)}.npz"
        pending = part.with_suffix(".pending")
        with writing_cache(self._root):
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                about = self.directory / _ABOUT
                if not about.exists():
                    described = {"identity": self._identity, "layout": self._layout}
                    write_atomically(about, json.dumps(described, indent=2) + "\n")
                with pending.open("wb") as file:
                    keys = np.frombuffer(b"".join(fingerprints), dtype=np.uint8).reshape(len(fingerprints), -1)
                    np.savez(file, fingerprints=keys, **dict(zip(self.names, ordered, strict=True)))
                    file.flush()
                    os.fsync(file.fileno())
                pending.rename(part)
            except OSError:
                with suppress(OSError):
                    pending.unlink(missing_ok=True)
                raise

    def _warn_of_layout(self) -> None:
        about = self.directory / _ABOUT
        if not self._values or not about.exists():
            return
        try:
            earlier = json.loads(about.read_text(encoding="utf-8"))["layout"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "%s cannot be read (%s), so whether %s are of another layout is not known; they are reused",
                about,
                error,
                self.kind,
            )
            with suppress(OSError):
                about.unlink()  # the next part writes it anew
            return
        if earlier != self._layout:
            logger.warning(
                "%s were computed under the layout %s and are reused under %s: they agree to rounding, so the first "
                "preference loss may differ from its closed form by as much",
                self.kind,
                earlier,
                self._layout,
            )
