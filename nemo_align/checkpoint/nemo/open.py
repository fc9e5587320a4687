"""A `.nemo`, unpacked or packed, as a `Model`.

Weights lie in `model_weights/` as a distributed checkpoint of Megatron-core: zarr arrays in the published ones, or
torch_dist. Names begin with `model.`, and the layers of one kind are stacked on the first axis. `_extra_state` is
Transformer Engine's and is left unread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nemo_align.checkpoint.conversion.model import Model, describe_problems, expected_shapes, files_identity
from nemo_align.checkpoint.huggingface.weight_map import EMBEDDING, HEAD_BIAS, HEAD_WEIGHT, OUTPUT
from nemo_align.checkpoint.keys import EXTRA_STATE, OPTIMIZER_PREFIX
from nemo_align.checkpoint.nemo import model_config as configs
from nemo_align.checkpoint.nemo.tokenizer import find_tokenizer
from nemo_align.checkpoint.safe_reading import METADATA_FILE
from nemo_align.checkpoint.streaming.locations import Files, FolderFiles, TarFiles
from nemo_align.checkpoint.streaming.tensors import Joined, RowSource, Slice, StoredTensor, rows_of
from nemo_align.checkpoint.streaming.torch_dist import COMMON_FILE, CONFIG_FILE, TensorReader
from nemo_align.checkpoint.streaming.zarr import ARRAY_FILE, ZarrArray
from nemo_align.config.choices import HELPSTEER2_WEIGHTS
from nemo_align.data.row_formats.nemo_aligner import LABEL_SLOTS

WEIGHTS = "model_weights/"
_PREFIX = "model."
_LAYERS = "decoder.layers."
_HEAD, _HEAD_BIAS = "rm_head.weight", "rm_head.bias"
KEEP, DROP = "keep", "drop"

Find = Callable[[int | None], StoredTensor]


def open_nemo(path: Path | str, *, unused_attributes: str = DROP) -> Model:
    """Open the `.nemo` in `path`, a directory or an uncompressed tar archive.

    Args:
        unused_attributes: drop | keep the four slots of a nine-slot reward head that HelpSteer2 does not have.

    Raises:
        ValueError: not a `.nemo`, an architecture other than Nemotron-4's (named), tensors missing, left over or of
            another shape (listed), a damaged file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    try:
        return _open(path, FolderFiles(path) if path.is_dir() else TarFiles(path), unused_attributes)
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from None


def _open(path: Path, files: Files, unused_attributes: str) -> Model:
    names = files.names()
    extent = files.find(configs.CONFIG_FILE)
    if extent is None:
        raise ValueError(f"{path} has no {configs.CONFIG_FILE}: it is not a .nemo")
    where = f"{path}/{configs.CONFIG_FILE}"
    values = configs.parse(extent.read(), where)
    arrays = _arrays(files, names)
    reward = _reward(arrays, values, path, unused_attributes)
    shapes = {name: shape for name, (shape, _) in arrays.items()}
    rows = _embedding_rows(shapes, path)
    tokenizer, notes = find_tokenizer(values, files)
    vocabulary, more = _vocabulary(tokenizer, rows, values)
    config = configs.model_config(values, where, name=_name(path), vocab_size=vocabulary)
    if unknown := configs.unknown_keys(values):
        notes.append(f"{where}: keys that are not known and not used: {', '.join(unknown)}")
    tensors, stored = _tensors(arrays, config, reward, path)
    others = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if len(others) > 1:
        notes.append(f"the weights mix {', '.join(sorted(others))}: without dtype= all get the embedding's format")
    ours = (name for name in names if name.startswith(WEIGHTS) or name == configs.CONFIG_FILE)
    read = (name for name in ours if EXTRA_STATE not in name and not name.endswith(COMMON_FILE))
    used = {name: found for name in read if (found := files.find(name)) is not None}
    if tokenizer is not None:
        used["tokenizer"] = tokenizer.extent
    return Model(
        kind="nemo",
        path=path,
        config=config,
        reward=reward,
        tensors=tensors,
        tokenizer=None if tokenizer is None else tokenizer.extent,
        identity=files_identity(used) + (f"-{unused_attributes}" if reward is not None else ""),
        verb=_verb(values, reward),
        notes=[*notes, *more],
        stored=stored,
    )


