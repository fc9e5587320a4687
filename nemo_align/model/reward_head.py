"""The reward model: a Nemotron decoder whose output layer is a small regression head.

The head gives one number per attribute and position; the objective reads the positions it wants.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional

from nemo_align.config.objectives import RewardConfig
from nemo_align.model.megatron import GPTModel


class RewardHead(nn.Module):
    """scores = hidden_states @ weight^T + bias in fp32, for each of A attributes.

    Weight [A, H] and bias [A] are whole on every tensor rank. Each rank computes all scores of all tokens, so its
    gradient is already the full one: the parameters must NOT carry the `sequence_parallel` mark, or
    finalize_model_grads would add it up once per rank.
    """

    def __init__(self, hidden_size: int, num_attributes: int, *, bias: bool, sequence_parallel: bool) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.weight = nn.Parameter(torch.zeros(num_attributes, hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_attributes, dtype=torch.float32)) if bias else None

    @torch.no_grad()
    def start_at(self, scores: Tensor) -> None:
        """Set the bias to these scores [A], so that training begins at a constant answer instead of at zero."""
        assert self.bias is not None, "a head without bias starts at zero"
        self.bias.copy_(scores)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[S, B, H], or this rank's [S / tensor, B, H] under sequence parallel -> fp32 [B, S, A], equal on all tensor
        ranks."""
        if self.sequence_parallel:
            # What follows is the same on every rank, so the gradient of the gathered tensor is complete on each:
            # the backward takes this rank's part of it instead of a sum over ranks.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        scores = functional.linear(hidden_states.float(), self.weight, self.bias)  # [S, B, A]
        return scores.transpose(0, 1).contiguous()


class RewardModel(GPTModel):
    """GPTModel with `reward_head` where the last stage of a policy has `output_layer`; other stages are the same."""

    def __init__(self, *args, reward: RewardConfig, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            del self.output_layer  # frees the V x H matrix that GPTModel has just allocated
            self.reward_head = RewardHead(
                self.config.hidden_size,
                len(reward.attributes),
                bias=reward.head_bias,
                sequence_parallel=self.config.sequence_parallel,
            )

    def _postprocess(self, hidden_states: Tensor, **_) -> Tensor:
        # GPTModel.forward hands the decoder's output and all of its own arguments, by name, to this method.
        return self.reward_head(hidden_states) if self.post_process else hidden_states

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Tensors for a distributed checkpoint: those of a policy without output_layer, and `reward_head.*`."""
        # GPTModel's and LanguageModel's own versions only adjust entries of output_layer, which is not there.
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
