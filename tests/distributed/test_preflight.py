"""Links and nodes on real ranks: one of them slowed down, or without the data."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.distributed import pool
from tests.distributed.pool import RemoteError, with_topology
from tests.stage_inputs import MODEL, stage_overrides

# Stops and wakes its parent, which so gets a tenth of its time.
THROTTLE = """
import os, signal, sys, time
while os.getppid() == int(sys.argv[1]):
    os.kill(int(sys.argv[1]), signal.SIGSTOP)
    time.sleep(0.18)
    os.kill(int(sys.argv[1]), signal.SIGCONT)
    time.sleep(0.02)
"""


def rates(topology, slow_rank: int | None, per_node: int) -> list:
    from nemo_align.preflight import links

    throttle = None
    if topology.rank == slow_rank:
        throttle = subprocess.Popen([sys.executable, "-c", THROTTLE, str(os.getpid())])
    try:
        return links.measure(topology, f"dgx{topology.rank // per_node + 1}")
    finally:
        if throttle is not None:
            throttle.kill()
            throttle.wait()


@pytest.mark.parametrize("per_node", [1, 4])  # nodes are compared, or the ranks of the only one
def test_a_rank_that_gets_a_tenth_of_its_time_is_named(pool4, per_node):
    from nemo_align.preflight import links
    from nemo_align.preflight.checks import FAILED

    found = pool4.run(with_topology, rates, {"tensor": 2, "data": 2}, 2, per_node)[0]
    assert [entry.rank for entry in found] == [0, 1, 2, 3]
    name = "dgx3" if per_node == 1 else "rank 2 on dgx1"
    slow = [check.text for check in links.judge(found, "CPU") if check.status == FAILED]
    assert any(text.startswith(f"{name} is slow: ") for text in slow), (slow, found)
    # Whatever else happens on this machine: no other rank is slower.
    best = {entry.rank: max(entry.pairs.values()) for entry in found}
    assert min(best, key=lambda rank: best[rank]) == 2, best


def test_every_group_of_a_layout_is_timed(pool4):
    found = pool4.run(with_topology, rates, {"tensor": 2, "pipeline": 2}, None, 2)[0]
    assert {entry.rank: {kind: first for kind, (first, _) in entry.groups.items()} for entry in found} == {
        0: {"tensor": 0, "pipeline": 0, "all ranks": 0},
        1: {"tensor": 0, "pipeline": 1, "all ranks": 0},
        2: {"tensor": 2, "pipeline": 0, "all ranks": 0},
        3: {"tensor": 2, "pipeline": 1, "all ranks": 0},
    }
    assert all(rate > 0 for entry in found for _, rate in entry.groups.values())
    assert [set(entry.pairs) for entry in found] == [{"dgx2"}, {"dgx2"}, {"dgx1"}, {"dgx1"}]


def start_of_a_job(topology, arguments: list[str], empty: str) -> list[str]:
    """check_job with a node per rank; rank 1 runs where the relative paths lead nowhere."""
    from nemo_align.config.compose import compose
    from nemo_align.preflight.start import check_job

    config = compose("sft", arguments)
    here = os.getcwd()
    if topology.rank == 1:
        os.chdir(empty)
    os.environ["SLURMD_NODENAME"] = f"dgx{topology.rank + 1}"
    try:
        return check_job(config, replace(pool.environment, local_rank=0, local_world_size=1))
    finally:
        os.chdir(here)
        del os.environ["SLURMD_NODENAME"]


def test_a_job_starts_only_where_every_node_has_the_data(pool2, stage_inputs, tmp_path):
    arguments = [*MODEL, *stage_overrides(stage_inputs, "sft"), f"run_dir={tmp_path}/run"]
    places = pool2.run(with_topology, start_of_a_job, {"data": 2}, arguments, str(tmp_path))[0]
    assert len(places) == 2 and all("pid" in place for place in places)
    relative = os.path.relpath(stage_inputs.rows("dialogues"))
    with pytest.raises(RemoteError, match=r"dialogues.jsonl does not exist \(on dgx2\)\. put it there") as error:
        pool2.run(
            with_topology, start_of_a_job, {"data": 2}, [*arguments, f"data.train.rows.path={relative}"], str(tmp_path)
        )
    assert error.value.type_name == "ValueError"