def stored_name(name: str, layer: int | None = None) -> str:
    """Where a `.nemo` keeps a tensor: its folder (or key, in torch_dist), and the layer of a stack of all layers."""
    return f"{WEIGHTS}{_PREFIX}{name}" + ("" if layer is None else f"[{layer}]")


def published_name(key: str) -> str:
    """Where the published checkpoints keep a tensor of ours: their layers are stacked."""
    if not key.startswith(_LAYERS):
        return stored_name(key)
    layer, _, rest = key.removeprefix(_LAYERS).partition(".")
    return stored_name(f"{_LAYERS}{rest}", int(layer))


def _arrays(files: Files, names: list[str]) -> dict[str, tuple[tuple[int, ...], Find]]:
    """Shape and reader of each stored tensor, by name without `model.`."""
    described = files.find(WEIGHTS + CONFIG_FILE)
    if described is None:
        archives = [name for name in names if name.endswith(".ckpt")]
        raise ValueError(
            f"{files.root} has no {WEIGHTS}{CONFIG_FILE}: "
            + (f"its weights are pickled ({archives[0]}), which are not read" if archives else "it holds no weights")
        )
    try:
        backend = json.loads(described.read())["sharded_backend"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{files.root}/{WEIGHTS}{CONFIG_FILE} is damaged: {error!r}") from None
    found: dict[str, tuple[tuple[int, ...], Find]] = {}
    if backend == "zarr":
        for name in names:
            folder, _, file = name.rpartition("/")
            key = folder.removeprefix(WEIGHTS)
            if file == ARRAY_FILE and folder.startswith(WEIGHTS) and _is_of_the_model(key):
                array = ZarrArray(files, folder + "/")
                found[key] = (array.shape, array.stored)
    elif backend == "torch_dist":
        if files.find(WEIGHTS + METADATA_FILE) is None:
            raise ValueError(f"{files.root}/{WEIGHTS} has no {METADATA_FILE}: it was not copied whole")
        reader = TensorReader(files, WEIGHTS)
        for key in reader.names():
            if _is_of_the_model(key):
                found[key] = (reader.shape(key), lambda layer=None, key=key: reader.stored(key, layer))
    else:
        raise ValueError(
            f"{files.root}/{WEIGHTS}{CONFIG_FILE}: sharded_backend is {backend!r}, zarr and torch_dist are read"
        )
    if not found:
        raise ValueError(f"{files.root}/{WEIGHTS} holds no tensors")
    if twice := [name for name in found if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) in found]:
        raise ValueError(f"{files.root}/{WEIGHTS} holds {twice[0]} twice, with and without {_PREFIX}")
    return {name.removeprefix(_PREFIX): entry for name, entry in found.items()}


def _is_of_the_model(key: str) -> bool:
    return EXTRA_STATE not in key and not key.startswith(OPTIMIZER_PREFIX)


def _embedding_rows(shapes: dict[str, tuple[int, ...]], path: Path) -> int:
    shape = shapes.get(EMBEDDING)
    if shape is None or len(shape) != 2:
        raise ValueError(f"{path} holds no embedding ({WEIGHTS}{_PREFIX}{EMBEDDING})")
    return shape[0]


