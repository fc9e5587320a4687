"""The bias of a reward head in a format that has none.

Our head computes W y + c from y, the output of the final LayerNorm. transformers' sequence classification has W alone
(`score.weight`). Nothing else reads y, so the bias moves into the LayerNorm's: W (y + d) = W y + c for any d with
W d = c. We take the shortest such d, in float64. The unfolded head is kept beside the model, so a re-import is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_FILE = "reward_head.safetensors"
WEIGHT, BIAS, NORM_BIAS = "weight", "bias", "final_norm_bias"
# Rounding the folded bias to fp32 moves the scores by up to 6e-8 x condition number x |bias|: 6e-5 of the bias at most.
MAX_CONDITION = 1e3


def fold_bias(weight: Tensor, bias: Tensor, norm_bias: Tensor) -> Tensor:
    """The final LayerNorm's bias [H] in fp32 that makes the head's `bias` [A] unnecessary.

    Raises:
        ValueError: no such bias exists or rounding would show in the scores: attributes whose weights are (almost)
            linear combinations of others'.
    """
    if not bias.any():
        return norm_bias.float()
    weight64, bias64 = weight.double(), bias.double()
    singular = torch.linalg.svdvals(weight64)
    if weight.shape[0] > weight.shape[1] or singular[-1] * MAX_CONDITION <= singular[0]:  # 0 <= 0 too
        condition = float(singular[0] / singular[-1]) if singular[-1] > 0 else float("inf")
        raise ValueError(
            f"the reward head's bias cannot be exported: the weights of its {weight.shape[0]} attributes are not "
            f"independent enough (condition number {condition:.3g}, at most {MAX_CONDITION:.0f} allowed). Hugging "
            "Face's head has no bias, and folding it into the final norm needs independent weights. Train with "
            "reward.head_bias=false, or leave out attributes that repeat each other"
        )
    shift = weight64.T @ torch.linalg.solve(weight64 @ weight64.T, bias64)
    return (norm_bias.double() + shift).float()
