"""The lead of each stage's stop signal: the plan's, or the site's held against the plan."""

import pytest

from nemo_align.config.compose import compose
from nemo_align.config.errors import ConfigError
from nemo_align.pipeline.chain import build_chain, compose_chain
from nemo_align.pipeline.leads import leads, warning


def found(*arguments: str):
    """Leads of the first stages of the 340B: pretraining on 768 nodes, Code SFT on 24, scores on 12."""
    left_out = [f"~stages.{name}" for name in ("general_sft", "dpo", "rpo_1", "rpo_2", "rpo_3")]
    config = compose("pipeline", ["+experiment=nemotron4_340b/recipe", *left_out, "cluster=dgx_h100", *arguments])
    stages = build_chain(config)
    return leads(stages, compose_chain(stages, set(), check_files=False), config.cluster)


def test_without_a_site_s_word_each_stage_has_what_the_plan_says():
    of = found()
    assert of["pretrain"].seconds == of["score_pairs"].seconds == 600
    # Its 4.77 TB twice, at the 15 GB/s that 24 nodes have of the plan's file system.
    assert of["code_sft"].plan.checkpoint.seconds == pytest.approx(318, abs=1)
    assert of["code_sft"].seconds == of["code_sft"].plan.signal_lead_seconds > 1.5 * 2 * 318 + 30
    assert warning(of) is None


def test_a_site_s_word_is_taken_and_held_against_the_plan():
    of = found("cluster.signal_lead_seconds=700")
    assert {lead.seconds for lead in of.values()} == {700}
    said = warning(of)
    assert said.startswith("cluster.signal_lead_seconds=700, but by the plan the saves of these stages need more")
    assert f"code_sft {of['code_sft'].plan.signal_lead_seconds} s" in said and "reward 989 s" in said
    assert "pretrain" not in said and "score_pairs" not in said
    assert warning(found("cluster.signal_lead_seconds=1200")) is None


def test_a_time_limit_that_the_lead_fills_is_refused():
    with pytest.raises(
        ConfigError, match=r"^stage code_sft: the job has to be told to stop \d+ s before its time limit, but "
    ):
        found("cluster.time_limit='00:15:00'")
    assert found("cluster.time_limit='00:15:00'", "cluster.signal_lead_seconds=300")["code_sft"].seconds == 300


def test_layouts_that_do_not_fill_nodes_are_named_with_their_stages():
    with pytest.raises(ConfigError) as refused:
        found("cluster.gpus_per_node=7")
    said = "do not fill nodes of 7: choose parallel.data so that they do, or correct cluster.gpus_per_node"
    assert str(refused.value).splitlines() == [
        f"{names}: parallel.tensor x pipeline x data = {workers} workers {said}"
        for names, workers in (
            ("stages pretrain, continued_pretrain", 6144),
            ("stages code_sft, reward", 192),
            ("stage score_pairs", 96),
        )
    ]


def test_nodes_without_gpus_are_not_planned():
    texts = ["+experiment=quickstart/short", "cluster=slurm", "cluster.gpus_per_node=null", "cluster.tasks_per_node=1"]
    config = compose("pipeline", texts)
    stages = build_chain(config)
    of = leads(stages, compose_chain(stages, set(), check_files=False), config.cluster)
    assert {(lead.seconds, lead.plan) for lead in of.values()} == {(600, None)}