def _vocabulary(tokenizer, rows: int, values: dict) -> tuple[int, list[str]]:
    """Tokens of the vocabulary: the tokenizer's, if the embedding is it with padding; else all rows."""
    if tokenizer is None:
        return rows, []
    size, multiple = tokenizer.vocab_size, values.get("make_vocab_size_divisible_by") or 128
    tensor = values.get("tensor_model_parallel_size") or 1
    if not all(type(number) is int and 0 < number < 1 << 20 for number in (multiple, tensor)):
        return rows, []
    if rows == -(-size // (multiple * tensor)) * multiple * tensor:
        return size, []
    if rows < size:
        raise ValueError(
            f"the embedding has {rows:,} rows, the tokenizer {size:,} tokens: they do not belong together. Correct "
            f"tokenizer.model in {configs.CONFIG_FILE}"
        )
    return rows, [f"the embedding has {rows:,} rows, the tokenizer {size:,} tokens: all rows are kept"]


def _reward(arrays: dict, values: dict, path: Path, unused: str) -> dict | None:
    """The manifest's entry of a reward head."""
    if _HEAD not in arrays:
        if _HEAD_BIAS in arrays or "reward_model_type" in values:  # a copy cut short must not pass for a policy
            raise ValueError(
                f"{path} is a reward model without its head: missing: {_PREFIX}{_HEAD}. Copy it again, or take "
                f"reward_model_type out of {configs.CONFIG_FILE} to read it as a policy"
            )
        return None
    shape = arrays[_HEAD][0]
    if len(shape) != 2:
        raise ValueError(f"{path}: {_HEAD} has shape {list(shape)}")
    if _HEAD_BIAS in arrays and (found := arrays[_HEAD_BIAS][0]) != shape[:1]:
        raise ValueError(f"{path}: {_HEAD_BIAS} has shape {list(found)}, [{shape[0]}] expected")
    kept = _kept_slots(shape[0], path, unused)
    return {
        "attributes": [name for _, name in kept],
        "weights": {name: HELPSTEER2_WEIGHTS.get(name, 0.0) for _, name in kept},
        "head_bias": _HEAD_BIAS in arrays,
    }


def _kept_slots(count: int, path: Path, unused: str) -> list[tuple[int, str]]:
    """(row of the head, attribute)."""
    if count == len(LABEL_SLOTS):
        return [(row, name) for row, name in enumerate(LABEL_SLOTS) if unused == KEEP or name in HELPSTEER2_WEIGHTS]
    if count == len(HELPSTEER2_WEIGHTS):
        return list(enumerate(HELPSTEER2_WEIGHTS))
    raise ValueError(
        f"{path}: the reward head has {count} outputs; {len(LABEL_SLOTS)} or {len(HELPSTEER2_WEIGHTS)} are known"
    )


def _tensors(arrays: dict, config, reward: dict | None, path: Path) -> tuple[dict[str, RowSource], dict[str, str]]:
    """Tensors by our names, and where each is stored."""
    expected = expected_shapes(config, reward)
    stored: dict[str, str] = {}
    found: dict[str, Find] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (shape, find) in arrays.items():
        if name.startswith(_LAYERS) and not name.removeprefix(_LAYERS).split(".")[0].isdigit():
            if shape[:1] != (config.num_layers,):
                raise ValueError(
                    f"{path}: {name} {list(shape)} does not stack the {config.num_layers} layers that "
                    f"{configs.CONFIG_FILE} says"
                )
            for layer in range(config.num_layers):
                key = f"{_LAYERS}{layer}.{name.removeprefix(_LAYERS)}"
                found[key], shapes[key] = (lambda layer=layer, find=find: find(layer)), shape[1:]
                stored[key] = stored_name(name, layer)
        else:
            found[name], shapes[name] = (lambda find=find: find(None)), shape
            stored[name] = stored_name(name)
    for ours, theirs in ((HEAD_WEIGHT, _HEAD), (HEAD_BIAS, _HEAD_BIAS)):
        if theirs in found:
            found[ours], stored[ours] = found.pop(theirs), stored.pop(theirs)
            slots = shapes.pop(theirs)
            shapes[ours] = (len(reward["attributes"]) if reward else slots[0], *slots[1:])
    # The published reward model ships its output layer, which nothing uses.
    ignored = {OUTPUT} if reward is not None else set()
    if problems := describe_problems(expected, shapes, ignored=ignored, padded=(EMBEDDING, OUTPUT)):
        raise ValueError(
            f"{path} does not hold the model that {configs.CONFIG_FILE} describes: {'; '.join(problems[:8])}"
        )
    tensors = {key: found[key]() for key in expected}
    for key in (HEAD_WEIGHT, HEAD_BIAS):
        if key in tensors and reward is not None:
            tensors[key] = _slots(tensors[key], reward["attributes"], path)
    return {key: rows_of(tensor, 0, expected[key][0]) for key, tensor in tensors.items()}, stored


def _slots(head: RowSource, attributes: list[str], path: Path) -> RowSource:
    rows = [row for row, name in _kept_slots(head.shape[0], path, KEEP) if name in attributes]
    return Joined([Slice(head, row, row + 1) for row in rows])


def _verb(values: dict, reward: dict | None) -> str:
    """Which of our stages made it, as far as the file tells: chat models end a turn where the next begins."""
    if reward is not None:
        return "reward"
    data = values.get("data")
    if values.get("dpo") is not None:
        return "preference"
    return "sft" if isinstance(data, dict) and data.get("chat") else "convert"


def _name(path: Path) -> str:
    return path.resolve().name.removesuffix(".nemo")
