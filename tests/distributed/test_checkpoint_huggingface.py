"""Hugging Face and back: bit for bit, under several layouts, with equal logits and reward scores in transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nemo_align.checkpoint.conversion.convert import convert, export_hf
from nemo_align.checkpoint.streaming.safetensors import SafetensorsFolder
from nemo_align.config.conversion import ConvertConfig
from tests.distributed import checkpoint_runs as runs
from tests.distributed.pool import WorkerPool, with_topology

ONE, TENSOR, PIPELINE = {}, {"tensor": 2, "sequence": True}, {"pipeline": 2, "virtual_pipeline": 2}
BOTH = {"tensor": 2, "pipeline": 2}

# What differs between published models: head size, groups, vocabulary, number format, rotary part and base.
VARIANTS = {
    "tiny": {},
    "multi_head_bf16": {"num_query_groups": 4, "head_dim": None, "dtype": torch.bfloat16, "vocab_size": 512},
    "rotary": {"rotary_percent": 0.25, "rotary_base": 500000, "head_dim": 16, "layernorm_epsilon": 1e-6},
    "one_file_bf16": {"head_dim": 20, "num_attention_heads": 6, "dtype": torch.bfloat16, "shard": "1GB"},
    "many_heads": {"num_attention_heads": 8, "num_query_groups": 2, "head_dim": 4, "vocab_size": 443, "shard": "20KB"},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return runs.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


FAST = ("tiny", "one_file_bf16", "multi_head_bf16")  # in `make test`; the others in `make test-full`


@pytest.fixture(
    scope="module",
    params=[name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in VARIANTS],
)
def variant(request: pytest.FixtureRequest) -> dict:
    return dict(VARIANTS[request.param])


@pytest.fixture(scope="module")
def hf_model(variant: dict, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random NemotronForCausalLM as transformers saves it, in several shards, and a SentencePiece tokenizer."""
    from transformers import NemotronConfig, NemotronForCausalLM

    sizes = runs.SIZES | {"rotary_percent": 0.5, "rotary_base": 10000, "layernorm_epsilon": 1e-5} | variant
    torch.manual_seed(1)
    config = NemotronConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["max_sequence_length"],
        norm_eps=sizes["layernorm_epsilon"],
        initializer_range=0.05,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(sizes["rotary_base"]),
            "partial_rotary_factor": sizes["rotary_percent"],
        },
    )
    model = NemotronForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # transformers leaves biases at zero: nothing would be tested
    folder = tmp_path_factory.mktemp("hf") / "model"
    shard = variant.get("shard", "50KB")
    model.to(variant.get("dtype", torch.float32)).save_pretrained(folder, max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard != "1GB")
    shutil.copy(Path(tokenizer) / "tokenizer.model", folder)
    return folder


def sizes_of(variant: dict) -> dict:
    return {key: value for key, value in variant.items() if key not in ("dtype", "shard")}


def dtype_of(variant: dict) -> str:
    return "bf16" if variant.get("dtype") is torch.bfloat16 else "fp32"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = SafetensorsFolder(folder)
    return {name: files.read(name) for name in files.names()}


def load_hf_and_save(topology, folder: str, run_dir: str, tokenizer: str, **options) -> str:
    from nemo_align.checkpoint.huggingface.load import load_hf_weights

    run = runs.build(topology, **options)
    load_hf_weights(folder, run.chunks, topology)
    return runs.save(run, run_dir, 0, tokenizer, weights_only=True)


def load_and_save(topology, path: str, run_dir: str, tokenizer: str, **options) -> str:
    from nemo_align.checkpoint import megatron, store

    run = runs.build(topology, **options)
    megatron.load_weights(store.resolve(path), run.chunks, topology, load_head=False)
    return runs.save(run, run_dir, 0, tokenizer, weights_only=True)


