"""The first preference losses are their closed forms: policy and reference are the same weights, so u = 0.

Held-out pairs before the first step, through the stage's entry point; docs/metrics.md lists the forms.
"""

import json
import math

import numpy as np
import pytest

from tests.distributed.stage_runs import numbers, run_stage
from tests.stage_inputs import stage_overrides

BETA = 0.1


def rewards_gaps(stage_inputs) -> np.ndarray:
    rows = [json.loads(line) for line in stage_inputs.rows("pairs_held_out").read_text().splitlines()]
    return np.array([row["chosen_reward"] - row["rejected_reward"] for row in rows])


# Of the reward gaps g, with q = sigmoid(g).
FORMS = {
    "dpo": lambda g, q: np.full_like(g, math.log(2)),
    "ipo": lambda g, q: np.full_like(g, 1 / (4 * BETA**2)),
    "rpo_sq": lambda g, q: g**2,
    "rpo_bwd_kl": lambda g, q: math.log(2) + q * np.log(q) + (1 - q) * np.log1p(-q),
    "rpo_fwd_kl": lambda g, q: -math.log(2) - (np.log(q) + np.log1p(-q)) / 2,
}


@pytest.mark.parametrize("loss", FORMS)
def test_the_first_preference_loss_is_its_closed_form(loss, pool1, stage_inputs, policy, tmp_path):
    overrides = [
        *stage_overrides(stage_inputs, "preference"),
        f"checkpoint.init_from={policy}",
        f"preference.preference_loss={loss}",
        "train.max_steps=1",
    ]
    records = run_stage(pool1, "preference", tmp_path, overrides)
    gaps = rewards_gaps(stage_inputs)
    expected = float(np.mean(FORMS[loss](gaps, 1 / (1 + np.exp(-gaps)))))
    before, _ = numbers(records, "validation")
    assert before["validation/rows/preference_loss"] == pytest.approx(expected, abs=1e-5)
    if loss in ("dpo", "ipo"):  # of any pairs, so of the batch too
        (first,) = numbers(records, "train")
        assert first["preference_loss"] == pytest.approx(expected, abs=1e-5)
