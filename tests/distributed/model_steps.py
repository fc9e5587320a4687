"""What the tests of the model room run on the workers: one step of Megatron's schedule with gradients, on any layout.

Results are put together to whole tensors, so that layouts can be compared name by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_align.config.model import ModelConfig
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig

MICRO_BATCHES, LENGTH = 2, 24
SEGMENTS = ([0, 5, 12, 24], [0, 8, 16, 24])  # of each micro-batch


def tokens_of(micro_batch: int, vocab_size: int) -> Tensor:
    generator = torch.Generator().manual_seed(50 + micro_batch)
    return torch.randint(0, vocab_size, (1, LENGTH), generator=generator)


def full_step(
    topology,
    model: ModelConfig,
    parallel: dict[str, Any],
    *,
    reward: RewardConfig | None = None,
    weights: dict[str, Tensor] | None = None,
    packed: bool = True,
    dtype: str = "fp32",
) -> dict[str, Any]:
    """Forward, backward and Megatron's reduction of gradients over two micro-batches.

    Returns this rank's part: "outputs" (last stage; per micro-batch), "weights" and "gradients" as
    {name in the whole model: (tensor, axis that is split over the tensor group or None)}.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from nemo_align.model.build import build_model
    from nemo_align.model.packed import packed_seq_params

    chunks = build_model(model, ParallelConfig(**parallel), PrecisionConfig(dtype=dtype), topology, reward_head=reward)
    if weights is not None:
        load_whole_weights(chunks, weights, topology)
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]

    def forward_step(batches, chunk):
        number = next(batches)
        boundaries = torch.tensor(SEGMENTS[number], dtype=torch.int32)
        longest = int((boundaries[1:] - boundaries[:-1]).max())
        output = chunk(
            tokens_of(number, model.vocab_size),
            None,
            None,
            packed_seq_params=packed_seq_params(boundaries, longest) if packed else None,
        )

        def loss(output: Tensor):
            # Quadratic with fixed random coefficients: every position and column matters, padding columns do not.
            value = (
                coefficients(output, number, model, topology, reward) * (output.float() + output.float() ** 2)
            ).sum()
            return value, torch.tensor(LENGTH, dtype=torch.int), {"output": output.detach().clone()}

        return output, loss

    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(range(MICRO_BATCHES)) for _ in wrapped] if len(wrapped) > 1 else iter(range(MICRO_BATCHES)),
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=MICRO_BATCHES,
        seq_length=LENGTH,
        micro_batch_size=1,
        forward_only=False,
    )
    parameters = {name: parameter for chunk in chunks for name, parameter in named_in_whole_model(chunk)}
    return {
        "outputs": [entry["output"] for entry in losses],
        "weights": {name: _part(parameter, parameter.detach()) for name, parameter in parameters.items()},
        "gradients": {name: _part(parameter, parameter.main_grad) for name, parameter in parameters.items()},
        "place": (topology.pipeline_rank, topology.tensor_rank),
    }


def coefficients(output: Tensor, number: int, model: ModelConfig, topology, reward: RewardConfig | None) -> Tensor:
    """Of this rank's columns [1, S, columns]; zero for padding rows of the vocabulary."""
    generator = torch.Generator().manual_seed(90 + number)
    if reward is not None:
        return torch.randn(output.shape, generator=generator)
    whole = torch.zeros(1, LENGTH, output.size(-1) * topology.tensor)
    whole[..., : model.vocab_size] = torch.randn(1, LENGTH, model.vocab_size, generator=generator)
    return whole.chunk(topology.tensor, dim=-1)[topology.tensor_rank]


def named_in_whole_model(chunk):
    for name, parameter in chunk.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
        yield ".".join(parts), parameter


@torch.no_grad()
def load_whole_weights(chunks, weights: dict[str, Tensor], topology) -> None:
    """Fills the chunks with this rank's part of whole tensors; vocabulary rows that are missing become 7 (padding:
    nothing may depend on them)."""
    for chunk in chunks:
        for name, parameter in named_in_whole_model(chunk):
            whole, axis = weights[name], parameter.partition_dim if is_split(parameter) else None
            if axis is not None:
                missing = parameter.size(axis) * topology.tensor - whole.size(axis)
                if missing:
                    whole = torch.cat([whole, torch.full((missing, whole.size(1)), 7.0)])
                whole = whole.chunk(topology.tensor, dim=axis)[topology.tensor_rank]
            parameter.copy_(whole)


def is_split(parameter: Tensor) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def _part(parameter: Tensor, values: Tensor) -> tuple[Tensor, int | None]:
    return values.clone(), parameter.partition_dim if is_split(parameter) else None


def whole(answers: list[dict[str, Any]], what: str, vocab_size: int) -> dict[str, Tensor]:
    """The ranks' parts of "weights" or "gradients" as whole tensors without vocabulary padding.

    Asserts that what is not split is equal on all tensor ranks.
    """
    parts: dict[str, list[tuple[Tensor, int | None]]] = {}
    for answer in sorted(answers, key=lambda answer: answer["place"]):
        for name, part in answer[what].items():
            parts.setdefault(name, []).append(part)
    joined = {}
    for name, pieces in parts.items():
        axis = pieces[0][1]
        if axis is None:
            for piece, _ in pieces[1:]:
                torch.testing.assert_close(piece, pieces[0][0], msg=f"{name} differs between tensor ranks")
            joined[name] = pieces[0][0]
        else:
            joined[name] = torch.cat([piece for piece, _ in pieces], dim=axis)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            joined[name] = joined[name][:vocab_size]
    return joined


def outputs(answers: list[dict[str, Any]], vocab_size: int | None) -> Tensor:
    """[micro-batch, S, V] logits without padding, or (vocab_size None) [micro-batch, S, A] scores, equal on all."""
    last = [answer for answer in sorted(answers, key=lambda answer: answer["place"]) if answer["outputs"]]
    per_rank = [torch.cat(answer["outputs"]) for answer in last]
    if vocab_size is None:
        for other in per_rank[1:]:
            assert torch.equal(other, per_rank[0]), "scores differ between tensor ranks"
        return per_rank[0]
    return torch.cat(per_rank, dim=-1)[..., :vocab_size]


def world_size(parallel: dict[str, Any]) -> int:
    return parallel.get("tensor", 1) * parallel.get("pipeline", 1)
