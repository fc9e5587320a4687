"""The bias of a reward head in a format that has none.

Our head computes W y + c from y, the output of the final LayerNorm. transformers' sequence classification has W alone
(`score.weight`). Nothing else reads y, so the bias moves into the LayerNorm's: W (y + d) = W y + c for any d with
W d = c. We take the shortest such d, in float64. The unfolded head is kept beside the model, so a re-import is exact;
and it is compared with the model then, which may have been trained on and saved over the one it was kept of.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_FILE = "reward_head.safetensors"
WEIGHT, BIAS, NORM_BIAS = "weight", "bias", "final_norm_bias"
# Rounding the folded bias to fp32 moves the scores by up to 6e-8 x condition number x |bias|: 6e-5 of the bias at most.
MAX_CONDITION = 1e3
# Two machines solve for the folded bias to 1e-16 x condition number squared: it may round to neighbours in fp32.
_ROUNDING = 2.0**-23


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


def differences(kept: dict[str, Tensor], score: Tensor, norm_bias: Tensor) -> list[str]:
    """Names in a kept head (of the right shapes) that do not belong to a model with this `score.weight` and
    `model.norm.bias`; empty where the model is the one that the head was kept of."""
    weight, own = kept[WEIGHT], kept[NORM_BIAS]
    bias = kept.get(BIAS, torch.zeros(weight.shape[0]))
    found = []
    if not torch.equal(weight.float().view(torch.int32), score.float().view(torch.int32)):
        found.append(f"{WEIGHT} differs from score.weight")
    if not all(tensor.isfinite().all() for tensor in (weight, own, bias)):
        found.append("values that are not finite")
    if found:
        return found
    try:
        folded = fold_bias(weight, bias, own)
    except ValueError:
        return [f"{BIAS} cannot have been folded"]
    largest = torch.stack([folded.abs(), own.float().abs()]).amax(0)
    allowed = _ROUNDING * largest if bias.any() else torch.zeros(())
    if not bool(((norm_bias.float() - folded).abs() <= allowed).all()):
        found.append(f"{NORM_BIAS} with the bias folded in differs from model.norm.bias")
    return found
