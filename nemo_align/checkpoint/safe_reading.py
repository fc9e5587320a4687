"""Reading torch_dist checkpoints without running code from them.

A torch_dist checkpoint pickles three things: `.metadata` (torch's reader uses plain `pickle.load`), byte entries inside
the `.distcp` files (torch's planner uses `weights_only=False`) and, up to Megatron-core 0.16, `common.pt`. A pickle may
call any function. Here `.metadata` goes through an unpickler that knows the metadata classes and nothing else, and all
the rest through torch's `weights_only=True`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from nemo_align.checkpoint.manifest import leaves_folder
from nemo_align.checkpoint.pickle_limits import refuse_bombs

METADATA_FILE = ".metadata"

# Every global that `.metadata` may name: plain containers, enums and dtypes. None of them does anything when called.
_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name): getattr(dcp_metadata, name)
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): dict,
    # The folder that the checkpoint was written to: kept as text, no path object of that machine is needed.
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
    ("pathlib._local", "PosixPath"): lambda *parts: "/".join(parts),
}
_DTYPES = {name: value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype)}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _METADATA_CLASSES:
            return _METADATA_CLASSES[module, name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint's metadata needs")


def read_metadata(folder: Path) -> Metadata:
    """The `.metadata` of a torch_dist checkpoint.

    Raises:
        ValueError: not there, damaged, naming anything but metadata classes, or pointing outside the folder.
    """
    path = Path(folder) / METADATA_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {METADATA_FILE}: it is not a torch_dist checkpoint, or its save was cut off"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return parse_metadata(content, path)


def parse_metadata(content: bytes, path: Path) -> Metadata:
    """The content of a `.metadata` file; `path` is named in errors.

    Raises:
        ValueError: damaged, naming anything but metadata classes, or pointing outside the folder.
    """
    try:
        refuse_bombs(content)
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
        _check(metadata)
    except Exception as error:  # a damaged or malicious pickle can raise anything
        raise ValueError(f"{path} is refused: {error}") from None
    return metadata


def _check(metadata: object) -> None:
    """Raise where unpickled metadata are none, are put together from other types, or point outside their folder."""
    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds {type(metadata).__name__}, not checkpoint metadata")
    for key, entry in metadata.state_dict_metadata.items():
        boxes = [] if isinstance(entry, BytesStorageMetadata) else [entry.size]
        if boxes:
            boxes += [part for chunk in entry.chunks for part in (chunk.offsets, chunk.sizes)]
        tensor_or_bytes = not boxes or isinstance(entry.properties.dtype, torch.dtype)
        if not isinstance(key, str) or not tensor_or_bytes or not all(map(_is_sizes, boxes)):
            raise ValueError(f"the description of {key!r} makes no sense")
    for index, info in (metadata.storage_data or {}).items():
        name = info.relative_path
        if not isinstance(name, str) or leaves_folder(name):
            raise ValueError(f"the data of {index.fqn} lies outside the folder ({name!r})")
        if index.offset is not None and not _is_sizes((*index.offset, info.offset, info.length)):
            raise ValueError(f"the place of {index.fqn} makes no sense")


def _is_sizes(values: object) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)


@contextmanager
def restricted_reading() -> Iterator[None]:
    """Inside, torch's and Megatron-core's checkpoint readers unpickle under the limits of this module.

    Neither offers a seam, so two names are replaced for the duration: FileSystemReader.read_metadata and torch.load.
    Loads run on the main thread while nothing else reads, so the narrow replacement is not seen elsewhere.
    """
    unrestricted_load = torch.load

    def read_metadata_of(reader: FileSystemReader, *args, **kwargs) -> Metadata:
        metadata = read_metadata(Path(reader.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = reader.load_id
        return metadata

    def load(*args, **kwargs):
        # Said explicitly: an environment variable can turn torch's default off, never an explicit value.
        return unrestricted_load(*args, **{**kwargs, "weights_only": True})

    with patch.object(FileSystemReader, "read_metadata", read_metadata_of), patch.object(torch, "load", load):
        yield
