"""Composing: where values come from, what a user's own YAML may do, and the way to the workers and back."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_align.config.compose import VERBS, ConfigError, compose, load_resolved, to_yaml
from nemo_align.config.sources import CONFIG_DIRS_VARIABLE, choices, conf_dir
from nemo_align.config.stages import SftStageConfig

SFT = """\
# @package _global_
# Rows of mine.
# nemo-align sft +experiment=mine/sft
defaults:
  - override /model: tiny
  - override /parallel: tp2_sp

train:
  global_batch_size: 8
  max_steps: 3
optimizer:
  lr: 1e-4
data:
  tokenizer: tokenizer.model
  sequence_length: ${model.max_sequence_length}
  train:
    rows:
      path: rows.jsonl
"""
CHOSEN = ["+experiment=mine/sft"]


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """A user's folder of YAML with one experiment."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "tokenizer.model"):
        (tmp_path / name).touch()
    folder = tmp_path / "my_conf" / "experiment" / "mine"
    folder.mkdir(parents=True)
    (folder / "sft.yaml").write_text(SFT)
    monkeypatch.setenv(CONFIG_DIRS_VARIABLE, str(tmp_path / "my_conf"))
    return folder


def test_every_level_is_there():
    config = compose("sft", [*CHOSEN, "optimizer.min_lr=1e-5", "data.train.more.path=rows.jsonl"])
    assert isinstance(config, SftStageConfig)
    assert config.optimizer.lr == 1e-4  # experiment; a float though YAML 1.1 reads 1e-4 as text
    assert config.optimizer.min_lr == 1e-5  # command line
    assert config.optimizer.beta2 == 0.95  # dataclass
    assert (config.model.num_layers, config.parallel.tensor, config.parallel.sequence) == (4, 2, True)  # groups
    assert config.data.sequence_length == 1024  # interpolation
    assert list(config.data.train) == ["rows", "more"]
    assert config.data.overlong == "truncate"  # sft's own default
    assert (config.experiment, config.run_dir) == ("mine/sft", "runs/mine/sft")


def test_the_run_has_a_name():
    assert compose("sft", [*CHOSEN, "experiment=other"]).run_dir == "runs/other"
    without = ["model=tiny", "data.tokenizer=tokenizer.model", "optimizer.lr=1", "train.global_batch_size=1"]
    without += ["train.epochs=1", "data.train.a.path=rows.jsonl", "data.sequence_length=64"]
    assert compose("sft", without).run_dir == "runs/sft"


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_valid_key_needs_no_prefix_and_may_have_one(prefix):
    assert compose("sft", [*CHOSEN, f"{prefix}train.log_every=7"]).train.log_every == 7


def test_taking_away_gives_the_default():
    assert compose("sft", [*CHOSEN, "~train.max_steps", "train.epochs=2"]).train.max_steps is None


