"""Every recipe in conf/experiment/ is dry-run in the world that it is made for, on a machine without its data: one rank
of the first, a middle and the last pipeline stage."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_align.config import sources
from nemo_align.config.compose import compose
from nemo_align.config.validation_pipeline import STAGE_VERBS
from nemo_align.pipeline.chain import build_chain, compose_chain
from tests.unit.dry_run.child import Answer, Child

CHAIN = ["pretrain", "continued_pretrain", "code_sft", "general_sft", "reward", "score"]
CHAIN += ["dpo", "rpo_1", "rpo_2", "rpo_3"]


def stage_verb(name: str) -> str | None:
    """The verb that an experiment's first comment shows; None for a pipeline."""
    text = (sources.conf_dir() / "experiment" / f"{name}.yaml").read_text()
    [verb] = set(re.findall(r"^# nemo-align (\w+) \+experiment=", text, re.MULTILINE))
    return verb if verb in STAGE_VERBS else None


EXPERIMENTS = sources.choices("experiment")
STAGES = [name for name in EXPERIMENTS if stage_verb(name)]
PIPELINES = [name for name in EXPERIMENTS if not stage_verb(name)]


def command(name: str) -> list[str]:
    # A quickstart stage has the model of the stage before, whose checkpoint is not here.
    model = ["model=tiny"] if name.startswith("quickstart/") else []
    return [stage_verb(name), f"+experiment={name}", *model, "dry_run=true"]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("no_data_here")


@pytest.fixture(scope="module")
def answers(child: Child, empty: Path) -> dict[str, Answer]:
    return dict(zip(STAGES, child.run([command(name) for name in STAGES], empty), strict=True))


@pytest.mark.parametrize("name", STAGES)
def test_a_recipe_would_run(name: str, answers: dict[str, Answer], empty: Path) -> None:
    answer = answers[name]
    assert answer.code == 0, answer.err
    assert answer.err == ""
    size = int(re.search(r"^  (\d+) processes", answer.out, re.MULTILINE)[1])
    pipeline = int(re.search(r" x pipeline (\d+)", answer.out)[1])
    stage = size // pipeline
    ranks = [int(rank) for rank in re.findall(r"^  rank (\d+) \(", answer.out, re.MULTILINE)]
    assert ranks == sorted({0, stage * (pipeline // 2), size - stage})
    assert "not on this machine (dry_run_strict=true refuses this)" in answer.out
    assert "warnings" not in answer.out, answer.out
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("name", PIPELINES)
def test_every_chain_hands_on_its_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = compose("pipeline", [f"+experiment={name}"])
    configs = compose_chain(build_chain(config), set(), check_files=False)
    assert [stage.partition("_")[0] if stage.startswith("score") else stage for stage in configs] == CHAIN
    assert len({stage.model.name for stage in configs.values()}) == 1
    assert configs["rpo_1"].checkpoint.init_from == f"runs/{name}/dpo"


def test_the_340b_is_what_the_report_says(answers: dict[str, Answer]) -> None:
    text = answers["nemotron4_340b/pretrain"].out
    assert "341,029,195,776 parameters" in text
    assert "6144 processes, 768 nodes of 8: tensor 8 x pipeline 12 in 8 interleaved chunks x data 64" in text
    for rank, parameters in ((0, 4_044_423_168), (3072, 3_454_599_168), (5632, 4_044_460_032)):
        assert re.search(rf"rank {rank} .*: {parameters:,} parameters", text)
    # Table 2: batches of 768, 1536 and 2304 until 200B, 400B and 8T tokens; 12, 24 and 36 micro-batches at data 64.
    assert re.search(r"step 1 \(0 tokens\): 63,579 steps of 768 samples, 12 micro-batches", text)
    assert re.search(r"step 63,580 \(200B tokens\): 31,789 steps of 1,536 samples, 24 micro-batches", text)
    assert re.search(r"step 95,369 \(400B tokens\): 805,325 steps of 2,304 samples, 36 micro-batches", text)
    assert "tokens: 8T\n" in text and "4.77 TB each" in text
    told = "told to stop 600 s before a time limit, a job finishes its step, the save in flight and one more: 25.1 GB/s"
    assert told in text
    assert "step 501: 0.0001," in text and "step 900,693: 1e-05\n" in text


def test_the_second_blend_begins_at_a_fifth_of_the_learning_rate(answers: dict[str, Answer]) -> None:
    text = answers["nemotron4_340b/continued_pretrain"].out
    assert "steps, 244,141,056 samples of 4,096 tokens: 1T\n" in text
    assert "step 1: 1e-05, " in text and "step 75,374: 2e-06, " in text and "step 105,964: 1e-07\n" in text


# Published numbers of examples, epochs and batch sizes; where one is ours, the recipe says so.
@pytest.mark.parametrize(
    "name, line",
    [
        ("nemotron4_340b/code_sft", "6,250 steps of 128 dialogues: 800,000 in all, 1 epoch"),
        ("nemotron4_340b/general_sft", "4,688 steps of 128 dialogues: 600,000 in all, 3 epochs"),
        ("nemotron4_340b/reward", "318 steps of 128 rated responses: 40,648 in all, 2 epochs"),
        ("nemotron4_340b/dpo", "625 steps of 256 pairs: 160,000 in all, 1 epoch"),
        ("nemotron4_340b/rpo_3", "1,172 steps of 256 pairs: 300,000 in all, 1 epoch"),
        ("nemotron4_15b/code_sft", "6,250 steps of 128 dialogues: 800,000 in all, 1 epoch"),
    ],
)
def test_steps_of_a_stage(name: str, line: str, answers: dict[str, Answer]) -> None:
    assert f"  {line}\n" in answers[name].out


# What the comments of conf/recipe/ reckon: bytes of weights, gradients and optimizer on the largest rank.
@pytest.mark.parametrize(
    "name, line",
    [
        ("nemotron4_340b/pretrain", "= 25 GB"),
        ("nemotron4_340b/code_sft", "weights 8.09 GB + gradients 16.2 GB + optimizer 24.3 GB = 48.5 GB"),
        ("nemotron4_15b/code_sft", "weights 7.82 GB + gradients 15.6 GB + optimizer 23.4 GB = 46.9 GB"),
        ("minitron_4b/pretrain", "weights 4.19 GB + gradients 8.38 GB + optimizer 6.29 GB = 18.9 GB"),
    ],
)
def test_memory_that_the_recipes_reckon_with(name: str, line: str, answers: dict[str, Answer]) -> None:
    assert line in answers[name].out


def test_a_reward_model_has_a_head_in_place_of_the_output_layer(answers: dict[str, Answer]) -> None:
    head = 5 * 18432 + 5
    text = answers["nemotron4_340b/reward"].out
    assert re.search(rf"reward head of 5: {3_454_599_168 + 2 * 18432 + head:,} parameters", text)
    assert f"reward of nemotron4_340b, {341_029_195_776 - 256_000 * 18432:,} parameters" in text
