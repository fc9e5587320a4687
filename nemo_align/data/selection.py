"""Which pairs are trained on. By reward, the report filters hard for DPO and less for RPO (arXiv 2406.11704)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from nemo_align.config.choices import CHOICES, NEEDS_REWARDS
from nemo_align.config.data import SelectConfig
from nemo_align.data.chat import Pair, RowError


class Selection:
    """Applies `data.select` for one preference loss."""

    def __init__(self, config: SelectConfig, preference_loss: str) -> None:
        for key, value in (("data.select.inverted", config.inverted), ("data.select.ties", config.ties)):
            if value not in CHOICES[key]:
                raise ValueError(f"{key}: unknown value {value!r}; known: {', '.join(CHOICES[key])}")
        self._config = config
        self.needs_rewards = None
        if preference_loss in NEEDS_REWARDS:
            self.needs_rewards = f"preference_loss={preference_loss}"
        elif config.min_chosen_reward is not None:
            self.needs_rewards = "data.select.min_chosen_reward"
        elif config.min_reward_gap is not None:
            self.needs_rewards = "data.select.min_reward_gap"
        # An equal pair teaches dpo and ipo a preference that is not there; for rpo it says "keep the margin at zero".
        self.drops_ties = config.ties == "drop" or (config.ties == "auto" and preference_loss not in NEEDS_REWARDS)

    def apply(self, pair: Pair, counts: Counter[str]) -> Pair | None:
        """The pair (swapped if so configured), or None if it is left out; either way it is counted.

        RowError: both responses are the same, a reward that is needed is missing, or chosen is worse than rejected and
        that is an error.
        """
        if pair.chosen == pair.rejected:  # both log-ratios are equal whatever the model: nothing to prefer
            chosen, rejected = pair.columns
            raise RowError(
                rejected,
                f"the same text as {chosen}",
                "correct one of the two or remove the row, or set data.bad_rows=quarantine",
                reason="identical responses",
            )
        if pair.chosen_reward is None or pair.rejected_reward is None:
            if self.needs_rewards:
                raise RowError(
                    "chosen_reward, rejected_reward",
                    f"missing, and {self.needs_rewards} needs them",
                    "add them with nemo-align score, or use preference_loss=dpo without reward limits",
                )
            return self._unless_tie(pair, pair.is_tie, counts)
        if pair.chosen_reward < pair.rejected_reward:
            if self._config.inverted == "error":
                raise RowError(
                    "chosen_reward",
                    f"{pair.chosen_reward} is below rejected_reward {pair.rejected_reward}",
                    "set data.select.inverted=swap (trust the rewards) or keep (trust the order), or correct the row",
                    reason="chosen_reward below rejected_reward",
                )
            counts["swapped" if self._config.inverted == "swap" else "inverted_kept"] += 1
            if self._config.inverted == "swap":
                pair = replace(
                    pair,
                    chosen=pair.rejected,
                    rejected=pair.chosen,
                    chosen_reward=pair.rejected_reward,
                    rejected_reward=pair.chosen_reward,
                )
        assert pair.chosen_reward is not None and pair.rejected_reward is not None
        minimum, gap = self._config.min_chosen_reward, self._config.min_reward_gap
        if minimum is not None and pair.chosen_reward < minimum:
            counts["dropped_low_reward"] += 1
            return None
        if gap is not None and pair.chosen_reward - pair.rejected_reward < gap:
            counts["dropped_small_gap"] += 1
            return None
        return self._unless_tie(pair, pair.is_tie or pair.chosen_reward == pair.rejected_reward, counts)

    def _unless_tie(self, pair: Pair, is_tie: bool, counts: Counter[str]) -> Pair | None:
        if is_tie:
            counts["dropped_ties" if self.drops_ties else "ties_kept"] += 1
            return None if self.drops_ties else pair
        return pair
