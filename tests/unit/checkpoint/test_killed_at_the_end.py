"""A conversion killed while its target is sealed and published: never half a target, and in the end the same one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_align.checkpoint.conversion import job, to_huggingface, workplace
from nemo_align.checkpoint.conversion.job import Settings
from nemo_align.checkpoint.conversion.open_huggingface import open_huggingface
from nemo_align.checkpoint.conversion.open_megatron import open_megatron
from nemo_align.checkpoint.conversion.to_megatron import to_megatron
from tests.unit.checkpoint.test_conversion_sources import write_hf

KILLED = 99


def die(*_: object, **__: object) -> None:
    os._exit(KILLED)


def after(function: Callable) -> Callable:
    def call(*arguments: object, **keywords: object) -> None:
        function(*arguments, **keywords)
        die()

    return call


def nth(number: int, function: Callable) -> Callable:
    """Die in place of the call of that number, counted from 1."""
    calls = iter(range(1, 1000))

    def call(*arguments: object, **keywords: object) -> object:
        return die() if next(calls) == number else function(*arguments, **keywords)

    return call


MOMENTS: dict[str, tuple[object, str, Callable[[Callable], Callable]]] = {
    "before the record": (to_huggingface, "record_of", lambda _: die),
    "before anything is flushed": (workplace, "flush_file", lambda _: die),
    "half flushed": (workplace, "flush_file", lambda real: nth(3, real)),
    "before the first rename": (os, "rename", lambda _: die),
    "between the renames": (os, "rename", lambda real: nth(2, real)),
    "after the first rename": (os, "rename", after),
    "while leftovers are removed": (workplace.shutil, "rmtree", lambda _: die),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron checkpoint."""
    folder = tmp_path_factory.mktemp("source")
    model = open_huggingface(write_hf(folder / "hf"))
    job.carry_out([model], to_megatron(model), folder / "megatron", Settings(workers=1))
    return folder / "megatron"


def convert(source: Path, target: Path, *, overwrite: bool = False) -> bool:
    model = open_megatron(source)
    laid_out = to_huggingface.to_huggingface(model)
    return job.carry_out([model], laid_out, target, Settings(workers=1, overwrite=overwrite))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(moment: str, work: Callable[[], object]) -> bool:
    """Do the work in a process that dies at the moment; whether it came to it."""
    child = os.fork()
    if child == 0:
        try:
            where, name, change = MOMENTS[moment]
            setattr(where, name, change(getattr(where, name)))
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED)
    return code == KILLED


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_half_a_target_never_stands(moment: str, overwrite: bool, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole")
    whole, target = contents(tmp_path / "whole"), tmp_path / "target"
    if overwrite:  # what stands there is replaced
        target.mkdir()
        (target / "old").write_text("old")
    came = killed(moment, lambda: convert(source, target, overwrite=overwrite))
    assert came or (moment == "between the renames" and not overwrite)  # then there is one rename
    found = contents(target) if target.exists() else {}
    assert found in ({}, whole, {"old": b"old"} if overwrite else {})
    convert(source, target, overwrite=overwrite)
    assert contents(target) == whole
    assert not list(tmp_path.glob(".tmp-*"))
