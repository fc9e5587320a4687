"""What the environment variables of torchrun, SLURM and our own launcher say."""

from __future__ import annotations

import pytest

from nemo_align.runtime.launch_environment import LaunchEnvironment, detect, expand_node_list, expand_tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "host",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_NODELIST": "dgx[007-008]",
}


def test_bare_command():
    assert detect({"PATH": "/bin"}) is None


def test_torchrun():
    assert detect(TORCHRUN) == LaunchEnvironment(5, 16, 1, 4, "env://", "torchrun")


def test_torchrun_inside_a_slurm_step_goes_first():
    environment = detect(TORCHRUN | SRUN)
    assert environment is not None
    assert (environment.source, environment.rank) == ("torchrun", 5)


def test_incomplete_torchrun_variables_are_named():
    with pytest.raises(ValueError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not"):
        detect({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="RANK='x' is not an integer"):
        detect(TORCHRUN | {"RANK": "x"})


def test_srun_step():
    environment = detect(SRUN)
    assert environment is not None
    assert environment == LaunchEnvironment(9, 16, 1, 8, environment.init_method, "slurm")
    host, _, port = environment.init_method.removeprefix("tcp://").partition(":")
    assert host == "dgx007"
    assert 15000 <= int(port) < 30000


def test_all_ranks_of_a_step_meet_at_one_place_and_other_steps_elsewhere():
    def place(**changes: str) -> str:
        environment = detect(SRUN | changes)
        assert environment is not None
        return environment.init_method

    assert place() == place(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert len({place(), place(SLURM_STEP_ID="1"), place(SLURM_JOB_ID="123457")}) == 3
    assert place(MASTER_ADDR="10.0.0.1", MASTER_PORT="1234") == "tcp://10.0.0.1:1234"


def test_a_step_on_part_of_the_job_meets_on_its_own_first_node():
    environment = detect(SRUN | {"SLURM_STEP_NODELIST": "dgx008", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NODEID": "0"})
    assert environment is not None
    assert environment.init_method.startswith("tcp://dgx008:")
    assert environment.world_size == 8


@pytest.mark.parametrize("step", [None, "batch", "extern", "4294967291", "4294967290"])
def test_the_batch_script_is_no_step(step):
    variables = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert detect(variables if step is None else variables | {"SLURM_STEP_ID": step}) is None


def test_workers_of_our_launcher():
    own = {
        "NEMO_ALIGN_RANK": "1",
        "NEMO_ALIGN_WORLD_SIZE": "2",
        "NEMO_ALIGN_LOCAL_RANK": "1",
        "NEMO_ALIGN_LOCAL_WORLD_SIZE": "2",
        "NEMO_ALIGN_INIT_METHOD": "file:///tmp/x",
    }
    # Also inside an srun step, whose variables the worker inherits.
    assert detect(SRUN | own) == LaunchEnvironment(1, 2, 1, 2, "file:///tmp/x", "local")


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("node1", ["node1"]),
        ("a,b", ["a", "b"]),
        ("node[001-003,7]", ["node001", "node002", "node003", "node7"]),
        ("dgx[01-02,07],login-[9-11]", ["dgx01", "dgx02", "dgx07", "login-9", "login-10", "login-11"]),
        ("r[1-2]n[1-2].x", ["r1n1.x", "r1n2.x", "r2n1.x", "r2n2.x"]),
    ],
)
def test_node_lists(text, hosts):
    assert expand_node_list(text) == hosts


@pytest.mark.parametrize("text", ["", "a,,b", "a[1-2", "a]1[", "a[x-2]", "a[]", ",a"])
def test_malformed_node_lists(text):
    with pytest.raises(ValueError, match="is not a SLURM node list"):
        expand_node_list(text)


def test_tasks_per_node():
    assert expand_tasks_per_node("8(x2),4") == [8, 8, 4]
    with pytest.raises(ValueError, match="tasks per node"):
        expand_tasks_per_node("8(2)")
