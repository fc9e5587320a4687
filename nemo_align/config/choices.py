"""Values that a key with few choices may take: read by the checks and by --help."""

from __future__ import annotations

# Preference losses that fit the size of a reward gap, so every pair needs rewards.
NEEDS_REWARDS = ("rpo_bwd_kl", "rpo_fwd_kl", "rpo_sq")

CHOICES: dict[str, tuple[str, ...]] = {
    "precision.dtype": ("bf16", "fp32"),
    "precision.fp8": ("none", "delayed", "tensorwise", "blockwise"),
    "precision.attention": ("auto", "flash", "fused", "unfused"),
    "parallel.recompute": ("none", "selective", "full", "block"),
    "optimizer.schedule": ("constant", "cosine", "linear", "wsd"),
    "train.nonfinite": ("error", "skip"),
    "data.overlong": ("error", "drop", "truncate"),
    "data.bad_rows": ("error", "quarantine"),
    "data.select.inverted": ("error", "swap", "keep"),
    "data.select.ties": ("auto", "drop", "keep"),
    "preference.preference_loss": ("dpo", "ipo", *NEEDS_REWARDS),
    "verb": ("pretrain", "sft", "reward", "preference"),  # of the stage that `plan` looks at
    "cluster.kind": ("local", "slurm"),
    "source_format": ("hf", "megatron", "nemo"),
    "target_format": ("hf", "megatron", "nemo"),
    "dtype": ("fp32", "bf16"),
    "checksum": ("blake3", "sha256"),
    "verify": ("false", "true", "logits"),
    "unused_attributes": ("drop", "keep"),
    "method": ("linear", "slerp"),
}

# Names of the row formats that each verb reads, as nemo_align/data/row_formats has them (a test compares). `score`
# finds the format of its inputs itself.
_DIALOGUES = (
    "messages",
    "conversations",
    "helpsteer2",
    "prompt_completion",
    "prompt_response",
    "alpaca",
    "input_output",
)
ROW_FORMATS: dict[str, tuple[str, ...]] = {
    "sft": ("auto", *_DIALOGUES),
    "reward": ("auto", "nemo_aligner_label", "conversations_label", *_DIALOGUES),
    "preference": (
        "auto",
        "nemo_aligner",
        "nemo_rl",
        "helpsteer2_preference",
        "helpsteer3",
        "sharegpt_pair",
        "alpaca_pair",
        "prompt_chosen_rejected",
        "chosen_rejected",
    ),
}

# HelpSteer2's attributes and the weights that the published reward model's card gives for the scalar reward.
HELPSTEER2_WEIGHTS = {
    "helpfulness": 0.3,
    "correctness": 0.74,
    "coherence": 0.46,
    "complexity": 0.47,
    "verbosity": -0.33,
}
