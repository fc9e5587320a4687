"""`.nemo` checkpoints that are damaged or of another architecture: refused, with the file and why."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from nemo_align.checkpoint.conversion.convert import convert
from nemo_align.checkpoint.nemo.open import open_nemo
from nemo_align.config.conversion import ConvertConfig
from tests import nemo_files
from tests.nemo_files import EMBEDDING, HEAD, OUTPUT, QKV, Nemo, refused, write_nemo
from tests.security.planted import Payload, torch_file

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


# model_config.yaml


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation", "swiglu"), ("activation", "squared_relu"), ("activation", ...),
        ("normalization", "layernorm"), ("normalization", "rmsnorm"), ("normalization", ...),
        ("position_embedding_type", "learned_absolute"), ("position_embedding_type", ...),
        ("share_embeddings_and_output_weights", True), ("share_embeddings_and_output_weights", ...),
        ("bias", True), ("bias", 0), ("bias", ...), ("transformer_block_type", "post_ln"), ("mcore_gpt", False),
        ("headscale", True), ("openai_gelu", True), ("onnx_safe", True), ("attention_type", "multiquery"),
        ("rotary_interleaved", True), ("seq_len_interpolation_factor", 2.0), ("window_size", [4096, 0]),
        ("num_moe_experts", 8), ("multi_query_attention", True), ("qk_layernorm", True),
        ("scale_positional_embedding", True), ("normalize_attention_scores", False), ("use_emha", True),
        ("use_avg_pool", True),
    ],
)  # fmt: skip
def test_another_architecture(key: str, value: object, nemo: Nemo) -> None:
    nemo.reconfigure(**{key: value})
    said = refused(nemo.path, f"lacks {key}" if value is ... else f"{key} is {re.escape(repr(value))}")
    assert "the Nemotron-4 architecture has" in said


@pytest.mark.parametrize("key", ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [..., None, 0, -3, 2.5, "many", True, [3], float("nan"), float("inf"), 10**30])
def test_sizes_that_are_none(key: str, value: object, nemo: Nemo) -> None:
    nemo.reconfigure(**{key: value})
    refused(nemo.path, key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, r"does not stack the 4 layers"),
        ({"num_layers": 10**9}, r"1,000,000,000 layers, at most"),
        ({"hidden_size": 32}, r"final_layernorm.weight has shape \[16\], \[32\] expected"),
        ({"ffn_hidden_size": 25}, r"linear_fc1.weight has shape \[24, 16\], \[25, 16\] expected"),
        ({"num_query_groups": 3}, r"describes no model: .*not divisible by model.num_query_groups 3"),
        ({"num_query_groups": 1}, r"linear_qkv.weight has shape \[64, 16\], \[48, 16\] expected"),
        ({"kv_channels": None}, r"linear_qkv.weight has shape \[64, 16\], \[32, 16\] expected"),
        ({"kv_channels": 6}, "RoPE turns an even number"),
        ({"kv_channels": "x"}, "kv_channels is 'x', a number expected"),
        ({"rotary_percentage": 1.5}, r"rotary_percent is 1\.5, but must lie in"),
        ({"rotary_percentage": ...}, "lacks rotary_percentage"),
        ({"rotary_base": 0.5}, "rotary_base is 0.5, a whole number expected"),
        ({"layernorm_epsilon": "tiny"}, "layernorm_epsilon is 'tiny', a number expected"),
        ({"max_position_embeddings": ..., "encoder_seq_length": ...}, "lacks max_position_embeddings"),
        ({"init_method_std": None}, "lacks init_method_std"),
    ],
)
def test_a_configuration_of_another_model(changes: dict, message: str, nemo: Nemo) -> None:
    nemo.reconfigure(**changes)
    refused(nemo.path, message)


ALIASES = "a: &a [x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['touch canary']", "has the tag"),
        ("a: !!python/name:os.system", "has the tag"),
        ("a: !!binary aGVsbG8=", "has the tag"),
        ("a: !!bool maybe", "has the tag"),
        ("a: !local 3", "has the tag"),
        ("a: ! 3", "has the tag"),
        (ALIASES, "line 2 has an alias, which is not read"),
        ("base: &base {a: 1}\nb:\n  <<: *base\n", "has an alias"),
        ("[1, 2]", "holds list, not a table"),
        ("", "holds NoneType, not a table"),
        ("5", "holds int"),
        ("1: 2", "not a table of names"),
        ("a: [", "is not plain YAML"),
        ("a: b: c", "is not plain YAML"),
        ("a: 2001-13-45", "is not plain YAML"),
        ("a: " + "9" * 5000, "is not plain YAML"),
        ("a: \x00", "is not plain YAML"),
        ("? {a: [b]}\n: 3", "is not plain YAML"),
        ("a: " + "[" * 60_000, "line 1 is nested more than 50 levels deep"),
        ("- " * 30_000, "is nested more than 50 levels deep"),
        ("a: x\n---\nb: y\n", "is not plain YAML"),
        ("#" * (1 << 17), "has 131,072 bytes, at most 65,536 are read"),
    ],
)
def test_yaml_that_is_more_than_a_table(text: str, message: str, nemo: Nemo) -> None:
    (nemo.path / "model_config.yaml").write_text(text)
    refused(nemo.path, message)
    assert not Path("canary").exists()


def test_yaml_that_is_no_text(nemo: Nemo) -> None:
    for content in (b"a: \xff\xfe", b"\xff\xfea", bytes(100), pickle.dumps([1])):
        (nemo.path / "model_config.yaml").write_bytes(content)
        refused(nemo.path, "is not plain YAML")
    (nemo.path / "model_config.yaml").unlink()
    refused(nemo.path, "has no model_config.yaml: it is not a .nemo")


@pytest.mark.parametrize("changes", [{"data": None, "dpo": None}, {"data": [1]}, {"dpo": False}, {"data": "chat"}])
def test_keys_of_training_may_hold_anything(changes: dict, nemo: Nemo) -> None:
    nemo.reconfigure(**changes)
    assert open_nemo(nemo.path).verb in ("convert", "preference")


@pytest.mark.parametrize("name", ["nemo:../{}", "nemo:/etc/passwd", "nemo:a/{}", "..", "nemo:", "nemo:.", "../nemo/{}"])
def test_tokenizers_outside_of_the_folder(name: str, nemo: Nemo) -> None:
    file = nemo.values["tokenizer"]["model"].removeprefix("nemo:")
    (nemo.path.parent / file).write_bytes(nemo.tokenizer)
    for key in ("model", "tokenizer_model"):
        nemo.reconfigure(tokenizer={**nemo.values["tokenizer"], key: name.format(file)})
        if name != "nemo:" or key == "model":
            refused(nemo.path, rf"tokenizer\.{key} is .*the name of a file in the .nemo expected")


def test_tokenizers_that_are_none(nemo: Nemo) -> None:
    name = nemo.values["tokenizer"]["model"].removeprefix("nemo:")
    for content in (b"", b"no model", bytes(1000), pickle.dumps([1, 2])):
        (nemo.path / name).write_bytes(content)
        refused(nemo.path, f"{name} is no SentencePiece model")
    with open(nemo.path / name, "wb") as stream:
        stream.truncate(1 << 40)
    refused(nemo.path, "that is no tokenizer")
    (nemo.path / name).unlink()
    refused(nemo.path, f"names {name}, which is not there")
    nemo.reconfigure(tokenizer={**nemo.values["tokenizer"], "model": ["a", 3]})
    refused(nemo.path, "the name of a file|which is not there")


def test_a_tokenizer_of_another_model(nemo: Nemo) -> None:
    nemo.reconfigure(make_vocab_size_divisible_by=64)
    for name in (EMBEDDING, OUTPUT):
        folder = nemo.weights / f"model.{name}"
        (folder / ".zarray").write_bytes(nemo_files.zarray((256, 16), (256, 16)))
        (folder / "0.0").write_bytes(bytes(256 * 16 * 2))
    refused(nemo.path, r"the embedding has 256 rows, the tokenizer 400 tokens: they do not belong together")


# Weights


def test_other_backends(nemo: Nemo) -> None:
    for content, message in (
        (b'{"sharded_backend": "hdf5"}', "sharded_backend is 'hdf5', zarr and torch_dist are read"),
        (b'{"sharded_backend": ["zarr"]}', "sharded_backend is"),
        (b"{}", "metadata.json is damaged"),
        (b"[]", "metadata.json is damaged"),
        (b"7", "metadata.json is damaged"),
        (b"\xff", "metadata.json is damaged"),
        (b"[" * 100_000, "metadata.json is damaged"),
    ):
        (nemo.weights / "metadata.json").write_bytes(content)
        refused(nemo.path, message)
    (nemo.weights / "metadata.json").write_bytes(b'{"sharded_backend": "torch_dist"}')
    refused(nemo.path, r"has no \.metadata: it was not copied whole")
    (nemo.weights / "metadata.json").unlink()
    refused(nemo.path, r"has no model_weights/metadata\.json: it holds no weights")
    shutil.rmtree(nemo.weights)
    canary = nemo.path / "canary"
    (nemo.path / "model_weights.ckpt").write_bytes(torch_file(canary))
    refused(nemo.path, r"its weights are pickled \(model_weights\.ckpt\), which are not read")
    refused(nemo.pack(nemo.path.with_name("x.nemo")), r"its weights are pickled")
    assert not canary.exists()


def test_no_weights_at_all(nemo: Nemo) -> None:
    for folder in nemo.weights.iterdir():
        if folder.is_dir():
            shutil.rmtree(folder)
    refused(nemo.path, "holds no tensors")


@pytest.mark.parametrize("packed", [False, True])
def test_chunks_that_are_missing_or_of_another_length(packed: bool, nemo: Nemo) -> None:
    chunk = nemo.weights / f"model.{QKV}" / "1.0.0"
    content = chunk.read_bytes()

    def path() -> Path:
        return nemo.pack(nemo.path.with_name("packed.nemo")) if packed else nemo.path

    for damaged in (content[:-1], content + b"x", b""):
        chunk.write_bytes(damaged)
        refused(path(), rf"linear_qkv\.weight/1\.0\.0 has {len(damaged):,} bytes, {len(content):,} expected")
    chunk.unlink()
    refused(path(), r"linear_qkv\.weight/1\.0\.0 is missing: the checkpoint was not copied whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compressor": {"id": "blosc"}}, r"compressor is \{'id': 'blosc'\}, only None can be read"),
        ({"filters": []}, "filters is"),
        ({"order": "F"}, "order is 'F', only 'C' can be read"),
        ({"zarr_format": 3}, "zarr_format is 3, only 2 can be read"),
        ({"dtype": "<V2"}, "dtype is '<V2', bfloat16, <f4, <f2 can be read"),
        ({"dtype": "|O"}, "dtype is"),
        ({"dtype": [["a", "<f4"]]}, "dtype is"),
        ({"dtype": {}}, "dtype is"),
        ({"dimension_separator": ".."}, "dimension_separator is"),
        ({"dimension_separator": ["/"]}, "dimension_separator is"),
        ({"shape": [3, -64, 16]}, "make no sense"),
        ({"shape": [3, 64.0, 16]}, "make no sense"),
        ({"shape": [True, 64, 16]}, "make no sense"),
        ({"shape": [3, 64, 0]}, "make no sense"),
        ({"shape": [1 << 60, 64, 16]}, "make no sense"),
        ({"shape": []}, "make no sense"),
        ({"shape": "abc"}, "make no sense"),
        ({"shape": None}, "is damaged"),
        ({"chunks": [1, 32]}, "make no sense"),
        ({"chunks": [1, 32, 16, 1]}, "make no sense"),
        ({"chunks": [1, 0, 16]}, "make no sense"),
        ({"chunks": [1, 30, 16]}, "do not divide"),
        ({"shape": [1 << 40, 64, 16], "chunks": [1, 64, 16]}, "1,099,511,627,776 chunks make no sense"),
        ({"shape": [3, 1 << 16, 16], "chunks": [1, 1, 16]}, "chunks make no sense"),
        ({"shape": [3, 64, 2048], "chunks": [3, 64, 1]}, "chunks make no sense"),
        ({"shape": [3, 64, 32]}, r"1\.0\.1 is missing|0\.0\.1 is missing|shape"),
        ({"shape": [4, 64, 16]}, "does not stack the 3 layers"),
        ({"shape": [3, 64], "chunks": [1, 32]}, "shape"),
        ({"shape": [64], "chunks": [64]}, "does not stack the 3 layers"),
    ],
)
def test_descriptions_of_arrays(changes: dict, message: str, nemo: Nemo) -> None:
    path = nemo.weights / f"model.{QKV}" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))
    refused(nemo.path, message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff", b"{}", b"[" * 60_000, b" " * (1 << 17), bytes(9)])
def test_descriptions_that_are_no_json(content: bytes, nemo: Nemo) -> None:
    (nemo.weights / f"model.{QKV}" / ".zarray").write_bytes(content)
    refused(nemo.path, r"linear_qkv\.weight/\.zarray (is damaged|has 131,072 bytes)")


@pytest.mark.parametrize("backend", nemo_files.BACKENDS)
def test_missing_and_left_over_tensors_are_listed(backend: str, tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "full", tokenizer)
    other = write_nemo(tmp_path / "other", tokenizer)
    tensors = dict(nemo.tensors)
    del tensors["decoder.layers.mlp.linear_fc1.weight"], tensors["decoder.final_layernorm.bias"]
    tensors["decoder.layers.mlp.linear_fc3.weight"] = torch.ones(3, 2).bfloat16()
    tensors["extra"] = torch.ones(2).bfloat16()
    shutil.rmtree(other.weights)
    other.weights.mkdir()
    nemo_files.BACKENDS[backend](other.weights, tensors, 2, b"junk")
    said = refused(other.path, "does not hold the model that model_config.yaml describes")
    missing = ["decoder.final_layernorm.bias", *(f"decoder.layers.{n}.mlp.linear_fc1.weight" for n in range(3))]
    left = [*(f"decoder.layers.{n}.mlp.linear_fc3.weight" for n in range(3)), "extra"]
    assert f"missing: {', '.join(missing)} (4 in all); left over: {', '.join(left)} (4 in all)" in said
    assert not (tmp_path / "out").exists()


def test_a_model_without_an_embedding(nemo: Nemo) -> None:
    shutil.rmtree(nemo.weights / f"model.{EMBEDDING}")
    refused(nemo.path, r"holds no embedding \(model_weights/model.embedding")


def test_a_tensor_under_two_names(nemo: Nemo) -> None:
    shutil.copytree(nemo.weights / f"model.{OUTPUT}", nemo.weights / OUTPUT)
    refused(nemo.path, r"holds model\.output_layer\.weight twice")


def test_reward_heads_that_are_none(reward: Nemo) -> None:
    head = reward.weights / f"model.{HEAD}"
    bias = reward.weights / "model.rm_head.bias"
    bias.mkdir()
    (bias / "0").write_bytes(bytes(10))
    (bias / ".zarray").write_bytes(nemo_files.zarray((5,), (5,)))
    refused(reward.path, r"rm_head\.bias has shape \[5\], \[9\] expected")
    shutil.rmtree(bias)
    for shape, message in (
        ((7, 16), "the reward head has 7 outputs; 9 or 5 are known"),
        ((9,), "rm_head.weight has shape"),
        ((9, 8), r"reward_head\.weight has shape \[5, 8\], \[5, 16\] expected"),
    ):
        (head / ".zarray").write_bytes(nemo_files.zarray(shape, shape))
        refused(reward.path, message)
    shutil.rmtree(head)
    refused(reward.path, r"is a reward model without its head: missing: model\.rm_head\.weight\. Copy it again")
    reward.reconfigure(reward_model_type=...)
    assert open_nemo(reward.path).reward is None


# Through `convert`


def test_refusals_write_nothing(nemo: Nemo, tmp_path: Path) -> None:
    def settings(source: Path) -> ConvertConfig:
        return ConvertConfig(
            source=str(source), target=str(tmp_path / "out"), source_format="nemo", target_format="megatron"
        )

    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        convert(settings(tmp_path / "nowhere"))
    (nemo.path / "model_config.yaml").write_text(yaml.safe_dump({**nemo.values, "bias": True}))
    with pytest.raises(ValueError, match="bias is True"):
        convert(settings(nemo.path))
    assert {path.name for path in tmp_path.iterdir()} == before


def test_extra_state_is_never_opened(tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary, opened, real = tmp_path / "canary", [], os.open

    def watched(path, *arguments, **options) -> int:
        opened.append(str(path))
        return real(path, *arguments, **options)

    for backend in nemo_files.BACKENDS:
        nemo = write_nemo(tmp_path / backend, tokenizer, backend=backend, extra_state=pickle.dumps(Payload(canary)))
        target = str(tmp_path / "out" / backend)
        monkeypatch.setattr(os, "open", watched)
        convert(ConvertConfig(source=str(nemo.path), target=target, source_format="nemo", target_format="hf"))
        monkeypatch.setattr(os, "open", real)
    assert f"{nemo.path}/model_weights/__0_0.distcp" in opened
    assert not any("._extra_state" in path or path.endswith("common.pt") for path in opened)
    assert not canary.exists()
