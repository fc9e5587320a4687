"""What a conversion will write: the large files part by part, and the small ones whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nemo_align.checkpoint.streaming import transfer
from nemo_align.checkpoint.streaming.tensors import RowSource, num_bytes


@dataclass(frozen=True)
class Planned:
    """A tensor of the target, for people: where it comes from and where it goes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    source: str  # names on the source's side
    file: str


@dataclass(kw_only=True)
class Target:
    """A folder to be written."""

    parts: list[transfer.Part]
    planned: list[Planned]
    write_small: Callable[[Path], None]  # puts every small file but the last one into a folder
    seal: Callable[[Path, str, dict[str, dict]], None]  # (folder, job, entries of all files): writes the last one
    options: dict = field(default_factory=dict)  # that change the result: part of the job's identity

    @property
    def num_bytes(self) -> int:
        """Bytes of the large files."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(tensor.num_bytes for tensor in self.planned)


def planned(name: str, source: RowSource, of: str, file: str) -> Planned:
    """A tensor's line in the plan."""
    return Planned(name, source.shape, str(source.dtype).removeprefix("torch."), num_bytes(source), of, file)
