"""Whether both sides of a conversion compute the same: a prompt through transformers' model and through Megatron-core.

The side that is a checkpoint of its kind is loaded as anybody would load it. The other side (a `.nemo`, which nothing
here runs) is filled tensor by tensor from the opened source. Both compute in fp32 on the CPU.
"""

from __future__ import annotations

import logging

import psutil
import torch

from nemo_align.checkpoint.conversion.model import Model
from nemo_align.checkpoint.conversion.to_huggingface import huggingface_tensors
from nemo_align.checkpoint.huggingface.model_config import hf_config
from nemo_align.checkpoint.keys import HEAD_PREFIX
from nemo_align.checkpoint.store import resolve
from nemo_align.checkpoint.streaming.tensors import converted, read
from nemo_align.config.objectives import RewardConfig
from nemo_align.config.runtime import ParallelConfig, PrecisionConfig, RuntimeConfig
from nemo_align.model.counts import count_parameters

BOUND = 1e-4  # of max(1, largest logit): fp32 sums in another order differ by some 1e-6
_TOKENS = 24
_COPIES = 3  # two models, and room for what loading them holds

logger = logging.getLogger("nemo_align")


def compare_logits(source: Model, made: Model) -> float:
    """Largest difference of the logits (or scores), relative to the largest one; logged.

    Raises:
        ValueError: too little memory for both models, or a difference above `BOUND`.
    """
    check_memory(source)
    # A side in another number format than the result is filled with the rounded values: rounding is no error.
    by_kind = {model.kind: model for model in (source, made) if model.dtype == made.dtype}
    ids = torch.arange(_TOKENS)[None] * 7919 % source.config.vocab_size
    theirs = _transformers(by_kind.get("hf"), source, made.dtype, ids)
    ours = _megatron(by_kind.get("megatron"), source, made.dtype, ids)
    if source.reward is not None:
        ours = ours[:, -1]  # transformers reads the scores at the last token alone
    what = "scores" if source.reward is not None else "logits"
    if not (theirs.isfinite().all() and ours.isfinite().all()):
        raise ValueError(f"the {what} of {source.path} are not finite: its weights hold NaN or Inf, or overflow")
    largest = float(theirs.abs().max())
    difference = float((ours - theirs).abs().max())
    relative = difference / max(1.0, largest)
    if relative > BOUND:
        raise ValueError(
            f"{what} of {made.path} differ from those of {source.path} by {difference:.2e}, where the largest is "
            f"{largest:.3g}: remove it and convert again"
        )
    logger.info(
        "%s agree: they differ by %.1e at most, the largest is %.3g, %d tokens", what, difference, largest, _TOKENS
    )
    return relative


def check_memory(model: Model) -> None:
    """Refuse a comparison that would not fit, before a conversion of hours.

    Raises:
        ValueError: with the figures.
    """
    needed = _COPIES * 4 * count_parameters(model.config).total
    available = psutil.virtual_memory().available
    if needed > available:
        raise ValueError(
            f"verify=logits holds both models in fp32: {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free. "
            "Use verify=true, which holds none"
        )


@torch.no_grad()
def _transformers(folder: Model | None, source: Model, body: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """Logits [1, S, V], or scores [1, A]."""
    from transformers import NemotronConfig, NemotronForCausalLM, NemotronForSequenceClassification

    model_class = NemotronForCausalLM if source.reward is None else NemotronForSequenceClassification
    if folder is not None:
        model = model_class.from_pretrained(folder.path, dtype=torch.float32, trust_remote_code=False)
    else:
        values = hf_config(source.config, dtype="fp32", bos_id=1, eos_id=2, pad_id=0, reward=source.reward)
        with torch.device("meta"):
            model = model_class(NemotronConfig(**values))
        state = {name: read(tensor).float() for name, tensor in huggingface_tensors(source, body).items()}
        model.load_state_dict(state, strict=True, assign=True)
        inner = model.model
        inner.rotary_emb = type(inner.rotary_emb)(config=model.config)  # its buffer is in no checkpoint
    return model.eval()(input_ids=ids).logits.float()


@torch.no_grad()
def _megatron(checkpoint: Model | None, source: Model, body: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """Logits [1, S, V], or scores [1, S, A]."""
    from nemo_align.runtime import device, launch_environment, topology

    device.install()  # before the first import of Megatron-core
    from nemo_align.checkpoint import megatron
    from nemo_align.checkpoint.sharded_state import model_state
    from nemo_align.model.build import build_model

    parallel, precision = ParallelConfig(), PrecisionConfig(dtype="fp32")
    head = None
    if source.reward is not None:
        head = RewardConfig(**source.reward)
    grid = topology.initialize(parallel, RuntimeConfig(), launch_environment.single_process())
    try:
        chunks = build_model(source.config, parallel, precision, grid, reward_head=head)
        if checkpoint is not None:
            megatron.load_weights(resolve(checkpoint.path), chunks, grid, load_head=head is not None, verify=False)
        else:
            for shard in model_state(chunks, None)["model0"].values():
                wanted = torch.float32 if shard.key.startswith(HEAD_PREFIX) else body
                tensor = read(converted(source.tensors[shard.key], wanted, shard.key)).float()
                shard.data.zero_()
                shard.data[: tensor.shape[0]].copy_(tensor)
        positions = torch.arange(ids.shape[1])[None]
        output = chunks[0].eval()(ids.to(grid.device), positions.to(grid.device), None).float().cpu()
    finally:
        topology.destroy()
    return output if source.reward is not None else output[..., : source.config.vocab_size]
