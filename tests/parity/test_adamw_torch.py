"""Our optimizer (Megatron-core's, as build_optimizer sets it up) against torch.optim.AdamW on made-up gradients.

Equal gradients on both sides, so eps can be the real 1e-8: nothing that Adam divides by is noise. Of the gradients some
are far larger than the clipping norm, some far smaller, some zero, as for tokens that a batch does not have.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.pool import with_topology

STEPS = 30
LR, MIN_LR, BETA1, BETA2, EPS, WEIGHT_DECAY, CLIP = 3e-3, 1e-4, 0.9, 0.98, 1e-8, 0.1, 1.0


def steps_of_both(topology: Any, data: int, distributed_optimizer: bool, dtype: str) -> dict[str, Any]:
    """In a worker: the same gradients through our optimizer and torch's; the largest differences."""
    import torch

    from nemo_align.config.model import ModelConfig
    from nemo_align.config.objectives import RewardConfig
    from nemo_align.config.runtime import ParallelConfig, PrecisionConfig
    from nemo_align.config.training import OptimizerConfig
    from nemo_align.model.build import build_model
    from nemo_align.training.optimizer import ScheduleLength, build_optimizer, learning_rate, wrap_data_parallel

    parallel = ParallelConfig(data=data, distributed_optimizer=distributed_optimizer)
    precision = PrecisionConfig(dtype=dtype)
    model = ModelConfig(
        name="t",
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=100,
        max_sequence_length=32,
    )
    # With the reward head: fp32 parameters beside bf16 ones, and a bias.
    chunks = build_model(model, parallel, precision, topology, reward_head=RewardConfig())
    chunks = wrap_data_parallel(chunks, parallel, precision)
    settings = OptimizerConfig(
        lr=LR,
        min_lr=MIN_LR,
        schedule="cosine",
        warmup_steps=5,
        weight_decay=WEIGHT_DECAY,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        clip_grad=CLIP,
    )
    ours, scheduler = build_optimizer(chunks, settings, parallel, precision, ScheduleLength(warmup=5, decay=STEPS))

    named = dict(chunks[0].module.named_parameters())
    copies = {name: torch.nn.Parameter(p.detach().float().clone()) for name, p in named.items()}
    matrices = [p for p in copies.values() if p.dim() > 1]
    vectors = [p for p in copies.values() if p.dim() == 1]
    assert matrices and vectors
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(BETA1, BETA2),
        eps=EPS,
    )
    generator = torch.Generator().manual_seed(11)
    norms, rates, clipped = [], [], 0
    for step in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        ours.zero_grad()
        size = 10.0 ** (step % 4 - 4)
        for name, parameter in named.items():
            gradient = size * torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                gradient[step % 3 :: 3] = 0
            parameter.main_grad.copy_(gradient)
            copies[name].grad = parameter.main_grad.float().clone()  # in the number format of the gradient buffer
        scheduler.step(1)
        applied, norm, _ = ours.step()
        assert applied
        their_norm = float(torch.nn.utils.clip_grad_norm_(copies.values(), CLIP))
        for group in theirs.param_groups:
            group["lr"] = learning_rate(ours)
        theirs.step()
        norms.append((float(norm), their_norm))
        rates.append(learning_rate(ours))
        clipped += their_norm > CLIP
    assert 0 < clipped < STEPS and len(set(rates)) > STEPS // 2
    worst, rounded_otherwise, elements = {}, 0, 0
    for name, parameter in named.items():
        expected = copies[name].detach()
        assert (expected - expected.to(torch.bfloat16).float()).any(), f"{name} did not move off its first values"
        rounded = expected.to(parameter.dtype)  # bf16: the master weights are fp32
        worst[name] = float((parameter.detach().float() - rounded.float()).abs().max() / expected.abs().max())
        if parameter.dtype is torch.bfloat16:
            rounded_otherwise += int((parameter.detach() != rounded).sum())
            elements += expected.numel()
    formats = {str(p.dtype).removeprefix("torch.") for p in named.values()}
    return {
        "worst": max((value, name) for name, value in worst.items()),
        "unequal": rounded_otherwise / max(elements, 1),  # of the bf16 parameters
        "norms": norms,
        "formats": formats,
    }


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize(("data", "dtype"), [(1, "fp32"), (2, "fp32"), (1, "bf16")])
def test_steps_equal_torch(data, dtype, distributed_optimizer, request):
    pool = request.getfixturevalue(f"pool{data}")
    answers = pool.run(with_topology, steps_of_both, {"data": data}, data, distributed_optimizer, dtype)
    for answer in answers:
        difference, name = answer["worst"]
        print(
            f"parity: adamw {data} x {dtype}: worst {difference:.1e} of the largest element ({name}), "
            f"{answer['unequal']:.1e} of the bf16 elements unequal"
        )
        if dtype == "fp32":
            assert difference <= 2e-6
        else:  # rounded from fp32 weights that differ by as much: seldom to the neighbour, 2^-7 away
            assert difference <= 2**-7 and answer["unequal"] <= 1e-3
        for ours, theirs in answer["norms"]:
            assert ours == pytest.approx(theirs, rel=1e-6)
    assert ("bfloat16" in answers[0]["formats"]) is (dtype == "bf16")