@pytest.mark.parametrize(
    "wrong, right, message",
    [
        ("  lrr: 1", "  lr: 1e-4", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("  lr: fast", "  lr: 1e-4", "optimizer.lr is 'fast', but must be a number"),
        ("      pth: x", "      path: rows.jsonl", "did you mean 'data.train.rows.path'?"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(mine, wrong, right, message):
    lines = SFT.replace(right, wrong)
    (mine / "sft.yaml").write_text(lines)
    with pytest.raises(ConfigError) as caught:
        compose("sft", CHOSEN)
    number = 1 + next(i for i, line in enumerate(lines.splitlines()) if line == wrong)
    assert message in str(caught.value)
    assert f"{mine / 'sft.yaml'}:{number}" in str(caught.value)


def test_a_broken_file_is_an_error_of_one_message(mine):
    (mine / "sft.yaml").write_text("optimizer: [unclosed\n")
    with pytest.raises(ConfigError, match="expected ',' or ']'"):
        compose("sft", CHOSEN)


def test_a_group_choice_in_a_file_that_does_not_exist(mine):
    (mine / "sft.yaml").write_text(SFT.replace("model: tiny", "model: tyni"))
    with pytest.raises(ConfigError, match="model/tyni"):
        compose("sft", CHOSEN)


def test_workers_read_what_was_written(tmp_path):
    config = compose("sft", [*CHOSEN, "optimizer.eps=1e-12"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_resolved("sft", tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "change, message",
    [
        (("  eps:", "  epsilon:"), "unknown key 'optimizer.epsilon'"),
        (("  lr: 0.0001", "  lr: fast"), "optimizer.lr is 'fast'"),
        (("  lr: 0.0001", "  lr: ???"), "optimizer.lr is missing"),
    ],
)
def test_workers_are_strict(tmp_path, change, message):
    text = to_yaml(compose("sft", CHOSEN))
    assert change[0] in text
    (tmp_path / "config.yaml").write_text(text.replace(*change))
    with pytest.raises(ConfigError) as caught:
        load_resolved("sft", tmp_path / "config.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "config.yaml"))


def test_helpsteer2_has_its_published_weights():
    changed = [*CHOSEN, "train.max_steps=null", "train.epochs=1"]
    weights = compose("reward", changed).reward.weights
    assert weights == {
        "helpfulness": 0.3,
        "correctness": 0.74,
        "coherence": 0.46,
        "complexity": 0.47,
        "verbosity": -0.33,
    }


def test_a_pipeline_can_check_stages_whose_input_is_not_there_yet():
    awaited = ["data.train.rows.path=runs/score/rows.jsonl", "checkpoint.init_from=runs/dpo", "model=null"]
    config = compose("preference", [*CHOSEN, *awaited], check_files=False)
    assert config.model.num_layers == "???"
    with pytest.raises(ConfigError, match="runs/dpo does not exist"):
        compose("preference", [*CHOSEN, *awaited])
    with pytest.raises(ConfigError, match="beta"):
        compose("preference", [*CHOSEN, *awaited, "preference.ref_policy_kl_penalty=-1"], check_files=False)


def test_nothing_hides_in_yaml():
    """Groups and roots select and override; a value equal to the dataclass' default would be a second place for it."""
    roots = {path.stem for path in conf_dir().glob("*.yaml")}
    assert roots == set(VERBS)
    for verb in VERBS:
        lines = (conf_dir() / f"{verb}.yaml").read_text().splitlines()
        body = [line for line in lines if line and not line.startswith("#")]
        assert body[0] in ("defaults:", "{}"), verb
        assert all(line.startswith("  - ") for line in body[1:]), verb


# Golden sizes: arXiv 2406.11704 (Table 1), 2402.16819, and the public Minitron-4B config.
PARAMETERS = {
    "minitron_4b": 4_190_509_056,
    "nemotron4_15b": 15_628_775_424,
    "nemotron4_340b": 341_029_195_776,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_published_sizes(name):
    model = compose("sft", [*CHOSEN, f"model={name}", "parallel=single"]).model
    head = model.head_dim or model.hidden_size // model.num_attention_heads
    q, kv = model.num_attention_heads * head, model.num_query_groups * head
    layer = (q + 2 * kv) * model.hidden_size + q * model.hidden_size + 2 * model.hidden_size * model.ffn_hidden_size
    norms = (2 * model.num_layers + 1) * 2 * model.hidden_size
    total = model.num_layers * layer + 2 * model.vocab_size * model.hidden_size + norms
    assert total == PARAMETERS[name]
    assert (model.rotary_percent, model.rotary_base, model.layernorm_epsilon) == (0.5, 10000, 1e-5)
    assert model.init_std == {"nemotron4_340b": 0.0063}.get(name, 0.0134)


@pytest.mark.parametrize("group", ["model", "parallel", "precision", "optimizer", "tracking"])
def test_every_choice_composes(group):
    fixed = {
        "parallel": ["model=nemotron4_340b"],
        "precision": ["model=minitron_4b"],
        "optimizer": ["train.max_steps=9"],
    }
    for choice in choices(group):
        texts = [*CHOSEN, *fixed.get(group, []), f"{group}={choice}", "data.sequence_length=64"]
        config = compose("sft", [*texts, *(["optimizer.decay_steps=2"] if choice == "wsd" else [])])
        assert dataclasses.is_dataclass(getattr(config, group))
