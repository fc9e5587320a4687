"""Our ModelConfig -> config.json of a Hugging Face `nemotron` model. The way back: config/hf_model.py."""

from __future__ import annotations

from nemo_align.config.hf_model import HF_DTYPES, HF_FIXED, HF_SIZES, POLICY_CLASS, REWARD_CLASS
from nemo_align.config.model import ModelConfig
from nemo_align.model.counts import head_dim


def hf_config(
    model: ModelConfig,
    *,
    dtype: str,
    bos_id: int | None,
    eos_id: int | None,
    pad_id: int | None,
    reward: dict | None,
) -> dict:
    """config.json for transformers 5 and for readers of the older names.

    Args:
        dtype: fp32 | bf16.
        reward: the manifest's `reward` entry for a reward model, None for a policy.
    """
    values = {
        "architectures": [POLICY_CLASS if reward is None else REWARD_CLASS],
        "model_type": "nemotron",
        **{theirs: getattr(model, ours) for ours, theirs in HF_SIZES.items()},
        "head_dim": head_dim(model),
        "num_key_value_heads": model.num_query_groups,
        **HF_FIXED,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(model.rotary_base),
            "partial_rotary_factor": model.rotary_percent,
        },
        # The same twice more: transformers 4 reads these, and the first exports of Nemotron-4 had only rope_percent.
        "rope_theta": float(model.rotary_base),
        "partial_rotary_factor": model.rotary_percent,
        "rope_percent": model.rotary_percent,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "use_cache": True,
        "dtype": {ours: theirs for theirs, ours in HF_DTYPES.items()}[dtype],
        "torch_dtype": {ours: theirs for theirs, ours in HF_DTYPES.items()}[dtype],
    }
    if reward is not None:
        attributes = reward["attributes"]
        values |= {
            "num_labels": len(attributes),
            "id2label": {str(index): name for index, name in enumerate(attributes)},
            "label2id": {name: index for index, name in enumerate(attributes)},
            "problem_type": "regression",
            "attribute_weights": reward["weights"],
            "reward_head_bias": reward["head_bias"],
            "use_cache": False,
        }
    return values
