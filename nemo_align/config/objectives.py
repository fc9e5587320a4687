"""Schema of the `reward` and `preference` groups: what is learnt."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class RewardConfig:
    """Multi-attribute regression (HelpSteer2, arXiv 2406.08673)."""

    attributes: list[str] = field(
        default_factory=lambda: ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    )  # columns of scores, in the order of the head's outputs
    weights: dict[str, float] | None = None  # of the scalar reward; must be given unless attributes are HelpSteer2's
    head_bias: bool = True  # a bias per attribute
    head_bias_from_labels: bool = True  # a new bias starts at each attribute's mean label instead of at zero
    head_init_std: float | None = None  # null: model.init_std
    load_head: bool = False  # the head's weights from checkpoint.init_from too


@dataclass(kw_only=True)
class PreferenceConfig:
    """DPO, IPO and reward-aware preference optimization (arXiv 2406.11704, section 3.3.2)."""

    preference_loss: str = "dpo"  # dpo | ipo | rpo_bwd_kl (the report's) | rpo_fwd_kl | rpo_sq
    ref_policy_kl_penalty: float = 0.1  # beta
    gt_reward_scale: float = 1.0  # eta, times the reward gap
    preference_loss_weight: float = 1.0  # of the preference loss in the sum
    sft_loss_weight: float = 0.0  # of the chosen responses' negative log-likelihood
    preference_average_log_probs: bool = False  # token mean in place of the sum
    sft_average_log_probs: bool | None = None  # null: as preference_average_log_probs
