"""A target that is not what its source says never appears under its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from nemo_align.checkpoint.conversion import job
from nemo_align.checkpoint.conversion.job import Settings
from nemo_align.checkpoint.conversion.open_huggingface import open_huggingface
from nemo_align.checkpoint.conversion.open_megatron import open_megatron
from nemo_align.checkpoint.conversion.to_megatron import to_megatron
from nemo_align.checkpoint.conversion.verify import verify_tensors
from nemo_align.checkpoint.streaming.tensors import pieces_in
from tests.unit.checkpoint.test_conversion_sources import write_hf


def test_a_target_that_differs_never_appears(tmp_path: Path) -> None:
    model = open_huggingface(write_hf(tmp_path / "hf"))
    target = to_megatron(model)

    def seal(folder: Path, job_id: str, entries: dict[str, dict]) -> None:
        """A disk that loses a bit after everything was written."""
        target.seal(folder, job_id, entries)
        piece, _ = next(iter(pieces_in(open_megatron(folder, verify=False).tensors["output_layer.weight"])))
        with open(piece.path, "r+b") as data:
            data.seek(piece.start)
            first = data.read(1)[0]
            data.seek(piece.start)
            data.write(bytes([first ^ 1]))

    def check(folder: Path) -> None:
        verify_tensors(model, open_megatron(folder, verify=False), workers=1)

    place, settings = tmp_path / "megatron", Settings(workers=1, check=check)
    with pytest.raises(ValueError, match=r"differs from .* output_layer.* Remove it and convert again"):
        job.carry_out([model], dataclasses.replace(target, seal=seal), place, settings)
    assert not place.exists()
    (left,) = tmp_path.glob(".tmp-megatron-*")  # kept for a look, and named in the message
    assert left.is_dir()


def test_a_finished_target_is_checked_again(tmp_path: Path) -> None:
    model = open_huggingface(write_hf(tmp_path / "hf"))
    checked: list[Path] = []
    for _ in range(2):
        job.carry_out([model], to_megatron(model), tmp_path / "megatron", Settings(workers=1, check=checked.append))
    assert [folder.parent.name.startswith(".tmp-megatron-") for folder in checked] == [True, False]
    assert checked[1] == tmp_path / "megatron"
