"""What a stage of ours left in its final checkpoint, under transformers' names, and how far it is from theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

WEIGHTS, FIRST_MOMENT, SECOND_MOMENT = "", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq."
# Their places in the reward model of transformers.
_HEAD = {"reward_head.weight": "score.weight", "reward_head.bias": "score.bias"}


def tensors_of(run_dir: Path, prefix: str = WEIGHTS) -> dict[str, Tensor]:
    """The weights, or one of Adam's moments, of the newest checkpoint of a run, query, key and value apart.

    The moments come from the same keys as the weights, so they are cut and named by the same map. Vocabulary padding is
    left out, after a look at it: the loss must not reach those rows.
    """
    from nemo_align.checkpoint.conversion.to_huggingface import to_hf
    from nemo_align.checkpoint.huggingface.weight_map import weight_map
    from nemo_align.checkpoint.store import resolve
    from nemo_align.checkpoint.streaming.tensors import HeldTensor, read
    from nemo_align.checkpoint.streaming.torch_dist import TensorReader
    from nemo_align.config.model import ModelConfig

    reference = resolve(run_dir)
    assert reference.manifest is not None
    model = ModelConfig(**reference.manifest["model"])
    reader = TensorReader(reference.path)
    found: dict[str, Tensor] = {}
    for weight in weight_map(model, has_output_layer=reference.manifest["reward"] is None):
        tensor = reader.read(prefix + weight.megatron)
        if prefix and weight.has_vocabulary_rows:
            assert not tensor[model.vocab_size :].any(), f"{prefix}{weight.megatron}: padding rows have a gradient"
        parts = to_hf(weight, HeldTensor(tensor[: weight.megatron_shape[0]]), model)
        found |= zip(weight.hf, map(read, parts), strict=True)
    for ours, theirs in _HEAD.items():
        if prefix + ours in reader:
            found[theirs] = reader.read(prefix + ours)
    return found


def gradients_of(run_dir: Path, beta1: float) -> dict[str, Tensor]:
    """The gradient of the last step of a run without clipping: all of the first moment where beta1 is 0, and
    (1 - beta1) of it after the first step of a run."""
    return {name: tensor / (1 - beta1) for name, tensor in tensors_of(run_dir, FIRST_MOMENT).items()}


def worst_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """Largest |ours - theirs| as a part of the largest element of its tensor, over all elements of all tensors; and
    the tensor's name. A sum that nearly cancels keeps the rounding of its terms, so the measure is the tensor."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    worst = (-1.0, "")
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        largest = float(expected.abs().max())
        assert largest > 0, f"{name} is zero: nothing is compared"
        difference = float((ours[name].double() - expected.double()).abs().max()) / largest
        assert difference == difference, f"{name} is not a number"
        worst = max(worst, (difference, name))
    return worst


def assert_close(what: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], bound: float) -> None:
    """Every element within `bound` x the largest of its tensor; the worst is printed (pytest -rP shows it)."""
    difference, name = worst_difference(ours, theirs)
    print(f"parity: {what}: {len(theirs)} tensors, worst {difference:.1e} of the largest element ({name})")
    assert difference <= bound, f"{what}: {name} differs by {difference:.3e} of its largest element (bound {bound})"


def assert_numbers_close(
    what: str, ours: list[float], theirs: list[float], bound: float, *, scale: float | None = None
) -> None:
    """Differences of logged numbers within `bound` x `scale`, or x each of their numbers; the worst is printed."""
    assert len(ours) == len(theirs) and ours
    parts = [abs(a - b) / (scale or max(abs(b), 1e-12)) for a, b in zip(ours, theirs, strict=True)]
    print(f"parity: {what}: {len(theirs)} numbers, worst difference {max(parts):.1e} of {scale or 'the number'}")
    assert all(part <= bound for part in parts), f"{what}: {ours} against {theirs}"  # not so for nan
