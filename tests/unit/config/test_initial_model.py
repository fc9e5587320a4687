"""What a checkpoint says about its model, from JSON alone."""

from __future__ import annotations

import json

import pytest

from nemo_align.config.compose import compose
from nemo_align.config.errors import ConfigError
from nemo_align.config.initial_model import read

MODEL = {
    "name": "m", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4,
    "num_query_groups": 2, "head_dim": None, "vocab_size": 512, "make_vocab_size_divisible_by": 128,
    "max_sequence_length": 256, "rotary_percent": 0.5, "rotary_base": 10000, "layernorm_epsilon": 1e-5,
    "init_std": 0.02,
}  # fmt: skip
# The public config of Minitron-4B-Base.
MINITRON = {
    "model_type": "nemotron", "hidden_size": 3072, "intermediate_size": 9216, "num_hidden_layers": 32,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 256000,
    "max_position_embeddings": 4096, "norm_eps": 1e-5, "initializer_range": 0.0134, "hidden_act": "relu2",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip


def _checkpoint(run_dir, step, model=MODEL, reward=None):
    folder = run_dir / "checkpoints" / f"step_{step:07d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"model": model, "reward": reward, "tokenizer": "tokenizer"}))
    (folder / "tokenizer").mkdir()
    return folder


def _hf_folder(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def _sft(tmp_path, *more):
    (tmp_path / "rows.jsonl").touch()
    fixed = ["optimizer.lr=1", "train.global_batch_size=1", "train.epochs=1", "data.sequence_length=64"]
    return compose("sft", [*fixed, f"data.train.a.path={tmp_path}/rows.jsonl", *more])


def test_the_newest_checkpoint_of_a_run_gives_model_and_tokenizer(tmp_path):
    _checkpoint(tmp_path / "run", 5)
    newest = _checkpoint(tmp_path / "run", 10, {**MODEL, "num_layers": 6})
    (tmp_path / "run" / "checkpoints" / "step_0000020").mkdir()  # no manifest: its save was cut off
    config = _sft(tmp_path, f"checkpoint.init_from={tmp_path}/run")
    assert config.model.num_layers == 6
    assert config.data.tokenizer == str(newest / "tokenizer")
    assert config.checkpoint.init_from == f"{tmp_path}/run"  # what the user wrote


def test_a_checkpoint_itself(tmp_path):
    folder = _checkpoint(tmp_path / "run", 5)
    assert read(folder).path == folder
    assert _sft(tmp_path, f"checkpoint.init_from={folder}").model.vocab_size == 512


def test_only_what_no_weight_depends_on_may_be_chosen_differently(tmp_path):
    run = _checkpoint(tmp_path / "run", 5)
    config = _sft(tmp_path, f"checkpoint.init_from={run}", "model.max_sequence_length=512", "model.name=longer")
    assert (config.model.max_sequence_length, config.model.name) == (512, "longer")
    same = _sft(tmp_path, f"checkpoint.init_from={run}", "model.head_dim=16")  # what null stands for
    assert same.model.head_dim == 16
    with pytest.raises(ConfigError) as caught:
        _sft(tmp_path, f"checkpoint.init_from={run}", "model=tiny")
    for text in ("model.num_layers is 4 but 2", "model.hidden_size is 128 but 64", "Leave model= out"):
        assert text in str(caught.value)
    assert "init_std" not in str(caught.value)


def test_a_manifest_of_another_version(tmp_path):
    run = _checkpoint(tmp_path / "run", 5, {**MODEL, "num_experts": 8})
    with pytest.raises(ConfigError, match="not written by this version: num_experts"):
        read(run)


@pytest.mark.parametrize(
    "rotary",
    [
        {"partial_rotary_factor": 0.5, "rope_theta": 10000},
        {"rope_percent": 0.5, "rope_theta": 10000.0},
        {"rope_percentage": 0.5, "rope_percent": 0.5, "rope_theta": 10000},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"}},
    ],
)
def test_hugging_face_in_every_spelling_of_the_rotary_part(tmp_path, rotary):
    (tmp_path / "minitron").mkdir()
    (tmp_path / "minitron" / "config.json").write_text(json.dumps({**MINITRON, **rotary}))
    config = _sft(tmp_path, f"checkpoint.init_from={tmp_path}/minitron")
    published = _sft(tmp_path, "model=minitron_4b", f"data.tokenizer={tmp_path}/rows.jsonl")
    published.model.name = "minitron"
    assert config.model == published.model
    assert config.data.tokenizer == f"{tmp_path}/minitron"


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "does not say the rotary part of a head"),
        ({"rope_percent": 0.5, "partial_rotary_factor": 1.0}, "contradicts itself about the rotary part"),
        ({"rope_percent": 0.5}, "does not say the rotary base"),
        ({"rope_percent": 0.5, "rope_theta": 1e4, "rope_scaling": {"type": "linear"}}, "rope_type='linear'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"hidden_act": "silu"}, "hidden_act='silu', the Nemotron-4 architecture has 'relu2'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
    ],
)
def test_other_architectures_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError) as caught:
        read(_hf_folder(tmp_path, {**MINITRON, **change}))
    assert message in str(caught.value)


def test_broken_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is not JSON"):
        read(tmp_path)


def test_a_reward_model_brings_its_weights_to_score(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    reward = {"attributes": ["clarity"], "weights": {"clarity": 2.0}, "head_bias": True}
    run = _checkpoint(tmp_path / "run", 5, reward=reward)
    texts = [f"checkpoint.init_from={run}", f"inputs.a={tmp_path}/rows.jsonl", "data.sequence_length=64"]
    assert compose("score", texts).weights == {"clarity": 2.0}
    assert compose("score", [*texts, "weights.clarity=3"]).weights == {"clarity": 3.0}


def test_a_hugging_face_reward_model_brings_its_attributes(tmp_path):
    rotary = {"partial_rotary_factor": 0.5, "rope_theta": 10000}
    labels = {"architectures": ["NemotronForSequenceClassification"], "id2label": {"0": "clarity", "1": "safety"}}
    found = read(_hf_folder(tmp_path, {**MINITRON, **rotary, **labels, "reward_head_bias": True}))
    assert found.reward == {"attributes": ["clarity", "safety"], "weights": None, "head_bias": True}
