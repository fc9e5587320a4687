"""`.nemo` checkpoints in the published layout, to both formats: every tensor bit for bit, worked out here in torch."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from nemo_align.checkpoint.conversion.convert import convert
from nemo_align.checkpoint.nemo.open import open_nemo
from nemo_align.checkpoint.safe_reading import read_metadata
from nemo_align.checkpoint.store import read_manifest
from nemo_align.checkpoint.streaming import transfer
from nemo_align.config.conversion import ConvertConfig
from nemo_align.config.hf_model import hf_model_config, hf_reward_config
from nemo_align.data.tokenizer import load_tokenizer
from tests import nemo_files
from tests.nemo_files import EMBEDDING, HEAD, OUTPUT, PUBLISHED, QKV, Nemo, Sizes, write_nemo

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:Detected an existing checkpoint"
)

KEPT = ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
WEIGHTS = [0.3, 0.74, 0.46, 0.47, -0.33]
ALL_SLOTS = ["quality", "toxicity", "humor", "creativity", *KEPT]


def run(source: Path, target: Path, to: str, **changes) -> Path:
    settings = {"source_format": "nemo", "target_format": to, "verify": "true"} | changes
    made = convert(ConvertConfig(source=str(source), target=str(target), **settings))
    assert made == target
    return made


# The mapping, once more


def hf_tensors(nemo: Nemo) -> dict[str, Tensor]:
    """What Hugging Face's folder must hold."""
    sizes, stored = nemo.sizes, nemo.tensors
    heads, groups, size = sizes.heads, sizes.groups, sizes.head_size
    found = {
        "model.embed_tokens.weight": stored[EMBEDDING][: sizes.vocabulary],
        "model.norm.weight": stored["decoder.final_layernorm.weight"],
        "model.norm.bias": stored["decoder.final_layernorm.bias"],
        "lm_head.weight": stored[OUTPUT][: sizes.vocabulary],
    }
    queries = heads // groups
    key_rows = torch.arange(queries, heads + 2 * groups, queries + 2)
    query_rows = [row for row in range(heads + 2 * groups) if row % (queries + 2) < queries]
    for layer in range(sizes.layers):
        ours, theirs = f"model.layers.{layer}.", "decoder.layers."
        fused = stored[QKV][layer].reshape(heads + 2 * groups, size, sizes.hidden)
        found[f"{ours}self_attn.q_proj.weight"] = fused[query_rows].reshape(heads * size, -1)
        found[f"{ours}self_attn.k_proj.weight"] = fused[key_rows].reshape(groups * size, -1)
        found[f"{ours}self_attn.v_proj.weight"] = fused[key_rows + 1].reshape(groups * size, -1)
        for name, other in (
            ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            ("input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias"),
            ("self_attn.o_proj.weight", "self_attention.linear_proj.weight"),
            ("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
            ("post_attention_layernorm.bias", "mlp.linear_fc1.layer_norm_bias"),
            ("mlp.up_proj.weight", "mlp.linear_fc1.weight"),
            ("mlp.down_proj.weight", "mlp.linear_fc2.weight"),
        ):
            found[ours + name] = stored[theirs + other][layer]
    return found


def megatron_tensors(nemo: Nemo) -> dict[str, Tensor]:
    """What a checkpoint of ours must hold: without padding, layer by layer."""
    found = {}
    for name, tensor in nemo.tensors.items():
        if name.startswith("decoder.layers."):
            for layer in range(nemo.sizes.layers):
                found[name.replace("decoder.layers.", f"decoder.layers.{layer}.")] = tensor[layer]
        elif name in (EMBEDDING, OUTPUT):
            found[name] = tensor[: nemo.sizes.vocabulary]
        else:
            found[name] = tensor
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    return True


def load_hf(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def load_megatron(folder: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """By torch's own reader."""
    assert read_metadata(folder).state_dict_metadata.keys() == expected.keys()
    found = {key: torch.empty_like(tensor) for key, tensor in expected.items()}
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


# The published layout


@pytest.mark.parametrize(
    ("name", "described", "chunk", "files"),
    [
        ("decoder.final_layernorm.weight", 209, 36_864, ["0"]),
        ("decoder.final_layernorm.bias", 209, 36_864, ["0"]),
        (HEAD, 230, 41_472, [f"0.{t}" for t in range(8)]),
        ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", 232, 36_864, [f"{n}.0" for n in range(96)]),
        ("decoder.layers.mlp.linear_fc1.layer_norm_bias", 232, 36_864, [f"{n}.0" for n in range(96)]),
        (EMBEDDING, 240, 1_179_648_000, [f"{t}.0" for t in range(8)]),
        (OUTPUT, 240, 1_179_648_000, [f"{t}.0" for t in range(8)]),
        (QKV, 261, 99_090_432, [f"{n}.{t}.0" for n in range(96) for t in range(8)]),
        ("decoder.layers.self_attention.linear_proj.weight", 261, 84_934_656,
         [f"{n}.0.{t}" for n in range(96) for t in range(8)]),
        ("decoder.layers.mlp.linear_fc1.weight", 261, 339_738_624,
         [f"{n}.{t}.0" for n in range(96) for t in range(8)]),
        ("decoder.layers.mlp.linear_fc2.weight", 261, 339_738_624,
         [f"{n}.0.{t}" for n in range(96) for t in range(8)]),
    ],
)  # fmt: skip
def test_the_writer_of_these_tests_has_the_published_sizes(
    name: str, described: int, chunk: int, files: list[str]
) -> None:
    shape = nemo_files.shapes(PUBLISHED, reward_slots=9)[name]
    chunks = nemo_files.chunks_of(name, shape, PUBLISHED.tensor)
    assert len(nemo_files.zarray(shape, chunks)) == described
    assert nemo_files.chunk_bytes(chunks) == chunk
    assert [".".join(map(str, place)) for place, _ in nemo_files.boxes(shape, chunks)] == files


def test_the_published_model_has_682_gigabytes() -> None:
    shapes = nemo_files.shapes(PUBLISHED)
    assert 2 * sum(map(math.prod, shapes.values())) == 682_058_391_552 and PUBLISHED.rows == 256_000


def test_all_of_the_published_model_in_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files in full length, without a value in them."""
    weights = tmp_path / "Nemotron-4-340B-Base" / "model_weights"
    weights.mkdir(parents=True)
    for name, shape in nemo_files.shapes(PUBLISHED).items():
        chunks = nemo_files.chunks_of(name, shape, PUBLISHED.tensor)
        (weights / f"model.{name}").mkdir()
        (weights / f"model.{name}" / ".zarray").write_bytes(nemo_files.zarray(shape, chunks))
        for place, _ in nemo_files.boxes(shape, chunks):
            path = weights / f"model.{name}" / ".".join(map(str, place))
            path.touch()
            os.truncate(path, nemo_files.chunk_bytes(chunks))
    nemo_files.write_common(weights, "zarr", b"")
    values = nemo_files.config_values(PUBLISHED, "base", ("", "")) | {"tokenizer": None}
    nemo = Nemo(weights.parent, PUBLISHED, {}, b"", values)
    nemo.reconfigure()
    for to, tensors in (("megatron", 772), ("hf", 964)):
        config = ConvertConfig(source=str(nemo.path), source_format="nemo", target_format=to, plan=True)
        assert convert(config) is None
        shown = capsys.readouterr().out
        assert f"{tensors} tensors with 682,058,391,552 bytes" in shown
        stored = set(re.findall(r"model_weights/(model\.[^ \[]+)", shown))
        assert stored == {path.name for path in weights.iterdir() if path.is_dir()}
        assert "model_weights/model.decoder.layers.mlp.linear_fc2.weight[95]" in shown
        # Before anything is downloaded the plan says the same.
        convert(ConvertConfig(architecture="nemotron4_340b", source_format="nemo", target_format=to, plan=True))
        assert stored == set(re.findall(r"model_weights/(model\.[^ \[]+)", capsys.readouterr().out))


# Conversions


@pytest.mark.parametrize("backend", nemo_files.BACKENDS)
@pytest.mark.parametrize("variant", ["base", "instruct"])
def test_a_policy(variant: str, backend: str, tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "Nemotron-tiny", tokenizer, variant=variant, backend=backend)
    assert nemo.tensors[EMBEDDING].shape[0] == 512 > nemo.sizes.vocabulary
    assert open_nemo(nemo.path).notes == []  # every documented key is known
    hf = run(nemo.path, tmp_path / "hf", "hf")
    assert same(load_hf(hf), hf_tensors(nemo))
    megatron = run(nemo.path, tmp_path / "megatron", "megatron")
    expected = megatron_tensors(nemo)
    assert same(load_megatron(megatron, expected), expected)
    packed = run(nemo.pack(tmp_path / "Nemotron-tiny.nemo"), tmp_path / "packed", "hf", shard_size="4KB")
    assert same(load_hf(packed), hf_tensors(nemo)) and len(list(packed.glob("*.safetensors"))) > 3
    config, verb = hf_model_config(hf), {"base": "convert", "instruct": "preference"}[variant]
    manifest = read_manifest(megatron)
    assert (config.head_dim, config.num_query_groups, config.vocab_size) == (8, 2, 400)
    assert (config.rotary_percent, config.rotary_base, config.layernorm_epsilon) == (0.5, 10000, 1e-5)
    assert (config.init_std, config.max_sequence_length) == (0.0063, 4096)
    assert manifest["model"] | {"name": ""} == vars(config) | {"name": ""}
    assert manifest["model"]["name"] == open_nemo(tmp_path / "Nemotron-tiny.nemo").config.name == "Nemotron-tiny"
    assert (manifest["dtype"], manifest["reward"], manifest["verb"]) == ("bf16", None, verb)
    for folder in (hf, packed, megatron / "tokenizer"):
        assert (folder / "tokenizer.model").read_bytes() == tokenizer
        assert load_tokenizer(folder).vocab_size == 400
    stops = json.loads((hf / "generation_config.json").read_text())["eos_token_id"]
    assert len(stops) == {"base": 1, "instruct": 2}[variant]  # a chat model's turn ends where the next begins


@pytest.mark.parametrize("backend", nemo_files.BACKENDS)
@pytest.mark.parametrize("unused", ["drop", "keep"])
def test_a_reward_model(unused: str, backend: str, tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "reward", tokenizer, variant="reward", backend=backend)
    names, rows = (KEPT, slice(4, 9)) if unused == "drop" else (ALL_SLOTS, slice(0, 9))
    weights = dict.fromkeys(ALL_SLOTS[:4], 0.0) | dict(zip(KEPT, WEIGHTS, strict=True))
    source = nemo.path if unused == "drop" else nemo.pack(tmp_path / "reward.nemo", prefix="")
    hf = run(source, tmp_path / "hf", "hf", unused_attributes=unused)
    head = nemo.tensors[HEAD][rows]
    expected = hf_tensors(nemo) | {"score.weight": head.float()}
    del expected["lm_head.weight"]  # unused in the published model
    for name in ("model.norm.weight", "model.norm.bias"):
        expected[name] = expected[name].float()
    assert same(load_hf(hf), expected)
    reward = hf_reward_config(hf)
    assert reward is not None and reward.attributes == names and not reward.head_bias
    assert reward.weights == {name: weights[name] for name in names}
    megatron = run(source, tmp_path / "megatron", "megatron", unused_attributes=unused)
    expected = megatron_tensors(nemo) | {"reward_head.weight": head.float()}
    del expected[OUTPUT], expected[HEAD]
    assert same(load_megatron(megatron, expected), expected)
    manifest = read_manifest(megatron)
    assert manifest["reward"] == {"attributes": names, "weights": reward.weights, "head_bias": False}
    assert manifest["verb"] == "reward"


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_conversion_that_is_struck_goes_on(
    to: str, tokenizer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same bytes, wherever it was struck."""
    nemo = write_nemo(tmp_path / "nemo", tokenizer, variant="reward")
    undisturbed, write = contents(run(nemo.path, tmp_path / "undisturbed", to)), transfer.write
    for number, after in enumerate((0, 1, 5, 11, 20)):
        left = [after]

        def struck(*arguments, left=left) -> str:
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("struck")
            return write(*arguments)

        monkeypatch.setattr(transfer, "write", struck)
        with pytest.raises(RuntimeError, match="struck"):
            run(nemo.path, tmp_path / str(number), to)
        assert not (tmp_path / str(number)).exists()
        monkeypatch.setattr(transfer, "write", write)
        assert contents(run(nemo.path, tmp_path / str(number), to)) == undisturbed
    assert not list(tmp_path.glob(".tmp-*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_option_for_unused_attributes_is_part_of_the_job(tokenizer: bytes, tmp_path: Path) -> None:
    """Not "converted before, left alone"."""
    nemo = write_nemo(tmp_path / "reward", tokenizer, variant="reward")
    run(nemo.path, tmp_path / "out", "megatron", unused_attributes="drop")
    run(nemo.path, tmp_path / "out", "megatron", unused_attributes="drop")
    with pytest.raises(ValueError, match=r"out exists already"):
        run(nemo.path, tmp_path / "out", "megatron", unused_attributes="keep")


def test_a_head_with_a_bias_and_five_slots(tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "reward", tokenizer, variant="reward", reward_slots=5)
    bias = torch.randn(5).bfloat16()
    folder = nemo.weights / "model.rm_head.bias"
    folder.mkdir()
    (folder / ".zarray").write_bytes(nemo_files.zarray((5,), (5,)))
    (folder / "0").write_bytes(nemo_files.raw(bias))
    made = run(nemo.path, tmp_path / "out", "megatron")
    expected = megatron_tensors(nemo)
    del expected[OUTPUT]
    expected |= {"reward_head.weight": expected.pop(HEAD).float(), "reward_head.bias": bias.float()}
    assert same(load_megatron(made, expected), expected)
    assert read_manifest(made)["reward"]["attributes"] == KEPT
    back = run(nemo.path, tmp_path / "hf", "hf")
    kept = load_file(back / "reward_head.safetensors")
    assert torch.equal(kept["weight"], nemo.tensors[HEAD]) and torch.equal(kept["bias"], bias)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(head_dim=None, heads=4, groups=1, tensor=1, layers=1),  # kv_channels null, one group
        Sizes(hidden=8, heads=6, groups=3, head_dim=4, tensor=3, ffn=12, divisible_by=1),  # 402 rows
        Sizes(
            hidden=32, heads=4, groups=4, head_dim=4, tensor=4, divisible_by=100
        ),  # no padding, heads x size < hidden
    ],
)
def test_other_sizes_and_layouts(sizes: Sizes, tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "nemo", tokenizer, sizes=sizes)
    made = run(nemo.path, tmp_path / "out", "hf")
    assert same(load_hf(made), hf_tensors(nemo))
    fp32 = run(nemo.path, tmp_path / "fp32", "hf", dtype="fp32")
    assert same(load_hf(fp32), {name: tensor.float() for name, tensor in hf_tensors(nemo).items()})


def test_layers_stored_one_by_one(tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "nemo", tokenizer, backend="torch_dist")
    expected = megatron_tensors(nemo)
    flat = {f"model.{name}": tensor for name, tensor in expected.items()}
    dcp.save(flat, checkpoint_id=nemo.weights, no_dist=True)
    made = run(nemo.path, tmp_path / "out", "megatron")
    assert same(load_megatron(made, expected), expected)


def test_a_vocabulary_that_padding_does_not_explain_is_kept_whole(tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "nemo", tokenizer)
    nemo.reconfigure(make_vocab_size_divisible_by=48)  # 400 tokens would be 480 rows
    model = open_nemo(nemo.path)
    assert model.notes == ["the embedding has 512 rows, the tokenizer 400 tokens: all rows are kept"]
    assert model.config.vocab_size == 512
    nemo.reconfigure(tokenizer={"library": "megatron", "type": "GPT2BPETokenizer"})
    model = open_nemo(nemo.path)
    assert model.config.vocab_size == 512 and model.tokenizer is None
    assert model.notes == ["the tokenizer's library is 'megatron', only sentencepiece is read: the result has none"]
    made = run(nemo.path, tmp_path / "out", "megatron")
    assert read_manifest(made)["tokenizer"] is None


def test_unknown_keys_are_reported(tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "nemo", tokenizer)
    nemo.reconfigure(zeta_scaling=3, alpha={"of": "nothing"}, layernorm_epsilon="1e-5", rotary_base=None)
    model = open_nemo(nemo.path)
    assert model.notes == [f"{nemo.path}/model_config.yaml: keys that are not known and not used: alpha, zeta_scaling"]
    assert model.config.layernorm_epsilon == 1e-5 and model.config.rotary_base == 10000


def test_mixed_number_formats_are_reported(tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "nemo", tokenizer)
    folder = nemo.weights / "model.decoder.final_layernorm.bias"
    (folder / ".zarray").write_bytes(nemo_files.zarray((16,), (16,)).replace(b"bfloat16", b"<f4"))
    (folder / "0").write_bytes(bytes(64))
    assert open_nemo(nemo.path).notes == [
        "the weights mix bfloat16, float32: without dtype= all get the embedding's format"
    ]


def test_of_two_tokenizers_the_first_counts(tokenizer: bytes, tmp_path: Path) -> None:
    nemo = write_nemo(tmp_path / "nemo", tokenizer)
    names = nemo.values["tokenizer"]
    (nemo.path / names["tokenizer_model"].removeprefix("nemo:")).write_bytes(b"another")
    model = open_nemo(nemo.path)
    assert model.notes == ["tokenizer.model and tokenizer.tokenizer_model differ: the first is used"]
    assert model.config.vocab_size == 400
    nemo.reconfigure(tokenizer={**names, "model": None, "tokenizer_model": names["model"]})
    assert open_nemo(nemo.path).config.vocab_size == 400


def test_logits_agree(tokenizer: bytes, tmp_path: Path) -> None:
    """transformers' model, ours on Megatron-core and the stored tensors, on one prompt; in a process of its own, which
    Megatron-core's groups end with."""
    code = "import json, sys; from nemo_align.cli import main; sys.exit(any(map(main, json.loads(sys.argv[1]))))"
    commands = []
    for variant, to in (("base", "megatron"), ("reward", "hf")):
        source = write_nemo(tmp_path / variant, tokenizer, variant=variant).path
        commands.append(["convert", "from=nemo", f"to={to}", f"source={source}", f"target={tmp_path / to}"])
        commands[-1] += ["verify=logits", f"run_dir={tmp_path / 'run'}"]
    argv = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr + done.stdout
    assert "logits agree: they differ by" in said and "scores agree: they differ by" in said
