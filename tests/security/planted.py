"""Payloads that leave a file behind when something unpickles them, in every wrapping that a reader may meet."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch


class Payload:
    """Unpickling it touches `canary`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def raw(canary: Path) -> bytes:
    """A bare pickle: what `numpy.load` unpickles where a file is not numpy's at all."""
    return pickle.dumps(Payload(canary))


def object_array(canary: Path) -> bytes:
    """A `.npy` file of Python objects."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def torch_file(canary: Path) -> bytes:
    """What torch.save writes: a zip with a pickle in it."""
    buffer = io.BytesIO()
    torch.save({"weights": Payload(canary)}, buffer)
    return buffer.getvalue()


def old_torch_file(canary: Path) -> bytes:
    """What torch.save wrote before it wrote zips."""
    buffer = io.BytesIO()
    torch.save({"weights": Payload(canary)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def tar_archive(canary: Path) -> bytes:
    """A `.nemo`: a tar of a configuration and pickled weights, one member of which would leave the folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in (
            ("model_config.yaml", b"model: {}\n"),
            ("model_weights.ckpt", torch_file(canary)),
            ("../" + canary.name, b"left the folder"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_archive(canary: Path) -> bytes:
    """A zip with a pickle, and a member that would leave the folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", raw(canary))
        archive.writestr("../" + canary.name, b"left the folder")
    return buffer.getvalue()


def npz_archive(canary: Path, names: tuple[str, ...]) -> bytes:
    """An `.npz` whose members are arrays of objects."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(f"{name}.npy", object_array(canary))
    return buffer.getvalue()


PICKLES = {"raw": raw, "objects": object_array, "torch": torch_file, "old torch": old_torch_file}
ARCHIVES = {"model.nemo": tar_archive, "model.zip": zip_archive, "model.pt": torch_file, "model.pkl": raw}
