"""Each answer that the CPU facade gives, so that a new Megatron-core or torch says which one it broke.

tests/distributed/test_cpu_facade.py trains a model on all of them together.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_align.runtime import device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the facade is only for machines without a GPU")
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module", autouse=True)
def facade() -> None:
    device.install()


def run_python(code: str, *paths: Path) -> subprocess.CompletedProcess:
    path = os.pathsep.join(map(str, [*paths, ROOT]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_torch_still_says_that_there_is_no_gpu():
    assert not torch.cuda.is_available()
    assert not device.use_gpu()
    assert device.device() == CPU
    assert device.select(3) == CPU
    assert device.backend() == "gloo"
    assert device.accelerator_name()


def test_current_device_is_the_cpu():
    assert torch.ones(2, device=torch.cuda.current_device()).device == CPU
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def test_streams_and_events_have_nothing_to_order():
    side = torch.cuda.Stream(device="cuda", priority=-1)
    torch.cuda.current_stream().wait_stream(side)
    side.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(side):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    side.wait_event(event)
    event.synchronize()
    assert event.query()  # whatever was recorded is over already


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.tensor([1.0], dtype=torch.float, device="cuda"),
        lambda: torch.zeros([], dtype=torch.int, device="cuda"),
        lambda: torch.ones(2, device="cuda:0"),
        lambda: torch.empty(2, device="cuda"),
        lambda: torch.full((2,), 3.0, device="cuda"),
        lambda: torch.arange(3, device="cuda"),
        lambda: torch.tensor([0, 4], device="cuda", pin_memory=True),
        lambda: torch.empty_like(torch.ones(2), device="cuda"),
        lambda: torch.zeros_like(torch.ones(2), device="cuda"),
        lambda: torch.ones_like(torch.ones(2), device="cuda"),
        lambda: torch.full_like(torch.ones(2), 1.0, device="cuda"),
    ],
)
def test_factories_with_a_literal_cuda(make):
    assert make().device == CPU


def test_factories_are_otherwise_torchs_own():
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.full((2,), 2.5).tolist() == [2.5, 2.5]
    with torch.device("meta"):  # transformers loads models inside this context
        assert torch.empty(2).device.type == "meta"
        assert torch.tensor([1.0]).device.type == "meta"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.randn(2, device=torch.device("cuda"))


def test_scripted_functions_know_the_factories():
    def two_more(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, torch.zeros(2)])

    assert torch.jit.script(two_more)(torch.ones(1)).tolist() == [1.0, 0.0, 0.0]


def test_tensors_and_modules_move_to_the_cpu_they_are_on():
    tensor = torch.ones(2, 2, 2, 2)
    assert tensor.cuda(torch.cuda.current_device(), non_blocking=True) is tensor
    assert torch.nn.Linear(2, 2).cuda().weight.device == CPU


def test_cuda_tensor_types_stay_types():
    assert torch.cuda.FloatTensor([1.5]).tolist() == [1.5]
    assert torch.cuda.IntTensor([2]).dtype == torch.int32
    assert isinstance(torch.ones(1), torch.cuda.FloatTensor)
    assert isinstance(torch.ones(1, dtype=torch.bfloat16), torch.cuda.BFloat16Tensor)
    assert not isinstance(torch.ones(1), torch.cuda.HalfTensor)


def test_float16_module_converts_both_ways():
    from megatron.core.transformer.module import float16_to_fp32, fp32_to_float16

    low = fp32_to_float16(torch.ones(2), lambda value: value.bfloat16())
    assert low.dtype == torch.bfloat16
    assert float16_to_fp32(low).dtype == torch.float32


def test_random_states_are_those_of_the_one_generator():
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), first)


def test_megatrons_tracker_forks_and_comes_back(caplog):
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("weights", 7)
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        with tracker.fork("weights"):
            inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with tracker.fork("weights"):
        assert not torch.equal(torch.rand(2), inside)  # it went on, rather than started again
    torch.manual_seed(7)
    assert torch.equal(torch.rand(2), inside)
    assert "RNG state changed" not in caplog.text


def test_recomputation_draws_the_same_numbers_again():
    from megatron.core.tensor_parallel import random as megatron_random

    torch.manual_seed(3)
    x = torch.ones(64, requires_grad=True)
    y = megatron_random.checkpoint(lambda value: torch.nn.functional.dropout(value, 0.5), False, x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # both are 0 or 2 at the same places


def test_gradient_clipping_takes_cpu_gradients():
    from megatron.core.optimizer import optimizer
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert optimizer.clip_grad_by_total_norm_fp32 is clip_grad_by_total_norm_fp32
    assert parameter.type() == "torch.FloatTensor"  # outside of Megatron's comparisons, torch's own answer


def test_fused_functions_are_not_compiled():
    # In a process of its own: here another test may have imported Megatron-core before the facade was there.
    done = run_python(
        "import torch\nfrom nemo_align.runtime import device; device.install()\n"
        "from megatron.core.activations import squared_relu\n"
        "print(squared_relu(torch.tensor([-1.0, 3.0])).tolist(), hasattr(squared_relu, '_torchdynamo_orig_callable'))\n"
        "print(torch.compile.__module__)"  # only Megatron's import saw the other one
    )
    assert done.stdout.splitlines() == ["[0.0, 9.0] False", "torch"], done.stderr


def test_installing_again_changes_nothing():
    before = torch.zeros
    device.install()
    assert torch.zeros is before


def test_transformer_engine_is_hidden(tmp_path):
    # What matters is that nothing imports it, so a package that says when it is imported is enough.
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("print('imported')\n__version__ = '2.0.0'\n")
    done = run_python(
        "from nemo_align.runtime import device; device.install()\n"
        "from megatron.core.tensor_parallel import random\n"
        "import importlib.util\n"
        "print(random.HAVE_TE, importlib.util.find_spec('transformer_engine'))",
        tmp_path,
    )
    assert done.stdout.splitlines() == ["False None"], done.stderr
    late = run_python("import transformer_engine\nfrom nemo_align.runtime import device; device.install()", tmp_path)
    assert "transformer_engine was imported before" in late.stderr


def test_installing_is_quiet():
    done = run_python("from nemo_align.runtime import device; device.install()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
