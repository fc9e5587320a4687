"""The pool of worker processes that the other distributed tests stand on."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import pytest

from tests.distributed.pool import RemoteError, WorkerPool, with_topology


@dataclass
class Shipped:
    """A class of a test module, which no worker can import by name."""

    value: int


def rank_and_argument(argument: Shipped) -> Shipped:
    import torch.distributed as dist

    return Shipped(argument.value + 10 * dist.get_rank())


def raise_on(*ranks: int) -> int:
    import torch.distributed as dist

    if dist.get_rank() in ranks:
        raise ValueError(f"bad luck on {dist.get_rank()}")
    return os.getpid()


def collective_unless(absent: int) -> None:
    import torch
    import torch.distributed as dist

    if dist.get_rank() == absent:
        raise KeyError("absent")
    dist.all_reduce(torch.ones(1))


def sleep_on(rank: int, seconds: float) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank:
        time.sleep(seconds)


def die() -> None:
    os._exit(9)


def sum_over_tensor_group(topology, start: float) -> float:
    import torch
    import torch.distributed as dist

    value = torch.tensor([start + topology.tensor_rank])
    dist.all_reduce(value, group=topology.tensor_group)
    return value.item()


def pid() -> int:
    return os.getpid()


def test_functions_and_classes_of_a_test_module_reach_the_workers(pool2):
    assert pool2.run(rank_and_argument, Shipped(5)) == [Shipped(5), Shipped(15)]


def test_topology_is_put_on_and_taken_off(pool2):
    assert pool2.run(with_topology, sum_over_tensor_group, {"tensor": 2}, 1.0) == [3.0, 3.0]
    assert pool2.run(with_topology, sum_over_tensor_group, {"tensor": 1}, 1.0) == [1.0, 1.0]


def test_an_error_on_all_ranks_leaves_the_pool_alive(pool2):
    before = pool2.run(pid)
    with pytest.raises(RemoteError, match=r"(?s)raised:.*in raise_on.*ValueError: bad luck on"):
        pool2.run(raise_on, 0, 1)
    assert pool2.run(pid) == before


@pytest.mark.full
def test_an_error_on_one_rank_is_named_and_the_pool_rebuilt():
    pool = WorkerPool(2)
    try:
        before = pool.run(pid)
        with pytest.raises(RemoteError, match="rank 1 of 2") as caught:
            pool.run(collective_unless, 1)
        assert caught.value.type_name == "KeyError"
        after = pool.run(pid)
        assert not set(before) & set(after)
        with pytest.raises(TimeoutError, match=r"(?s)ranks \[1\] of 2.*in sleep_on"):
            pool.run(sleep_on, 1, 60.0, timeout=2.0)
        with pytest.raises(RemoteError, match="exit code 9"):
            pool.run(die)
        assert pool.run(rank_and_argument, Shipped(0))[1] == Shipped(10)
    finally:
        pool.close()


def test_a_local_function_is_refused_with_the_reason(pool1):
    def local() -> None: ...

    with pytest.raises(TypeError, match="top level"):
        pool1.run(local)
