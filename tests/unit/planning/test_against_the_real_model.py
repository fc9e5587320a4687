"""The memory model against a real model on a CPU: what autograd keeps, byte by byte, and the peak of the process.

Megatron-core's local layers in fp32, one process. Kept bytes are those of the storages that the forward pass saves for
the backward pass. Three of them are no part of the plan, which is for Transformer Engine's layers: they are named here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_align.config.model import ModelConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
from nemo_align.planning.activations import chunk_bytes, layer_bytes
from nemo_align.planning.job import Job, StepWork
from nemo_align.planning.memory import memory_plan
from tests.fresh_process import answer

pytestmark = pytest.mark.full

TOKENS = 256
SMALL = {"hidden_size": 128, "ffn_hidden_size": 512, "num_attention_heads": 8, "num_query_groups": 2, "vocab_size": 512}
WIDE = {**SMALL, "hidden_size": 512, "ffn_hidden_size": 2048, "vocab_size": 8192}
PEAKS = {"none": ("none", 4, 4096), "full": ("full", 4, 4096)}  # recompute, layers, tokens


def model(layers: int, sizes: dict[str, int]) -> ModelConfig:
    return ModelConfig(name="small", num_layers=layers, max_sequence_length=4096, **sizes)


def planned(layers: int, sizes: dict[str, int], tokens: int, recompute: str) -> Job:
    work = StepWork(
        examples=1,
        micro_batches=1,
        tokens=tokens,
        squared_tokens=tokens**2,
        real_tokens=tokens,
        real_squared_tokens=tokens**2,
    )
    return Job(
        model=model(layers, sizes),
        parallel=ParallelConfig(data=1, recompute=recompute),
        precision=PrecisionConfig(dtype="fp32"),
        work=work,
    )


class RealModel:
    """A process of its own with one rank."""

    def __init__(self) -> None:
        from nemo_align.runtime import device

        device.install()
        import torch
        from megatron.core import parallel_state
        from torch import distributed

        from nemo_align.runtime import seeds
        from nemo_align.runtime.topology import Topology

        torch.set_num_threads(1)
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel(1, 1)
        self.topology = Topology(
            world_size=1, rank=0, tensor=1, pipeline=1, virtual_pipeline=1, data=1, sequence=False,
            tensor_rank=0, pipeline_rank=0, data_rank=0, device=torch.device("cpu"),
        )  # fmt: skip
        seeds.seed_everything(1, self.topology)

    def kept(self, layers: int, recompute: str) -> int:
        """Bytes of all storages that a forward pass keeps, weights aside."""
        import torch

        chunk = self._build(layers, SMALL, recompute)[0]
        weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
        found: dict[int, torch.Tensor] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        tokens = torch.randint(0, SMALL["vocab_size"], (1, TOKENS))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = chunk(tokens, torch.arange(TOKENS)[None], None)
        assert output.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    def peak(self, recompute: str, layers: int, tokens: int) -> int:
        """How far the process grows over two training steps, from before the model is built."""
        import torch

        from nemo_align.config.training import OptimizerConfig
        from nemo_align.objectives.log_probs import log_probs_and_hits
        from nemo_align.training.optimizer import (
            ScheduleLength,
            apply_gradients,
            build_optimizer,
            gradient_norm,
            wrap_data_parallel,
        )

        Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
        before = _status("VmRSS")
        parallel, precision = ParallelConfig(data=1, recompute=recompute), PrecisionConfig(dtype="fp32")
        wrapped = wrap_data_parallel(self._build(layers, WIDE, recompute), parallel, precision)
        optimizer, _ = build_optimizer(
            wrapped, OptimizerConfig(lr=1e-4), parallel, precision, ScheduleLength(warmup=0, decay=10)
        )
        for _ in range(2):
            wrapped[0].zero_grad_buffer()
            ids = torch.randint(0, WIDE["vocab_size"], (1, tokens))
            logits = wrapped[0](ids, torch.arange(tokens)[None], None)
            log_probs, _ = log_probs_and_hits(
                logits, ids, group=None, vocab_size=WIDE["vocab_size"], overwrite_logits=True
            )
            (-log_probs.mean()).backward()
            del logits, log_probs
            apply_gradients(optimizer, gradient_norm(optimizer))
        return _status("VmHWM") - before

    def _build(self, layers: int, sizes: dict[str, int], recompute: str) -> list:
        from nemo_align.model.build import build_model

        parallel = ParallelConfig(data=1, recompute=recompute)
        chunks = build_model(model(layers, sizes), parallel, PrecisionConfig(dtype="fp32"), self.topology)
        for chunk in chunks:
            chunk.train()
        return chunks


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def kept_by_a_layer() -> dict[str, int]:
    real = RealModel()
    # The difference of three layers and two is a layer, without embedding and output.
    return {name: real.kept(3, name) - real.kept(2, name) for name in ("none", "selective", "full")}


@pytest.fixture(scope="module")
def kept() -> dict[str, int]:
    return answer("kept_by_a_layer()", f"from {__name__} import kept_by_a_layer")


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_layer_keeps_what_the_plan_says(kept, recompute):
    job = planned(1, SMALL, TOKENS, recompute)
    head_dim, groups = 16, 2
    only_here = {
        # Values are a view of the QKV product here, which stays whole with them.
        "the rest of the QKV product": 4 * (128 + groups * head_dim),
        # The rotation is not fused: sines and cosines of queries and keys.
        "rotary tables": 4 * 4 * head_dim * job.model.rotary_percent,
        "mean and deviation of two norms": 4 * 4,
    }
    rest = kept[recompute] - chunk_bytes(job) - TOKENS * sum(only_here.values())
    assert 0 <= rest <= 8 * 128 + 8  # 1 + the weight of each norm; a number of the generator when recomputing
    assert chunk_bytes(job) > 0.85 * kept[recompute]


def test_full_recomputation_keeps_a_layers_input_and_no_more(kept):
    assert kept["full"] == chunk_bytes(planned(1, SMALL, TOKENS, "full")) == TOKENS * 4 * 128


def test_selective_recomputation_saves_the_log_sum_exp(kept):
    saved = kept["none"] - kept["selective"]
    job = planned(1, SMALL, TOKENS, "none")
    assert saved == pytest.approx(layer_bytes(job) - chunk_bytes(planned(1, SMALL, TOKENS, "selective")), rel=0.01)


@pytest.mark.parametrize("case", PEAKS)
def test_the_peak_of_a_process_is_near_the_plan(case):
    """Resident memory, within a quarter: the C library keeps pages that a plan knows nothing of."""
    recompute, layers, tokens = PEAKS[case]
    # Each in a process of its own: what a case before has freed may be there still, or not.
    measured = answer(f"RealModel().peak{PEAKS[case]}", f"from {__name__} import RealModel")
    stage = memory_plan(planned(layers, WIDE, tokens, recompute)).stages[0]
    predicted = stage.total - stage.context - stage.nccl
    assert measured == pytest.approx(predicted, rel=0.25)
