"""Which node is to blame for a slow group, from rates as ranks measure them."""

import pytest

from nemo_align.preflight.checks import FAILED, OK, WARNING, exit_code
from nemo_align.preflight.links import Rates, _rounds, judge

H100 = "NVIDIA H100 80GB HBM3"


def cluster(
    num_nodes: int, slow: str = "", *, rate: float = 41.0, slow_rate: float = 3.1, own: float = 700.0
) -> list[Rates]:
    """Two ranks per node; a pair is as slow as the slower of its nodes, a group as its slowest member."""
    names = [f"dgx{number:02d}" for number in range(1, num_nodes + 1)]
    rates = []
    for index, name in enumerate(names):
        pairs = {}
        for other in {names[index - 1], names[(index + 1) % num_nodes]} - {name}:
            pairs[other] = slow_rate if slow in (name, other) else rate
        for local in range(2):
            groups = {"tensor": (2 * index, 300.0), "data": (local, slow_rate if slow else rate)}
            rates.append(Rates(2 * index + local, name, own, groups, pairs))
    return rates


def failures(rates: list[Rates], accelerator: str = H100) -> list[str]:
    return [check.text for check in judge(rates, accelerator) if check.status == FAILED]


def test_healthy_nodes_pass():
    checks = judge(cluster(24), H100)
    assert exit_code(checks) == 0 and {check.status for check in checks} == {OK}
    assert checks[
        1
    ].text == "data: 2 groups, all-reduce 41 GB/s, the slowest 41 GB/s (ranks 0, 2, 4, 6, 8, 10, 12, 14, ... on " + (
        "dgx01, dgx02, dgx03, dgx04, dgx05, dgx06, dgx07, dgx08 and 16 more)"
    )


@pytest.mark.parametrize("num_nodes", [3, 4, 24])
def test_the_slow_node_is_named_and_not_its_neighbours(num_nodes):
    rates = cluster(num_nodes, slow="dgx02")
    assert failures(rates) == ["dgx02 is slow: 3.1 GB/s to its neighbours, the others 41 GB/s"]
    (check,) = (check for check in judge(rates, H100) if check.status == FAILED)
    assert check.remedy.startswith("leave it out (sbatch --exclude=dgx02)")


def test_of_two_nodes_only_their_own_work_can_tell():
    assert failures(cluster(2)) == []
    rates = cluster(2)
    rates[2] = Rates(2, "dgx02", 200.0, rates[2].groups, rates[2].pairs)
    assert failures(rates) == ["dgx02 is slow: 200 TFLOP/s of its own work, the others 700 TFLOP/s"]


def test_a_slow_group_among_its_kind_is_a_warning():
    rates = cluster(4)
    for rank in (4, 5):
        rates[rank].groups["tensor"] = (4, 90.0)
    (check,) = (check for check in judge(rates, H100) if check.status == WARNING)
    assert check.text == "tensor: 4 groups, all-reduce 300 GB/s, the slowest 90 GB/s (ranks 4, 5 on dgx03)"


def test_nodes_that_are_equally_slow_do_not_use_their_network():
    assert failures(cluster(4, rate=2.5)) == ["2.5 GB/s between neighbours, below 10: NCCL does not use InfiniBand"]
    assert failures(cluster(4, rate=2.5), "Intel(R) Xeon(R)") == []  # what is slow there, nobody knows
    assert failures(cluster(1)) == []


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9])
def test_rounds_cover_the_ring_and_nobody_has_two_partners(count):
    rounds = _rounds(count)
    assert len(rounds) <= 3
    for pairs in rounds:
        members = [member for pair in pairs for member in pair]
        assert len(members) == len(set(members))
    ring = {frozenset((index, (index + 1) % count)) for index in range(count)}
    assert {frozenset(pair) for pairs in rounds for pair in pairs} == ring