@pytest.mark.parametrize("layout", [ONE, TENSOR, PIPELINE], ids=str)
def test_there_and_back_through_a_model(
    layout: dict, variant: dict, hf_model: Path, pool1: WorkerPool, pool2: WorkerPool, tokenizer: str, tmp_path: Path
) -> None:
    pool = pool1 if layout == ONE else pool2
    options = {"dtype": dtype_of(variant), "seed": 3, **sizes_of(variant)}
    path = pool.run(with_topology, load_hf_and_save, layout, str(hf_model), str(tmp_path), tokenizer, **options)[0]
    runs.assert_equal(tensors(export_hf(path, tmp_path / "hf", max_shard_bytes=40_000)), tensors(hf_model))
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("layout", [BOTH, PIPELINE], ids=str)
def test_there_and_back_by_convert(
    layout: dict,
    variant: dict,
    hf_model: Path,
    pool2: WorkerPool,
    pool4: WorkerPool,
    tokenizer: str,
    tmp_path: Path,
) -> None:
    there = ConvertConfig(
        source_format="hf",
        target_format="megatron",
        source=str(hf_model),
        target=str(tmp_path / "megatron"),
        verify="true",
    )
    converted = convert(there)
    options = {"dtype": dtype_of(variant), "seed": 3, **sizes_of(variant)}
    pool = pool4 if layout == BOTH else pool2
    path = pool.run(with_topology, load_and_save, layout, str(converted), str(tmp_path), tokenizer, **options)[0]
    for source in (converted, path):
        back = ConvertConfig(
            source_format="megatron",
            target_format="hf",
            source=str(source),
            target=str(tmp_path / f"hf{source == path}"),
        )
        runs.assert_equal(tensors(convert(back)), tensors(hf_model))


def logits_of_ours(topology, path: str, tokens: list, **options) -> torch.Tensor:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from nemo_align.checkpoint import megatron, store

    run = runs.build(topology, **options)
    reward = bool(options.get("reward"))
    megatron.load_weights(store.resolve(path), run.chunks, topology, load_head=reward)
    tokens = torch.tensor(tokens)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        output = run.chunks[0].eval()(tokens, positions, None)
        if not reward:
            output = gather_from_tensor_model_parallel_region(output)[..., : run.model.vocab_size]
    return output.float()


