"""Files that are not here: each once, with the stages that read it and what to do."""

from pathlib import Path

import pytest

from nemo_align.config.compose import compose
from nemo_align.pipeline.chain import build_chain, compose_chain
from nemo_align.preflight.files import Missing, missing

PUT_THERE = "put it there, or name a folder that all nodes see: data.root=<folder>"
CHECKPOINTS = "name a run directory, whose newest checkpoint is taken, a checkpoint, or a Hugging Face folder: "


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stage(name: str, verb: str, *overrides: str) -> list[Missing]:
    config = compose(verb, [f"+experiment=nemotron4_340b/{name}", *overrides], check_files=False)
    return missing({config.experiment: config})


def recipe(*overrides: str) -> list[Missing]:
    chain = build_chain(compose("pipeline", ["+experiment=nemotron4_340b/recipe", *overrides]))
    folders = {stage.name: stage.run_dir for stage in chain}
    written = {stage.name: [folders[name] for name in stage.depends_on] for stage in chain}
    return missing(compose_chain(chain, set(), check_files=False), written)


def test_data_below_its_root_and_a_checkpoint_that_a_recipe_makes():
    root = "data/nemotron4/code_sft"
    earlier = "nemotron4_340b/recipe"
    assert stage("code_sft", "sft") == [
        Missing(f"data.train.code_sft.path={root}/train.jsonl does not exist", PUT_THERE),
        Missing(f"data.validation.code_sft.path={root}/validation.jsonl does not exist", PUT_THERE),
        Missing(
            f"checkpoint.init_from=runs/{earlier}/continued_pretrain does not exist",
            f"stage continued_pretrain of {earlier} makes it: nemo-align pipeline +experiment={earlier}. Or "
            f"{CHECKPOINTS}checkpoint.init_from=<folder>",
        ),
    ]


def test_other_data_and_another_checkpoint_are_named_by_their_own_keys():
    found = stage("code_sft", "sft", "data.train.code_sft.path=rows.jsonl", "checkpoint.init_from=models/base")
    assert found[0].remedy == ("put it there, or name another that all nodes see: data.train.code_sft.path=<path>")
    assert found[-1] == Missing(
        "checkpoint.init_from=models/base does not exist", f"{CHECKPOINTS}checkpoint.init_from=<folder>"
    )


def test_a_recipe_s_files_are_those_of_all_stages_each_once():
    found = {file.text: file.remedy for file in recipe()}
    assert (
        "stage code_sft: data.train.code_sft.path=data/nemotron4/code_sft/train.jsonl does not exist (read by "
        "general_sft too)"
    ) in found
    english = [text for text in found if "/pretrain/english.bin" in text]
    assert len(english) == 1 and english[0].endswith(" does not exist (read by continued_pretrain too)")
    assert {text.split(":")[0] for text in found} == {
        f"stage {name}"
        for name in ("pretrain", "continued_pretrain", "code_sft", "general_sft", "reward", "score_pairs")
    }  # dpo and the rounds read what score_pairs writes, and the tokenizer, which pretrain is named with
    assert set(found.values()) == {PUT_THERE}  # no checkpoint: earlier stages make them


def test_the_remedy_of_a_recipe_is_one_that_its_command_takes(folder):
    found = recipe(
        "data.root=mine",
        *(f"~stages.{name}" for name in ("pretrain", "continued_pretrain")),
        "stages.code_sft.init_from=null",
        "stages.reward.init_from=null",
        'stages.code_sft.overrides=["checkpoint.init_from=base"]',
        'stages.reward.overrides=["checkpoint.init_from=base", "data.train.helpsteer2.path=rows.jsonl"]',
    )
    remedies = {file.text: file.remedy for file in found}
    assert remedies["stage code_sft: checkpoint.init_from=base does not exist (read by reward too)"] == (
        f"{CHECKPOINTS}'stages.code_sft.overrides=[\"checkpoint.init_from=<folder>\"]'; "
        "stages.code_sft.init_from=<earlier stage> takes that one's"
    )
    assert remedies["stage reward: data.train.helpsteer2.path=rows.jsonl does not exist"] == (
        "put it there, or name another that all nodes see: "
        "'stages.reward.overrides=[\"data.train.helpsteer2.path=<path>\"]'"
    )
    assert any("=mine/code_sft/train.jsonl" in text for text in remedies)
    Path("mine/code_sft").mkdir(parents=True)
    Path("mine/code_sft/train.jsonl").touch()
    again = recipe("data.root=mine")
    assert not any("/code_sft/train.jsonl" in file.text for file in again)
