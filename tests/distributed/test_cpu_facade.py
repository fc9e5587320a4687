"""The CPU facade under Megatron-core's own model, schedules, gradient buffers and optimizer.

The model is Megatron's smallest GPT with its local layers, so that a failure here is the facade's or Megatron's and not
our model's. Weights come from a formula of their global position, so every layout starts from the same ones.
"""

from __future__ import annotations

import math

import pytest

from tests.distributed.pool import with_topology

LAYERS, HIDDEN, HEADS, VOCABULARY, LENGTH = 4, 32, 4, 64, 16
MICRO_BATCHES, BATCH = 4, 2
STEPS = 3


def train(topology, dtype_name: str, distributed_optimizer: bool = True, overlap: bool = False) -> list:
    """[(loss, gradient norm)] of each step, on the last stage; [] elsewhere."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    dtype = getattr(torch, dtype_name)
    low = dtype is torch.bfloat16
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        tensor_model_parallel_size=topology.tensor,
        pipeline_model_parallel_size=topology.pipeline,
        virtual_pipeline_model_parallel_size=topology.virtual_pipeline if topology.virtual_pipeline > 1 else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bf16=low,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        calculate_per_token_loss=True,
        batch_p2p_comm=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    chunks = []
    for chunk in range(topology.virtual_pipeline):
        stage = {"vp_stage": chunk} if topology.virtual_pipeline > 1 else {}
        model = GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(normalization="LayerNorm"),
            vocab_size=VOCABULARY,
            max_sequence_length=LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            **stage,
        )
        _set_weights(model, topology)
        chunks.append(model.to(dtype))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and distributed_optimizer,
    )
    chunks = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        bf16=low,
        params_dtype=dtype,
        clip_grad=0.5,
        use_distributed_optimizer=distributed_optimizer,
        overlap_param_gather=overlap and distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(optimizer_config, chunks)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if overlap:
        config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync

    def forward(iterator, model):
        tokens, labels = next(iterator)
        positions = torch.arange(LENGTH).expand_as(tokens)
        mask = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), diagonal=1)
        losses = model(tokens, positions, mask, labels=labels)
        return losses, summed

    def summed(losses):
        loss = losses.float().sum()
        return loss, torch.tensor(losses.numel()), {"sum": loss.detach()}

    def batches(step: int):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(VOCABULARY, (MICRO_BATCHES * BATCH, LENGTH + 1), generator=generator)
        for i, micro_batch in enumerate(rows.view(MICRO_BATCHES, BATCH, -1)):
            if i % topology.data == topology.data_rank:
                yield micro_batch[:, :-1], micro_batch[:, 1:]

    result = []
    for step in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[batches(step) for _ in chunks] if len(chunks) > 1 else batches(step),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=MICRO_BATCHES // topology.data,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
        )
        succeeded, norm, _ = optimizer.step()
        assert succeeded
        if topology.is_last_stage:
            total = torch.stack([loss["sum"] for loss in losses]).sum()
            dist.all_reduce(total, group=topology.data_group)
            result.append((total.item() / (MICRO_BATCHES * BATCH * LENGTH), float(norm)))
    assert not any(isinstance(value, torch.Tensor) and value.is_cuda for value in chunks[0].state_dict().values())
    return result


def _set_weights(model, topology) -> None:
    """Fill every parameter by the name that it has in the whole model, then keep this rank's slice."""
    import torch

    first_layer = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    for name, parameter in model.named_parameters():
        if "layers." in name:
            head, _, tail = name.partition("layers.")
            number, _, rest = tail.partition(".")
            name = f"{head}layers.{first_layer + int(number)}.{rest}"
        shape = list(parameter.shape)
        split = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
        if split is not None:
            shape[split] *= topology.tensor
        count = math.prod(shape)
        seed = sum(ord(letter) * (i + 1) for i, letter in enumerate(name)) % 1000
        whole = 0.1 * torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + seed).reshape(shape)
        if "layernorm.weight" in name or "layer_norm_weight" in name:
            whole += 1.0
        if split is not None:
            whole = whole.chunk(topology.tensor, dim=split)[topology.tensor_rank]
        parameter.data.copy_(whole)


@pytest.fixture(scope="module")
def single(pool1) -> list:
    return pool1.run(with_topology, train, {}, "float32")[0]


def test_one_process_learns(single):
    assert all(math.isfinite(number) for step in single for number in step)
    assert single[0][0] == pytest.approx(math.log(VOCABULARY), rel=0.1)
    assert single[0] != single[1]


@pytest.mark.parametrize(
    "parallel",
    [{"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"data": 2}],
    ids=["TP2", "PP2", "PP2xVP2", "DP2"],
)
def test_layouts_agree_in_fp32(pool2, single, parallel):
    results = pool2.run(with_topology, train, parallel, "float32")
    assert results[1] == [pytest.approx(step, rel=1e-4) for step in single]
    assert results[1][0] == pytest.approx(single[0], rel=1e-5)


@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {"data": 2}], ids=["TP2", "PP2", "DP2"])
def test_layouts_run_in_bf16(pool2, single, parallel):
    results = pool2.run(with_topology, train, parallel, "bfloat16")
    assert results[1][0][0] == pytest.approx(single[0][0], rel=1e-2)
    assert results[1][0][1] == pytest.approx(single[0][1], rel=5e-2)


def test_optimizer_without_sharding_and_with_overlap(pool2, single):
    plain = pool2.run(with_topology, train, {"data": 2}, "float32", distributed_optimizer=False)
    overlapped = pool2.run(with_topology, train, {"data": 2}, "float32", overlap=True)
    low = pool2.run(with_topology, train, {"data": 2}, "bfloat16", distributed_optimizer=False)
    assert plain[0] == [pytest.approx(step, rel=1e-4) for step in single]
    assert overlapped[0] == [pytest.approx(step, rel=1e-4) for step in single]
    assert low[0][0][0] == pytest.approx(single[0][0], rel=1e-2)
