"""The process grid on real gloo groups."""

from __future__ import annotations

import pytest

from tests.distributed.pool import RemoteError, with_topology


def place(topology) -> dict:
    import torch.distributed as dist

    return {
        "place": (topology.pipeline_rank, topology.data_rank, topology.tensor_rank),
        "tensor": dist.get_process_group_ranks(topology.tensor_group),
        "data": dist.get_process_group_ranks(topology.data_group),
        "pipeline": dist.get_process_group_ranks(topology.pipeline_group),
        "first": topology.is_first_stage,
        "last": topology.is_last_stage,
        "sequence": topology.sequence,
        "layout": topology.layout(),
    }


def fail(topology) -> None:
    raise RuntimeError(f"on {topology.rank}")


def number_of_groups() -> int:
    import torch.distributed as dist

    return len(dist.distributed_c10d._world.pg_map)


def draws(topology) -> dict:
    import random

    import numpy as np
    import torch
    from megatron.core import tensor_parallel

    from nemo_align.runtime import seeds

    def draw() -> tuple:
        with tensor_parallel.get_cuda_rng_tracker().fork():
            split = torch.rand(()).item()
        return random.random(), np.random.rand(), torch.rand(()).item(), split

    seeded = draw()
    state = seeds.rng_state()
    first, _ = draw(), draw()
    seeds.set_rng_state(state)
    return {"seeded": seeded, "first": first, "again": draw()}


def test_rank_order_is_tensor_then_data_then_pipeline(pool4):
    ranks = pool4.run(with_topology, place, {"tensor": 2, "pipeline": 2})
    assert [rank["place"] for rank in ranks] == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
    assert [rank["tensor"] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["pipeline"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["first"] for rank in ranks] == [True, True, False, False]
    assert [rank["last"] for rank in ranks] == [False, False, True, True]

    ranks = pool4.run(with_topology, place, {"tensor": 2, "data": 2, "sequence": True})
    assert [rank["place"] for rank in ranks] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert [rank["data"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    layout = {"tensor": 2, "pipeline": 1, "virtual_pipeline": 1, "data": 2, "sequence": True, "world_size": 4}
    assert ranks[3]["layout"] == layout


def test_groups_do_not_pile_up_when_the_grid_changes(pool2):
    pool2.run(with_topology, place, {"tensor": 2})
    before = pool2.run(number_of_groups)
    for _ in range(2):
        pool2.run(with_topology, place, {"pipeline": 2})
    with pytest.raises(RemoteError, match="RuntimeError: on"):
        pool2.run(with_topology, fail, {"tensor": 2})
    assert pool2.run(number_of_groups) == before == [1, 1]


def test_sequence_parallel_needs_a_tensor_group(pool2):
    assert not pool2.run(with_topology, place, {"tensor": 1, "sequence": True})[0]["sequence"]


@pytest.mark.parametrize("parallel", [{"tensor": 4}, {"tensor": 2, "data": 2}, {"pipeline": 3}])
def test_a_grid_that_does_not_fit_is_refused(pool2, parallel):
    with pytest.raises(RemoteError, match=r"processes .*were started\. Change the layout") as caught:
        pool2.run(with_topology, place, parallel)
    assert caught.value.type_name == "ValueError"


def test_generators_follow_the_grid_and_come_back(pool4):
    tensor = pool4.run(with_topology, draws, {"tensor": 2, "data": 2})
    shared = [rank["seeded"][:3] for rank in tensor]
    assert shared[0] == shared[1] == shared[2] == shared[3]
    split = [rank["seeded"][3] for rank in tensor]
    assert split[0] == split[2] and split[1] == split[3] and split[0] != split[1]  # data replicas agree
    for rank in tensor:
        assert rank["first"] == rank["again"] != rank["seeded"]
    stages = pool4.run(with_topology, draws, {"tensor": 2, "pipeline": 2})
    assert stages[0]["seeded"][:3] != stages[2]["seeded"][:3]
    other_seed = pool4.run(with_topology, draws, {"tensor": 2, "pipeline": 2}, seed=7)
    assert other_seed[0]["seeded"] != stages[0]["seeded"]