def test_logits_equal_in_transformers(
    variant: dict, hf_model: Path, pool2: WorkerPool, tokenizer: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(0))
    options = {"seed": 3, **sizes_of(variant)}
    path = pool2.run(with_topology, load_hf_and_save, TENSOR, str(hf_model), str(tmp_path), tokenizer, **options)[0]
    ours = pool2.run(with_topology, logits_of_ours, TENSOR, path, tokens.tolist(), **options)[0]
    exported = AutoModelForCausalLM.from_pretrained(export_hf(path, tmp_path / "hf"), dtype=torch.float32).eval()
    original = AutoModelForCausalLM.from_pretrained(hf_model, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs, expected = exported(tokens).logits, original(tokens).logits
    # fp32 with another order of sums: 1e-6 of logits of size one is usual.
    torch.testing.assert_close(theirs, expected, rtol=0, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float(theirs.std()) > 0.1
    generates_what_we_pick(exported, tokens, ours)
    assert exported.generation_config.eos_token_id == [2, exported.config.vocab_size and 4]


def generates_what_we_pick(exported, tokens: torch.Tensor, ours: torch.Tensor) -> None:
    """`generate` of transformers, from the exported generation_config.json but without stops, continues with the token
    that our logits put first; and further, each time with what the whole text so far makes it put first."""
    count = 5
    stops, exported.generation_config.eos_token_id = exported.generation_config.eos_token_id, None
    ends = exported.generate(tokens, max_new_tokens=count, do_sample=False)
    exported.generation_config.eos_token_id = stops
    assert ends.shape == (len(tokens), tokens.shape[1] + count) and torch.equal(ends[:, : tokens.shape[1]], tokens)
    best = ours[:, -1].topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > 2e-4  # twice the difference that the two sides may have
    assert torch.equal(ends[:, tokens.shape[1]], ours[:, -1].argmax(-1))
    with torch.no_grad():
        again = exported(ends[:, :-1]).logits[:, tokens.shape[1] - 1 :].argmax(-1)
    assert torch.equal(again, ends[:, tokens.shape[1] :])
    # As it is, with its stops: nothing comes after one but padding.
    for row in exported.generate(tokens, max_new_tokens=count, do_sample=False)[:, tokens.shape[1] :].tolist():
        first = next((place for place, token in enumerate(row) if token in stops), len(row))
        assert set(row[first + 1 :]) <= {exported.generation_config.pad_token_id}


def train_reward(topology, run_dir: str, tokenizer: str, *, dtype: str = "fp32") -> str:
    run = runs.build(topology, reward=True, dtype=dtype)
    for number in range(3):
        runs.step(run, number)
    return runs.save(run, run_dir, 3, tokenizer)


@pytest.fixture(scope="module")
def reward(pool2: WorkerPool, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return pool2.run(with_topology, train_reward, TENSOR, str(tmp_path_factory.mktemp("reward")), tokenizer)[0]


def test_reward_scores_equal_in_transformers(reward: str, pool2: WorkerPool, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = export_hf(reward, tmp_path / "hf")
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "NemotronForSequenceClassification"
    assert [model.config.id2label[index] for index in range(3)] == runs.ATTRIBUTES
    assert model.config.attribute_weights == dict.fromkeys(runs.ATTRIBUTES, 0.5)
    assert model.config.problem_type == "regression"
    assert runs.weights_of(reward)["reward_head.bias"].abs().min() > 1e-3  # there is something to fold
    texts = ["The red number 5", "The old number 77 is in the box.", "blue"]
    rows = [tokenizer(text)["input_ids"] + [tokenizer.convert_tokens_to_ids("<extra_id_2>")] for text in texts]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    with torch.no_grad():
        theirs = model(**batch).logits
    tokens = batch["input_ids"]
    padded = torch.nn.functional.pad(
        tokens, (0, tokens.shape[1] % 2), value=tokenizer.pad_token_id
    )  # sequence parallel
    scores = pool2.run(with_topology, logits_of_ours, TENSOR, reward, padded.tolist(), reward=True)
    assert torch.equal(scores[0], scores[1])
    ours = torch.stack([scores[0][index, len(row) - 1] for index, row in enumerate(rows)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def load_reward(topology, folder: str, run_dir: str, tokenizer: str, load_head: bool) -> str:
    from nemo_align.checkpoint.huggingface.load import load_hf_weights

    run = runs.build(topology, reward=True)
    load_hf_weights(folder, run.chunks, topology, load_head=load_head)
    return runs.save(run, run_dir, 0, tokenizer, weights_only=True)


def test_a_reward_model_comes_back_exactly(reward: str, pool2: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    folder = export_hf(reward, tmp_path / "hf")
    expected = runs.weights_of(reward)
    path = pool2.run(with_topology, load_reward, TENSOR, str(folder), str(tmp_path), tokenizer, True, seed=3)[0]
    runs.assert_equal(runs.weights_of(path), expected)
    there = ConvertConfig(source_format="hf", target_format="megatron", source=str(folder), target=str(tmp_path / "m"))
    runs.assert_equal(runs.weights_of(convert(there)), expected)
    # Without the head: the backbone as trained, final norm included.
    path = pool2.run(with_topology, load_reward, TENSOR, str(folder), str(tmp_path / "b"), tokenizer, False, seed=3)[0]
    found = runs.weights_of(path)
    assert not torch.equal(found.pop("reward_head.weight"), expected.pop("reward_head.weight"))
    assert not found.pop("reward_head.bias").any() and expected.pop("reward_head.bias").any()
    runs.assert_equal(found, expected)


def test_norm_and_head_of_a_bf16_reward_model_are_fp32(pool2: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    path = pool2.run(with_topology, train_reward, TENSOR, str(tmp_path), tokenizer, dtype="bf16")[0]
    folder = export_hf(path, tmp_path / "hf")
    formats = {name: tensor.dtype for name, tensor in tensors(folder).items()}
    full = {name for name, dtype in formats.items() if dtype is torch.float32}
    assert full == {"model.norm.weight", "model.norm.bias", "score.weight"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def refused(topology, folder: str, *, load_head: bool = False, **options) -> str:
    from nemo_align.checkpoint.huggingface.load import load_hf_weights

    run = runs.build(topology, **options)
    with pytest.raises(ValueError) as caught:
        load_hf_weights(folder, run.chunks, topology, load_head=load_head)
    return str(caught.value)


def test_refusals_of_an_import(reward: str, pool2: WorkerPool, tokenizer: str, tmp_path: Path) -> None:
    folder = str(export_hf(reward, tmp_path / "hf"))
    for layout in (TENSOR, {"pipeline": 2}):
        messages = pool2.run(with_topology, refused, layout, folder)
        assert all("is a reward model: it has no output layer" in message for message in messages)
    messages = pool2.run(with_topology, refused, TENSOR, folder, reward=True, rotary_percent=1.0)
    assert all("model.rotary_percent is 1.0, the checkpoint has 0.5" in message for message in messages)
    messages = pool2.run(with_topology, refused, TENSOR, folder, reward=True, vocab_size=390)
    assert all("set model.vocab_size=401" in message for message in messages)
