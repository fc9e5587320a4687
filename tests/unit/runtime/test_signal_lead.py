"""The time between the signal and the time limit."""

import logging

import pytest

from nemo_align.runtime import signal_lead
from nemo_align.runtime.logs import LOGGER_NAME


def test_the_340b_at_80_and_at_20_gigabytes_per_second():
    # 4.77 TB of training state, steps of 30 s: 60 s and 239 s per save.
    assert signal_lead.needed_seconds(30, 4770 / 80, asynchronous=False) == 150
    assert signal_lead.needed_seconds(30, 4770 / 20, asynchronous=False) == 418
    # One that is in flight is finished first; the default of 600 s holds down to 26.5 GB/s.
    assert signal_lead.needed_seconds(30, 4770 / 26.5, asynchronous=True) == 600
    assert signal_lead.needed_seconds(30, 4770 / 20, asynchronous=True) == 776


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_longest_save_that_a_lead_holds(asynchronous):
    longest = signal_lead.longest_save(600, asynchronous=asynchronous)
    assert signal_lead.needed_seconds(0, longest, asynchronous=asynchronous) == 600
    assert signal_lead.longest_save(30, asynchronous=asynchronous) == 0


def test_the_lead_of_a_job_is_that_of_its_script_unless_it_says():
    assert signal_lead.configured({signal_lead.VARIABLE: "900"}) == 900
    assert signal_lead.configured({}) == signal_lead.configured({signal_lead.VARIABLE: ""}) == 600


@pytest.mark.parametrize(
    ("variables", "warns"),
    [
        ({"SLURM_JOB_ID": "7", signal_lead.VARIABLE: "100"}, True),
        ({"SLURM_JOB_ID": "7", signal_lead.VARIABLE: "105"}, False),
        ({signal_lead.VARIABLE: "100"}, False),  # inherited by a command outside of a job
        ({"SLURM_JOB_ID": "7"}, False),  # of a batch script of one's own
    ],
)
def test_a_run_says_once_what_its_saves_need(variables, warns, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger(LOGGER_NAME), "propagate", True)
    clock = iter([0.0, 20.0, 1000.0, 1001.0])
    monkeypatch.setattr(signal_lead.time, "monotonic", lambda: next(clock))
    check = signal_lead.LeadCheck(asynchronous=False, variables=variables)
    check.look()
    check.look()  # a step of 20 s
    check.pause()  # a save that is waited for is no step
    check.look()
    check.look()
    for _ in range(2):
        check.saved(36.0)
    assert [record.getMessage() for record in caplog.records] == (
        [
            "a save took 36 s and the longest step 20 s: the signal must come 104 s before the time limit, not 100 "
            "(cluster.signal_lead_seconds=104; or sbatch --signal=TERM@104 and NEMO_ALIGN_SIGNAL_LEAD=104). A job "
            "whose last save is cut off goes on from the one before"
        ]
        if warns
        else []
    )
