"""Whether the plan of a stage fits on the GPUs that are there."""

import logging

import pytest

from nemo_align.config.compose import compose
from nemo_align.config.doctor import stage_of
from nemo_align.preflight import start
from nemo_align.preflight.checks import FAILED, NOTE, OK, WARNING
from nemo_align.preflight.fit import check_fit
from nemo_align.runtime.launch_environment import single_process

H100 = int(79.1 * 2**30)
SFT = ["+experiment=nemotron4_340b/code_sft"]


def stage(arguments, verb="sft"):
    return compose(verb, arguments, check_files=False)


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No run directory in sight."""
    monkeypatch.chdir(tmp_path)


def test_the_340bs_recipe_fits_and_says_where_the_most_is_needed():
    check = check_fit("code_sft", stage(SFT), H100)
    assert check.status == OK
    assert check.text == "code_sft on 192 GPUs: 54.1 of 84.9 GB on the largest rank, stage 11 of 12"
    assert check_fit("code_sft", stage(SFT), None).text == f"{check.text} (of an 80 GB card: no GPU here)"


def test_the_nearest_changes_are_overrides_under_which_it_fits():
    layout = ["parallel=tp8_pp12", "parallel.data=1"]
    check = check_fit("code_sft", stage([*SFT, *layout]), H100)
    assert check.status == FAILED and "it does NOT fit" in check.text
    changes = check.remedy.split(", or ")
    assert changes[0] == "parallel.recompute=full" and len(changes) > 1
    for change in changes:
        assert check_fit("code_sft", stage([*SFT, *layout, *change.split()]), H100).status == OK


def test_changes_name_the_size_where_it_was_named():
    layout = ["parallel=tp8_pp12", "parallel.data=null", "gpus=96"]
    changes = check_fit("code_sft", stage([*SFT, *layout]), H100).remedy.split(", or ")
    assert "parallel.data=4 gpus=384" in changes
    for change in changes:
        assert check_fit("code_sft", stage([*SFT, *layout, *change.split()]), H100).status == OK


def test_the_gpu_that_is_there_decides():
    assert check_fit("code_sft", stage(SFT), 140 * 10**9).status == OK  # an H200
    small = check_fit("code_sft", stage(SFT), 40 * 10**9)
    assert small.status == FAILED and "54.1 of 40 GB" in small.text and small.remedy
    tight = check_fit("code_sft", stage(SFT), 56 * 10**9)
    assert tight.status == WARNING and "tight" in tight.text
    nothing = check_fit("code_sft", stage(SFT), 10**9)
    assert nothing.status == FAILED and "search=true" in nothing.remedy


def test_the_size_of_the_job_is_that_of_the_key_or_of_the_ranks_that_form_the_layout():
    config = stage(["+experiment=minitron_4b/code_sft"])
    assert check_fit("a", config, H100, started=16).text.startswith("a on 8 GPUs")
    config.gpus = None
    eight, two = (check_fit("a", config, H100, started=started) for started in (8, None))
    assert eight.text.startswith("a on 8 GPUs: 28.1 of") and two.text.startswith("a on 2 GPUs: 4")
    assert check_fit("a", config, H100, started=7).text == two.text
    config.gpus = 7
    wrong = check_fit("a", config, H100)
    assert wrong.status == FAILED and "gpus=7 cannot form" in wrong.text


def test_scoring_needs_weights_and_one_micro_batch():
    check = check_fit("score_pairs", stage(["+experiment=nemotron4_340b/score_pairs"], "score"), H100)
    assert check.status == OK and "score_pairs on 96 GPUs: 10.8 of" in check.text
    assert check_fit("score_pairs", stage(["+experiment=nemotron4_340b/score_pairs"], "score"), 10**10).status == FAILED


def test_a_checkpoint_to_come_has_the_model_of_the_stage_that_will_write_it():
    verb, config = stage_of(["+experiment=quickstart/code_sft"])
    assert verb == "sft" and config.model.num_layers == 4
    assert check_fit("code_sft", config, H100).status == OK
    _, config = stage_of(["+experiment=quickstart/code_sft", "checkpoint.init_from=runs/nobody"])
    assert check_fit("code_sft", config, H100).status == NOTE


def test_a_job_that_starts_is_warned_and_not_refused(caplog):
    config = stage(SFT)
    with caplog.at_level(logging.WARNING, logger="nemo_align"):
        start._look_at_plan(config, single_process(), H100)
        assert caplog.text == ""
        start._look_at_plan(config, single_process(), 40 * 10**9)
    assert "it does NOT fit. Nearest changes: " in caplog.text


def test_a_node_whose_packages_cannot_run_says_so(tmp_path, monkeypatch):
    found = {"torch": "2.9.1", "CUDA": "13.0", "megatron-core": "0.16.1", "Transformer Engine": "2.9"}
    monkeypatch.setattr(start.versions, "loaded_driver", lambda: ("535.129.03", 8))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert list(start._wrong(found, 0)) == list(start._wrong(found, 8)) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (blind,) = start._wrong(found, 0)
    assert blind.text == "8 GPUs are there, but torch for CUDA 13.0 sees none through driver 535.129.03"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    assert [check.name for check in start._wrong(found, 8)] == ["apex"]
