"""Pickles, names and YAML planted in a `.nemo`, unpacked or packed: `convert` and `inspect` run nothing of it."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_align.checkpoint.conversion.convert import convert
from nemo_align.checkpoint.conversion.inspect import inspect
from nemo_align.config.conversion import ConvertConfig, InspectConfig
from tests.distributed.checkpoint_runs import train_tokenizer
from tests.nemo_files import EMBEDDING, Nemo, write_nemo
from tests.security import planted

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model."""
    return (Path(train_tokenizer(tmp_path_factory.mktemp("nemo_tokenizer"))) / "tokenizer.model").read_bytes()


def everything(path: Path, target: Path) -> list[Callable[[], object]]:
    """What a user may do with a `.nemo`."""

    def to(form: str) -> Callable[[], object]:
        config = ConvertConfig(
            source=str(path), target=str(target / form), source_format="nemo", target_format=form, verify="true"
        )
        return lambda: convert(config)

    return [to("megatron"), to("hf"), lambda: inspect(InspectConfig(path=str(path), tensors=True, checksums=True))]


def all_refuse(path: Path, target: Path) -> None:
    for action in everything(path, target):
        with pytest.raises(ValueError) as caught:
            action()
        assert str(path) in str(caught.value), str(caught.value)
    assert not target.exists() or not list(target.iterdir())


# Where -> (backend, what is put there, whether it is ever read)
def put(file: str) -> Callable[[Nemo, bytes], None]:
    def write(nemo: Nemo, content: bytes) -> None:
        path = nemo.path / file.format(tokenizer=nemo.values["tokenizer"]["model"].removeprefix("nemo:"))
        assert path.exists()
        path.write_bytes(content)

    return write


def into_a_piece(nemo: Nemo, content: bytes) -> None:
    """In place of a tensor's archive, with the metadata to match."""
    path = nemo.weights / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    place = next(info for index, info in metadata.storage_data.items() if index.fqn == f"model.{EMBEDDING}")
    place.offset, place.length = (nemo.weights / place.relative_path).stat().st_size, len(content)
    with open(nemo.weights / place.relative_path, "ab") as stream:
        stream.write(content)
    path.write_bytes(pickle.dumps(metadata))


def into_planner_data(nemo: Nemo, content: bytes) -> None:
    """Inside otherwise good metadata, as nested bytes would not be: the object itself."""
    path = nemo.weights / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = planted.Payload(nemo.path.parent / "canary")
    path.write_bytes(pickle.dumps(metadata))


READ = {
    "metadata": ("torch_dist", put("model_weights/.metadata")),
    "planner data": ("torch_dist", into_planner_data),
    "a tensor": ("torch_dist", into_a_piece),
    "metadata.json": ("zarr", put("model_weights/metadata.json")),
    "an array's description": ("zarr", put(f"model_weights/model.{EMBEDDING}/.zarray")),
    "a chunk": ("zarr", put(f"model_weights/model.{EMBEDDING}/0.0")),
    "the configuration": ("zarr", put("model_config.yaml")),
    "the tokenizer": ("zarr", put("{tokenizer}")),
}


@pytest.mark.parametrize("kind", planted.PICKLES)
@pytest.mark.parametrize("place", READ)
def test_where_something_is_read(place: str, kind: str, tokenizer: bytes, tmp_path: Path) -> None:
    backend, plant = READ[place]
    canary = tmp_path / "canary"
    nemo = write_nemo(tmp_path / "nemo", tokenizer, backend=backend)
    plant(nemo, planted.PICKLES[kind](canary))
    all_refuse(nemo.path, tmp_path / "out")
    all_refuse(nemo.pack(tmp_path / "packed.nemo"), tmp_path / "out")
    assert not canary.exists()


@pytest.mark.parametrize("kind", planted.PICKLES)
@pytest.mark.parametrize("backend", ["zarr", "torch_dist"])
def test_where_nothing_is_read(backend: str, kind: str, tokenizer: bytes, tmp_path: Path) -> None:
    """`_extra_state` (files, and byte entries of torch_dist), common.pt, and whatever else lies there."""
    canary = tmp_path / "canary"
    content = planted.PICKLES[kind](canary)
    nemo = write_nemo(tmp_path / "nemo", tokenizer, backend=backend, extra_state=content)
    assert (nemo.weights / "common.pt").read_bytes() == content
    for name in ("model_weights.ckpt", "sitecustomize.py", "model_weights/optimizer.pt"):
        (nemo.path / name).write_bytes(content)
    for path, target in ((nemo.path, "out"), (nemo.pack(tmp_path / "packed.nemo"), "packed_out")):
        for action in everything(path, tmp_path / target):
            action()
    assert not canary.exists()
    copied = [path for path in tmp_path.rglob("*") if "out" in path.parts[-3:] and path.suffix in (".ckpt", ".py")]
    assert copied == []


@pytest.mark.parametrize("kind", planted.PICKLES)
def test_weights_that_are_a_pickle(kind: str, tokenizer: bytes, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    nemo = write_nemo(tmp_path / "nemo", tokenizer)
    (nemo.weights / "metadata.json").unlink()
    (nemo.path / "model_weights.ckpt").write_bytes(planted.PICKLES[kind](canary))
    all_refuse(nemo.path, tmp_path / "out")
    all_refuse(nemo.pack(tmp_path / "packed.nemo"), tmp_path / "out")
    assert not canary.exists()


@pytest.mark.parametrize("name", planted.ARCHIVES)
def test_archives(name: str, tmp_path: Path) -> None:
    path, canary = tmp_path / "in" / name, tmp_path / "canary"
    path.parent.mkdir()
    path.write_bytes(planted.ARCHIVES[name](canary))
    all_refuse(path, tmp_path / "out")
    assert {found.name for found in tmp_path.iterdir()} <= {"in", "out"}


@pytest.mark.parametrize("kind", ["above", "absolute", "link", "hard link"])
def test_members_that_lead_outside(kind: str, tokenizer: bytes, tmp_path: Path) -> None:
    """In an otherwise good archive: nothing appears outside, and what lies there is not read as weights."""
    nemo = write_nemo(tmp_path / "nemo", tokenizer)
    path = nemo.pack(tmp_path / "packed.nemo")
    secret = tmp_path / "secret"
    secret.write_bytes((nemo.weights / f"model.{EMBEDDING}" / "0.0").read_bytes())
    member = tarfile.TarInfo({"above": "../canary", "absolute": str(tmp_path / "canary")}.get(kind, "linked"))
    if "link" in kind:
        member.type = tarfile.SYMTYPE if kind == "link" else tarfile.LNKTYPE
        member.linkname = str(secret)
    with tarfile.open(path, "a") as archive:
        archive.addfile(member)
    all_refuse(path, tmp_path / "out")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:pathlib.Path.touch\n- !!python/object/apply:pathlib.Path [{canary}]\n",
        "num_layers: !!python/object/apply:os.system ['touch {canary}']\n",
        "num_layers: !!python/name:os.system\n",
        "num_layers: ${{oc.env:HOME}}\n",
        "_target_: os.system\ncommand: touch {canary}\n",
    ],
)
def test_yaml_that_names_code(text: str, tokenizer: bytes, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    nemo = write_nemo(tmp_path / "nemo", tokenizer)
    (nemo.path / "model_config.yaml").write_text(text.format(canary=canary))
    all_refuse(nemo.path, tmp_path / "out")
    assert not canary.exists()
