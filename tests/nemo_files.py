"""Synthetic `.nemo` checkpoints, written to the published layout; no code of the package takes part in the writing.

The layout is that of the released Nemotron-4-340B repositories: an unpacked directory, or the same packed as a tar;
weights as zarr arrays cut as tensor parallelism cuts them, or as torch_dist; layers stacked on the first axis.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import pickle
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_align.checkpoint.nemo.open import open_nemo
from tests.bad_input_tally import tried

EMBEDDING, OUTPUT, HEAD = "embedding.word_embeddings.weight", "output_layer.weight", "rm_head.weight"
_LAYERS = "decoder.layers."
QKV = f"{_LAYERS}self_attention.linear_qkv.weight"
# Which dimension tensor parallelism cuts; what is not named is whole on every rank.
_CUT = {
    EMBEDDING: 0,
    OUTPUT: 0,
    QKV: 1,
    f"{_LAYERS}self_attention.linear_proj.weight": 2,
    f"{_LAYERS}mlp.linear_fc1.weight": 1,
    f"{_LAYERS}mlp.linear_fc2.weight": 2,
    HEAD: 1,
}
_EXTRA_STATES = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
JUNK = pickle.dumps({"recipe": "not to be opened"})


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a model. The defaults are tiny, with heads x head_dim other than hidden and two queries per group."""

    layers: int = 3
    hidden: int = 16
    ffn: int = 24
    heads: int = 4
    groups: int = 2
    head_dim: int | None = 8  # None: kv_channels is null, as published
    tensor: int = 2
    divisible_by: int = 128
    vocabulary: int = 400  # of the tokenizer

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def rows(self) -> int:
        """Of both embeddings, padding included."""
        multiple = self.divisible_by * self.tensor
        return -(-self.vocabulary // multiple) * multiple


PUBLISHED = Sizes(
    layers=96, hidden=18432, ffn=73728, heads=96, groups=8, head_dim=None, tensor=8, vocabulary=256000
)  # fmt: skip


def shapes(sizes: Sizes, *, reward_slots: int = 0) -> dict[str, tuple[int, ...]]:
    """Shape of each stored tensor, by name without `model.`."""
    layers, hidden = sizes.layers, sizes.hidden
    query, fused = sizes.heads * sizes.head_size, (sizes.heads + 2 * sizes.groups) * sizes.head_size
    found = {
        EMBEDDING: (sizes.rows, hidden),
        QKV: (layers, fused, hidden),
        f"{_LAYERS}self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        f"{_LAYERS}self_attention.linear_qkv.layer_norm_bias": (layers, hidden),
        f"{_LAYERS}self_attention.linear_proj.weight": (layers, hidden, query),
        f"{_LAYERS}mlp.linear_fc1.weight": (layers, sizes.ffn, hidden),
        f"{_LAYERS}mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        f"{_LAYERS}mlp.linear_fc1.layer_norm_bias": (layers, hidden),
        f"{_LAYERS}mlp.linear_fc2.weight": (layers, hidden, sizes.ffn),
        "decoder.final_layernorm.weight": (hidden,),
        "decoder.final_layernorm.bias": (hidden,),
        OUTPUT: (sizes.rows, hidden),  # the published reward model has it too
    }
    return found | ({HEAD: (reward_slots, hidden)} if reward_slots else {})


def chunks_of(name: str, shape: tuple[int, ...], tensor: int) -> tuple[int, ...]:
    """One layer, and one tensor-parallel rank's part of it."""
    cut = list(shape)
    if name.startswith(_LAYERS):
        cut[0] = 1
    if name in _CUT:
        cut[_CUT[name]] //= tensor
    return tuple(cut)


def random_tensors(sizes: Sizes, seed: int, *, reward_slots: int = 0) -> dict[str, torch.Tensor]:
    """bfloat16 weights; the padding rows are no zeros, so whoever keeps them is found out."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in shapes(sizes, reward_slots=reward_slots).items()
    }


def zarray(shape: tuple[int, ...], chunks: tuple[int, ...]) -> bytes:
    """The text of a `.zarray`."""
    described = {
        "chunks": list(chunks),
        "compressor": None,
        "dtype": "bfloat16",
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(shape),
        "zarr_format": 2,
    }
    return json.dumps(described, indent=4, sort_keys=True, ensure_ascii=True).encode("ascii")


def boxes(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Place in the grid and part of the tensor, for each chunk."""
    for place in itertools.product(*(range(size // chunk) for size, chunk in zip(shape, chunks, strict=True))):
        yield place, tuple(slice(n * chunk, (n + 1) * chunk) for n, chunk in zip(place, chunks, strict=True))


def raw(tensor: torch.Tensor) -> bytes:
    """Values row by row, little endian."""
    return tensor.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()


def write_zarr(weights: Path, tensors: dict[str, torch.Tensor], tensor_parallel: int, extra_state: bytes) -> None:
    """Fill the folder `model_weights` as Megatron-core's zarr backend did."""
    for name, tensor in tensors.items():
        folder, shape = weights / f"model.{name}", tuple(tensor.shape)
        folder.mkdir()
        chunks = chunks_of(name, shape, tensor_parallel)
        (folder / ".zarray").write_bytes(zarray(shape, chunks))
        for place, box in boxes(shape, chunks):
            (folder / ".".join(map(str, place))).write_bytes(raw(tensor[box]))
    layers = tensors[QKV].shape[0]
    for name in _EXTRA_STATES:
        folder = weights / f"model.{_LAYERS}{name}._extra_state"
        folder.mkdir()
        for layer in range(layers):
            (folder / f"shard_{layer}_{layers}.pt").write_bytes(extra_state)
    write_common(weights, "zarr", extra_state)


def write_torch_dist(weights: Path, tensors: dict[str, torch.Tensor], tensor_parallel: int, extra_state: bytes) -> None:
    """The same by torch itself, each stacked tensor in one piece."""
    layers = tensors[QKV].shape[0]
    state: dict = {f"model.{name}": tensor for name, tensor in tensors.items()}
    for name in _EXTRA_STATES:
        for layer in range(layers):
            state[f"model.{_LAYERS}{name}._extra_state/shard_{layer}_{layers}"] = io.BytesIO(extra_state)
    dcp.save(state, checkpoint_id=weights, no_dist=True)
    write_common(weights, "torch_dist", extra_state)


def write_pieces(weights: Path, tensors: dict[str, torch.Tensor], tensor_parallel: int, extra_state: bytes) -> None:
    """torch_dist as the ranks of a tensor-parallel run leave it: a file per rank, a piece per layer and rank."""
    entries, places = {}, {}
    files = [io.BytesIO() for _ in range(tensor_parallel)]
    for name, tensor in tensors.items():
        shape, key = tuple(tensor.shape), f"model.{name}"
        entries[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), torch.Size(shape), [])
        for number, (_, box) in enumerate(boxes(shape, chunks_of(name, shape, tensor_parallel))):
            piece = tensor[box].contiguous().clone()
            rank = number % tensor_parallel
            start = files[rank].tell()
            torch.save(piece, files[rank])
            files[rank].seek(0, io.SEEK_END)
            offsets = torch.Size([part.start for part in box])
            entries[key].chunks.append(ChunkStorageMetadata(offsets, piece.shape))
            place = _StorageInfo(f"__{rank}_0.distcp", start, files[rank].tell() - start)
            places[MetadataIndex(key, offsets, number)] = place
    for rank, file in enumerate(files):
        (weights / f"__{rank}_0.distcp").write_bytes(file.getvalue())
    (weights / ".metadata").write_bytes(pickle.dumps(Metadata(entries, storage_data=places)))
    write_common(weights, "torch_dist", extra_state)


def write_common(weights: Path, backend: str, common: bytes) -> None:
    """The files that say which backend wrote it."""
    described = {"common_backend": "torch", "common_backend_version": 1}
    described |= {"sharded_backend": backend, "sharded_backend_version": 1}
    (weights / "metadata.json").write_text(json.dumps(described))
    (weights / "common.pt").write_bytes(common)


BACKENDS: dict[str, Callable] = {"zarr": write_zarr, "torch_dist": write_torch_dist, "pieces": write_pieces}


def config_values(sizes: Sizes, variant: str, tokenizer: tuple[str, str]) -> dict:
    """model_config.yaml of the published Base; of Instruct and Reward, what the makers' tools add."""
    values = {
        "mcore_gpt": True,
        "micro_batch_size": 1,
        "global_batch_size": 2308,
        "tensor_model_parallel_size": sizes.tensor,
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": None,
        "encoder_seq_length": 4096,
        "max_position_embeddings": 4096,
        "num_layers": sizes.layers,
        "hidden_size": sizes.hidden,
        "ffn_hidden_size": sizes.ffn,
        "num_attention_heads": sizes.heads,
        "init_method_std": 0.0063,
        "use_scaled_init_method": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
        "kv_channels": sizes.head_dim,
        "apply_query_key_layer_scaling": True,
        "normalization": "layernorm1p",
        "layernorm_epsilon": 1e-05,
        "do_layer_norm_weight_decay": False,
        "make_vocab_size_divisible_by": sizes.divisible_by,
        "pre_process": True,
        "post_process": True,
        "persist_layer_norm": True,
        "bias": False,
        "activation": "squared-relu",
        "headscale": False,
        "transformer_block_type": "pre_ln",
        "openai_gelu": False,
        "normalize_attention_scores": True,
        "position_embedding_type": "rope",
        "rotary_percentage": 0.5,
        "attention_type": "multihead",
        "share_embeddings_and_output_weights": False,
        "num_query_groups": sizes.groups,
        "tokenizer": {
            "library": "sentencepiece",
            "type": None,
            "model": f"nemo:{tokenizer[0]}",
            "delimiter": None,
            "vocab_file": None,
            "merge_file": None,
            "tokenizer_model": f"nemo:{tokenizer[1]}",
            "sentencepiece_legacy": False,
        },
        "native_amp_init_scale": 4294967296,
        "native_amp_growth_interval": 1000,
        "hysteresis": 2,
        "fp32_residual_connection": False,
    }
    if variant == "instruct":
        values["dpo"] = {"preference_loss": "rpo_fwd_kl", "ref_policy_kl_penalty": 0.001, "gt_reward_scale": 1.0}
        values["data"] = {"chat": True, "data_impl": "jsonl"}
        values["answer_only_loss"] = True
    if variant == "reward":
        values |= {"reward_model_type": "regression", "regression": {"num_attributes": 9, "merge_attributes": False}}
    return values


@dataclass
class Nemo:
    """A `.nemo` that was written."""

    path: Path
    sizes: Sizes
    tensors: dict[str, torch.Tensor]  # as stored, by name without `model.`
    tokenizer: bytes
    values: dict = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        return self.path / "model_weights"

    def reconfigure(self, **changes: object) -> None:
        """Change model_config.yaml; a value of ... takes a key out."""
        values = {key: value for key, value in {**self.values, **changes}.items() if value is not ...}
        (self.path / "model_config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def pack(self, path: Path, prefix: str = "./") -> Path:
        """The same as one tar archive, as `tar -cf` makes it inside the folder."""
        with tarfile.open(path, "w") as archive:
            for file in sorted(self.path.rglob("*")):
                archive.add(file, prefix + file.relative_to(self.path).as_posix(), recursive=False)
        return path


def write_nemo(
    path: Path,
    tokenizer: bytes,
    *,
    variant: str = "base",
    backend: str = "zarr",
    sizes: Sizes | None = None,
    seed: int = 5,
    extra_state: bytes = JUNK,
    reward_slots: int = 9,
) -> Nemo:
    """Write the unpacked form. `variant`: base | instruct | reward; `backend`: zarr | torch_dist | pieces."""
    sizes = sizes or Sizes()
    names = [f"{hashlib.md5(salt + tokenizer).hexdigest()}_nemotron_2_256k.model" for salt in (b"a", b"b")]
    (path / "model_weights").mkdir(parents=True)
    for name in names:
        (path / name).write_bytes(tokenizer)
    tensors = random_tensors(sizes, seed, reward_slots=reward_slots if variant == "reward" else 0)
    BACKENDS[backend](path / "model_weights", tensors, sizes.tensor, extra_state)
    (path / "README.md").write_text("# Nemotron\n")
    if variant != "base":
        (path / "LICENSE").touch()
    nemo = Nemo(path, sizes, tensors, tokenizer, config_values(sizes, variant, (names[0], names[1])))
    nemo.reconfigure()
    return nemo


def chunk_bytes(chunks: tuple[int, ...]) -> int:
    """Of one chunk file."""
    return 2 * math.prod(chunks)


def refused(path: Path, message: str | None = None) -> str:
    """Opening it raises nothing but a ValueError that names it; the text."""
    tried[".nemo"] += 1
    with pytest.raises(ValueError, match=message) as caught:
        open_nemo(path)
    assert str(path) in str(caught.value), str(caught.value)
    return str(caught.value)
