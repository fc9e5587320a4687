"""A recipe becomes commands, and a mistake in its last stage is found before its first starts."""

from pathlib import Path

import pytest

from nemo_align.config.assignment import assignment
from nemo_align.config.compose import ConfigError, compose
from nemo_align.config.pipeline import PipelineConfig, PipelineStageConfig
from nemo_align.pipeline.chain import build_chain, compose_chain


def rows(path: Path) -> Path:
    path.write_text('{"messages": []}\n')
    return path


@pytest.fixture
def recipe(tmp_path):
    """pretrain is left out: sft -> reward -> score -> dpo, with files that exist where no stage writes them."""
    tokenizer, train = rows(tmp_path / "tokenizer.model"), rows(tmp_path / "train.jsonl")
    chat = [f"data.tokenizer={tokenizer}", "data.sequence_length=64"]
    train_keys = ["train.global_batch_size=4", "train.max_steps=2", "optimizer.lr=1e-4"]
    return PipelineConfig(
        experiment="test",
        run_dir=str(tmp_path / "run"),
        overrides=["precision=fp32"],
        stages={
            "sft": PipelineStageConfig(
                verb="sft", overrides=["model=tiny", *chat, f"data.train.a.path={train}", *train_keys]
            ),
            "reward": PipelineStageConfig(
                verb="reward", init_from="sft", overrides=[*chat[1:], f"data.train.a.path={train}", *train_keys]
            ),
            "score": PipelineStageConfig(
                verb="score", init_from="reward", overrides=[*chat[1:], f"inputs.pairs={train}"]
            ),
            "dpo": PipelineStageConfig(
                verb="preference",
                init_from="sft",
                overrides=[*chat[1:], "data.train.a.path={score}/pairs.jsonl", *train_keys],
            ),
        },
    )


def check(config: PipelineConfig) -> dict:
    return compose_chain(build_chain(config), finished=set())


def test_each_stage_gets_its_command(recipe):
    stages = {stage.name: stage for stage in build_chain(recipe)}
    run_dir = recipe.run_dir
    assert stages["dpo"].arguments[0] == "precision=fp32"  # those of every stage stand before its own
    assert f"data.train.a.path={run_dir}/score/pairs.jsonl" in stages["dpo"].arguments
    assert stages["dpo"].arguments[-3:] == (
        f"checkpoint.init_from={run_dir}/sft",
        "experiment=dpo",
        f"run_dir={run_dir}/dpo",
    )
    assert stages["dpo"].depends_on == ("sft", "score")
    assert stages["sft"].depends_on == ()


def test_data_root_is_that_of_every_stage_but_for_its_own_overrides(recipe):
    recipe.overrides.append("data.root=of/all")
    recipe.stages["reward"].overrides.append("data.root=its/own")
    assert {name: config.data.root for name, config in check(recipe).items()} == {
        **dict.fromkeys(recipe.stages, "of/all"),
        "reward": "its/own",
    }
    recipe.data.root = "of the command, line"  # over what the recipe says
    assert {config.data.root for config in check(recipe).values()} == {"of the command, line", "its/own"}


def test_a_published_recipe_finds_its_files_below_data_root():
    texts = ["+experiment=nemotron4_340b/recipe", "data.root=/x"]
    configs = compose_chain(build_chain(compose("pipeline", texts)), set(), check_files=False)
    assert configs["pretrain"].data.tokenizer == "/x/tokenizer.model"
    assert configs["general_sft"].data.train["code_sft"].path == "/x/code_sft/train.jsonl"
    assert configs["score_pairs"].inputs["train"] == "/x/preference/train.jsonl"
    planned = compose("plan", texts).stages
    assert planned["reward"].stage.data.train["helpsteer2"].path == "/x/helpsteer2/train.jsonl.gz"


def test_a_stage_has_the_model_and_tokenizer_of_the_stage_it_starts_from(recipe):
    configs = check(recipe)
    assert configs["dpo"].model == configs["sft"].model
    assert configs["dpo"].model.hidden_size == 128
    assert configs["score"].data.tokenizer == configs["sft"].data.tokenizer
    assert configs["score"].weights == configs["reward"].reward.weights  # HelpSteer2's, through two hand-offs


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("dpo", "optimzer.lr=1", "stage dpo: .*did you mean 'optimizer"),
        ("dpo", "parallel.tensor=3", "stage dpo: .*3"),  # 4 heads: needs the model of the first stage to be seen
        (
            "dpo",
            "data.sequence_length=4096",
            "stage dpo: data.sequence_length 4096 is more than model.max_sequence_length",
        ),
        ("dpo", "data.validation.b.path=nowhere.jsonl", "stage dpo: .*nowhere.jsonl does not exist"),
        ("dpo", "data.train.a.path={score}/pears.jsonl", "score writes pairs.jsonl"),
        ("dpo", "data.train.a.path={scroe}/pairs.jsonl", "{scroe} .*is no earlier stage"),
        ("sft", "data.train.a.path={dpo}/pairs.jsonl", "{dpo} .*is no earlier stage"),
        ("reward", "model.hidden_size=256", "model.hidden_size is 256 but 128"),
        ("score", "weights.helpfulness=1", "stage score: weights lacks"),
    ],
)
def test_a_mistake_in_any_stage_is_found_at_once(recipe, stage, override, message):
    recipe.stages[stage].overrides.append(override)
    with pytest.raises(ConfigError, match=message):
        check(recipe)


def test_all_stages_problems_are_shown_together(recipe):
    recipe.stages["reward"].overrides.append("train.global_batch_size=0")
    recipe.stages["dpo"].overrides.append("optimizer.beta1=2")
    with pytest.raises(ConfigError, match=r"(?s)stage reward: .*stage dpo: "):
        check(recipe)


def test_a_problem_of_all_stages_is_said_once_without_their_names(recipe):
    recipe.overrides.append("runtime.seed=-1")
    with pytest.raises(ConfigError, match=r"^runtime.seed is -1, but must lie in 0 .. 2\^31 - 1$"):
        check(recipe)
    recipe.overrides.pop()
    for name in ("reward", "dpo"):
        recipe.stages[name].overrides.append("train.global_batch_size=0")
    with pytest.raises(ConfigError, match=r"^stages reward, dpo: train.global_batch_size is 0"):
        check(recipe)


@pytest.mark.parametrize(("stage", "source"), [("dpo", "reward"), ("score", "sft"), ("dpo", "score")])
def test_a_stage_starts_only_from_weights_of_its_kind(recipe, stage, source):
    recipe.stages[stage].init_from = source
    with pytest.raises(ConfigError, match=rf"stages.{stage}.init_from is '{source}', a \w+ stage"):
        build_chain(recipe)


def test_a_run_directory_with_spaces_and_commas_survives_hydra(recipe, tmp_path):
    recipe.run_dir = str(tmp_path / "a run, one=1")
    configs = check(recipe)
    assert configs["dpo"].run_dir == f"{recipe.run_dir}/dpo"
    assert configs["dpo"].data.train["a"].path == f"{recipe.run_dir}/score/pairs.jsonl"


@pytest.mark.parametrize("value", ["plain/path-1.2", "with space", "it's", "a,b=c", "back\\slash"])
def test_assignments_are_read_back_as_they_were(value):
    assert (
        compose(
            "convert", ["from=hf", "to=megatron", "target=t", assignment("source", value)], check_files=False
        ).source
        == value
    )
