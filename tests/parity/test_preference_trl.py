"""Preference training against TRL's DPOTrainer: the same weights, pairs, order and AdamW, over several real steps.

The reference is a frozen copy of the first weights on both sides, so the loss of step 1 is what equal weights give and
every later one has a policy that has moved away. With optimizer.beta1=0 Adam's first moment is the last step's
gradient, which our final checkpoint holds: it is compared where policy and reference differ most.

Which loss of theirs is which of ours (TRL 1.x):

    TRL              ours                                       log-probabilities
    sigmoid          dpo                                        summed over the response
    sigmoid_norm     dpo, preference_average_log_probs=true     averaged over its tokens
    ipo              ipo, preference_average_log_probs=true     averaged over its tokens
    sigmoid + sft    dpo with sft_loss_weight                   summed; the sft term averaged over the tokens of the
                     and sft_average_log_probs=true             batch in TRL, of each pair in ours: one pair per batch

TRL's IPO has averaged over tokens since 0.7.11. Before, it summed, as ours does by default and as the paper writes it;
no version of TRL can be asked for that any more. Up to 0.28 the averages also went into its logged logps and rewards;
since the rewrite of the trainer (0.29 at the latest) these are sums whatever the loss, while ours are what the loss
uses. So metrics are compared for sums, and loss, gradients and weights for all. In `rewards/accuracies` a tie counts
half in ours and nothing in TRL: step 1, where every pair ties, is left out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL (extra `dev`) is the other side of this comparison")

from tests.distributed.stage_runs import numbers, run_stage
from tests.parity.trained import assert_close, assert_numbers_close, gradients_of, tensors_of
from tests.parity.trl_training import TrlRun, train_dpo
from tests.stage_inputs import StageInputs, stage_overrides

STEPS, BETA = 4, 0.3
BETA2, EPS, WEIGHT_DECAY, LR = 0.95, 1e-3, 0.1, 1e-3


@dataclass(frozen=True)
class Case:
    """A loss as TRL's settings and as ours."""

    theirs: dict[str, Any]
    ours: dict[str, Any]
    batch: int = 10
    metrics: tuple[str, ...] = ()  # that both sides define alike


SUMS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
AVERAGE = {"preference_average_log_probs": True}
CASES = {
    "sigmoid": Case({"loss_type": ["sigmoid"]}, {"preference_loss": "dpo"}, metrics=SUMS),
    "sigmoid_norm": Case({"loss_type": ["sigmoid_norm"]}, {"preference_loss": "dpo", **AVERAGE}),
    "ipo": Case({"loss_type": ["ipo"]}, {"preference_loss": "ipo", **AVERAGE}),
    "sigmoid_and_sft": Case(
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.2]},
        {
            "preference_loss": "dpo",
            "preference_loss_weight": 0.7,
            "sft_loss_weight": 0.2,
            "sft_average_log_probs": True,
        },
        batch=1,
        metrics=SUMS,
    ),
}


@dataclass
class Rows:
    """The pairs in the order of our sampler: as TRL's conversational rows, and as the tokens that we train on."""

    conversational: list[dict] = field(default_factory=list)
    tokens: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)


def rows_in_order(inputs: StageInputs, count: int) -> Rows:
    from nemo_align.data.chat import Message
    from nemo_align.data.chat_template import render_prompt_response
    from nemo_align.data.sampler import EpochSampler
    from nemo_align.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(inputs.tokenizer)
    pairs = [json.loads(line) for line in inputs.rows("pairs").read_text().splitlines()]
    rows = Rows()
    for index in EpochSampler(len(pairs), seed=1234).batch(0, count):
        pair, prompt, responses = pairs[index], [], []
        for key in ("chosen", "rejected"):
            tokens, mask = render_prompt_response([Message("user", pair["prompt"])], pair[key], tokenizer)
            prompt = tokens[: mask.index(True)]
            responses.append(tokens[len(prompt) :])
        rows.tokens.append((prompt, *responses))
        rows.conversational.append(
            {
                "prompt": [{"role": "user", "content": pair["prompt"]}],
                **{key: [{"role": "assistant", "content": pair[key]}] for key in ("chosen", "rejected")},
            }
        )
    return rows


def train_theirs(case: Case, rows: Rows, start, folder) -> TrlRun:
    return train_dpo(
        start,
        rows.conversational,
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=case.batch,
        learning_rate=LR,
        adam_beta1=0.0,
        adam_beta2=BETA2,
        adam_epsilon=EPS,
        weight_decay=WEIGHT_DECAY,
        beta=BETA,
        **case.theirs,
    )


def train_ours(case: Case, pool, inputs: StageInputs, start, run_dir) -> list[dict[str, float]]:
    overrides = [
        *stage_overrides(inputs, "preference"),
        f"checkpoint.init_from={start}",
        "data.sequence_length=192",
        f"train.global_batch_size={case.batch}",
        f"train.max_steps={STEPS}",
        "train.epochs=2",
        "train.validate_at_start=false",
        f"optimizer.lr={LR}",
        "optimizer.beta1=0",
        f"optimizer.beta2={BETA2}",
        f"optimizer.eps={EPS}",
        f"optimizer.weight_decay={WEIGHT_DECAY}",
        "optimizer.clip_grad=0",
        f"preference.ref_policy_kl_penalty={BETA}",
        *(f"preference.{key}={str(value).lower()}" for key, value in case.ours.items()),
    ]
    return numbers(run_stage(pool, "preference", run_dir, overrides), "train")


@pytest.mark.parametrize("name", CASES)
def test_steps_of_the_dpo_trainer(name, pool1, stage_inputs, start_policy, tmp_path):
    case = CASES[name]
    rows = rows_in_order(stage_inputs, case.batch * STEPS)
    theirs = train_theirs(case, rows, start_policy, tmp_path / "trl")
    assert theirs.tokens == rows.tokens, "TRL's tokens, through the exported chat template, are those we train on"
    ours = train_ours(case, pool1, stage_inputs, start_policy, tmp_path / "ours")
    assert len(ours) == len(theirs.logged) == STEPS

    what = f"preference {name}"

    def logged(metric: str) -> tuple[list[float], list[float]]:
        return [record[metric] for record in ours], theirs.values(metric)

    assert_numbers_close(f"{what}: loss", *logged("loss"), 1e-5)
    assert len({round(value, 3) for value in theirs.values("loss")}) == STEPS, "the loss moves at every step"
    assert_numbers_close(f"{what}: gradient norm", *logged("grad_norm"), 1e-5)
    assert logged("num_tokens")[0] == logged("num_tokens")[1]
    for metric in case.metrics:
        # Sums of some hundred nats in fp32, and differences of such sums: relative to the sums.
        scale = max(map(abs, theirs.values("logps/chosen")))
        assert_numbers_close(f"{what}: {metric}", *logged(metric), 5e-7, scale=scale)
    if case.metrics:
        ours_accurate, theirs_accurate = logged("rewards/accuracies")
        assert ours_accurate[0] == 0.5 and theirs_accurate[0] == 0, "all pairs tie"
        assert ours_accurate[1:] == pytest.approx(theirs_accurate[1:], abs=1e-6)
    gradients = gradients_of(tmp_path / "ours", beta1=0.0)
    assert_close(f"{what}: gradients of step {STEPS}", gradients, theirs.gradients[-1], 5e-5)
    assert_close(f"{what}: weights after step {STEPS}", tensors_of(tmp_path / "ours"), theirs.weights, 5e-6)
