"""The torch_dist form of a `.nemo`, its `.metadata` forged or damaged: refused, and nothing of it runs."""

from __future__ import annotations

import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from nemo_align.checkpoint.nemo.open import open_nemo
from tests import nemo_files
from tests.bad_input_tally import tried
from tests.nemo_files import QKV, Nemo, refused, write_nemo

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def forge(nemo: Nemo, change: Callable) -> None:
    path = nemo.weights / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


KEY = f"model.{QKV}"


def of_a_place(**changes: object) -> Callable:
    def change(metadata) -> None:
        place = next(info for index, info in metadata.storage_data.items() if index.fqn == KEY)
        vars(place).update(changes)

    return change


def of_the_entry(**changes: object) -> Callable:
    return lambda metadata: vars(metadata.state_dict_metadata[KEY]).update(changes)


def of_a_chunk(**changes: object) -> Callable:
    return lambda metadata: vars(metadata.state_dict_metadata[KEY].chunks[1]).update(changes)


def replace_scalar(metadata) -> None:
    entry = metadata.state_dict_metadata[KEY]
    entry.size, entry.chunks = torch.Size([]), []


def odd_index(metadata) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == KEY)
    metadata.storage_data[MetadataIndex(KEY, torch.Size([5, 5, 5]))] = metadata.storage_data.pop(index)


@pytest.mark.parametrize(
    "change",
    [
        of_a_place(relative_path="../x"), of_a_place(relative_path="/etc/passwd"), of_a_place(relative_path=3),
        of_a_place(relative_path="__9_0.distcp"), of_a_place(relative_path="a\0b"), of_a_place(relative_path=""),
        of_a_place(offset=-1), of_a_place(offset=1 << 60), of_a_place(offset="0"), of_a_place(offset=None),
        of_a_place(offset=7), of_a_place(length=10), of_a_place(length=1 << 60), of_a_place(length=2.5),
        of_a_place(transform_descriptors=["zstd"]),
        of_the_entry(size=torch.Size([3, 64, 32])), of_the_entry(size=(3, "64", 16)), of_the_entry(size=None),
        of_the_entry(size=torch.Size([1 << 60, 64, 16])), of_the_entry(size=torch.Size([3, 64])), replace_scalar,
        of_the_entry(chunks=None), of_the_entry(chunks=[]), of_the_entry(chunks=[None]), of_the_entry(properties=None),
        lambda metadata: vars(metadata.state_dict_metadata[KEY].properties).update(dtype=torch.int64),
        lambda metadata: vars(metadata.state_dict_metadata[KEY].properties).update(dtype="bf16"),
        of_a_chunk(offsets=torch.Size([0, 0, 0])), of_a_chunk(offsets=torch.Size([0, 0])), of_a_chunk(offsets=None),
        of_a_chunk(sizes=torch.Size([1, 32, 8])), of_a_chunk(sizes=torch.Size([2, 32, 16])), of_a_chunk(sizes=5),
        lambda metadata: vars(metadata).update(state_dict_metadata=None),
        lambda metadata: vars(metadata).update(state_dict_metadata=[1]),
        lambda metadata: vars(metadata).update(storage_data=None),
        lambda metadata: vars(metadata).update(storage_data={1: 2}),
        lambda metadata: vars(metadata).update(storage_data=[]),
        lambda metadata: metadata.state_dict_metadata.update({7: metadata.state_dict_metadata[KEY]}),
        lambda metadata: metadata.state_dict_metadata.update({KEY: 5}),
        odd_index,
    ],
)  # fmt: skip
def test_metadata_that_make_no_sense(change: Callable, tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "nemo", tokenizer, backend="pieces")
    forge(nemo, change)
    refused(nemo.path)


def test_integers_are_no_weights(tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "nemo", tokenizer)
    tensors = nemo.tensors | {"decoder.final_layernorm.bias": torch.ones(16, dtype=torch.int64)}
    shutil.rmtree(nemo.weights)
    nemo.weights.mkdir()
    nemo_files.write_torch_dist(nemo.weights, tensors, 2, b"junk")
    refused(nemo.path, r"final_layernorm\.bias is torch\.int64, only fp32, bf16, fp16 is read")


def test_metadata_flipped_anywhere(tokenizer: bytes, tmp_path: Path) -> None:
    """Refused, or read: never another exception. What is read is compared when it is converted."""
    nemo = write_nemo(tmp_path / "nemo", tokenizer, backend="torch_dist")
    path = nemo.weights / ".metadata"
    content, randomly, said = path.read_bytes(), random.Random(2), []
    for _ in range(150):
        tried[".nemo"] += 1
        damaged = bytearray(content)
        damaged[randomly.randrange(len(content))] ^= randomly.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            open_nemo(nemo.path)
        except ValueError as error:
            said.append(str(error))
    assert len(said) > 50 and all(str(nemo.path) in one for one in said)
    for length in range(0, len(content), 211):
        path.write_bytes(content[:length])
        refused(nemo.path, r"\.metadata is refused")
