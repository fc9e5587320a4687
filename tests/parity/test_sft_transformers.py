"""SFT against transformers' NemotronForCausalLM and torch's AdamW: the same weights, the same dialogues, in fp32.

Theirs is as plain as it gets: every dialogue alone in its row, padded to the longest of the batch, labels -100 where
nothing is learnt. Ours packs several into a row, cuts the batch into micro-batches, sums and divides by the global
count of predicted tokens. Loss and gradients must not show it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.stage_runs import numbers, run_stage
from tests.parity.start_model import load_policy
from tests.parity.trained import (
    FIRST_MOMENT,
    SECOND_MOMENT,
    assert_close,
    assert_numbers_close,
    gradients_of,
    tensors_of,
)
from tests.stage_inputs import StageInputs, stage_overrides

BATCH, STEPS = 10, 5
BETA1, BETA2, EPS, WEIGHT_DECAY, LR = 0.9, 0.95, 1e-3, 0.1, 2e-3


def overrides(inputs: StageInputs, start: Path, steps: int) -> list[str]:
    return [
        *stage_overrides(inputs, "sft"),
        f"checkpoint.init_from={start}",
        "data.sequence_length=192",
        "data.overlong=error",
        f"train.max_steps={steps}",
        "train.epochs=2",  # 33 dialogues: the fourth batch crosses into the second epoch
        "train.validate_at_start=false",
        f"optimizer.lr={LR}",
        f"optimizer.eps={EPS}",
        f"optimizer.weight_decay={WEIGHT_DECAY}",
        f"optimizer.beta1={BETA1}",
        f"optimizer.beta2={BETA2}",
        "optimizer.schedule=cosine",
        "optimizer.min_lr=1e-4",
        "optimizer.warmup_steps=2",
        "optimizer.clip_grad=0",
    ]


def labelled(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """(ids, labels) as a user of transformers makes them: the exported template's tokens, of which an assistant turn
    and the `<extra_id_1>` that ends it are labels. Nothing of ours renders or masks."""
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    header = tokenizer.encode("<extra_id_1>Assistant\n", add_special_tokens=False)
    labels = [-100] * len(ids)
    for start in range(len(ids)):
        if ids[start : start + len(header)] == header:
            begin = start + len(header)
            end = ids.index(header[0], begin) + 1
            labels[begin:end] = ids[begin:end]
    return ids, labels


def batches(inputs: StageInputs, start: Path, steps: int) -> list[dict[str, torch.Tensor]]:
    """What the Hugging Face user would feed: padded rows of the sampler's dialogues, labels -100 off the answers."""
    from transformers import AutoTokenizer

    from nemo_align.data.sampler import EpochSampler

    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = [json.loads(line) for line in inputs.rows("dialogues").read_text().splitlines()]
    rendered = [labelled(row["messages"], tokenizer) for row in rows]
    sampler = EpochSampler(len(rows), seed=1234)
    found = []
    for step in range(steps):
        chosen = [rendered[index] for index in sampler.batch(step * BATCH, BATCH)]
        width = max(len(tokens) for tokens, _ in chosen)
        assert len({len(tokens) for tokens, _ in chosen}) > 5, "dialogues of different lengths"
        ids = np.full((BATCH, width), tokenizer.pad_token_id)
        labels, attention = np.full((BATCH, width), -100), np.zeros((BATCH, width), dtype=np.int64)
        for row, (tokens, targets) in enumerate(chosen):
            ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens)] = targets
            attention[row, : len(tokens)] = 1
        arrays = {"input_ids": ids, "labels": labels, "attention_mask": attention}
        found.append({name: torch.from_numpy(array) for name, array in arrays.items()})
    return found


def test_loss_and_every_gradient(pool1, stage_inputs, start_policy, tmp_path):
    records = run_stage(pool1, "sft", tmp_path, overrides(stage_inputs, start_policy, steps=1))
    model = load_policy(start_policy)
    loss = model(**batches(stage_inputs, start_policy, 1)[0]).loss
    loss.backward()
    assert_numbers_close("sft loss", [numbers(records, "train")[0]["loss"]], [loss.item()], 1e-6)
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close("sft gradients", gradients_of(tmp_path, BETA1), theirs, 1e-5)


@pytest.mark.parametrize(
    "layout",
    [pytest.param({}, id="1", marks=pytest.mark.full), pytest.param({"tensor": 2, "sequence": True}, id="tensor2")],
)
def test_weights_and_moments_after_steps_of_adamw(layout, request, stage_inputs, start_policy, tmp_path):
    pool = request.getfixturevalue("pool2" if layout else "pool1")
    records = run_stage(pool, "sft", tmp_path, overrides(stage_inputs, start_policy, STEPS), layout)
    logged = numbers(records, "train")
    rates = [record["lr"] for record in logged]
    assert len(set(rates)) == STEPS, "a schedule that moves at every step"

    model = load_policy(start_policy)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=EPS)
    losses, norms = [], []
    for batch, rate in zip(batches(stage_inputs, start_policy, STEPS), rates, strict=True):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in named.values()])))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    assert_numbers_close("sft losses over steps", [record["loss"] for record in logged], losses, 2e-6)
    assert_numbers_close("sft gradient norms over steps", [record["grad_norm"] for record in logged], norms, 2e-6)
    moved = {name: p.detach() for name, p in named.items()}
    assert_close("sft weights after steps", tensors_of(tmp_path), moved, 1e-5)
    for prefix, key in ((FIRST_MOMENT, "exp_avg"), (SECOND_MOMENT, "exp_avg_sq")):
        theirs = {name: optimizer.state[p][key] for name, p in named.items()}
        assert_close(f"sft {key} after steps", tensors_of(tmp_path, prefix), theirs, 2e-5)
    # The comparison of weights would mean little had they stayed: the largest change against the bound above.
    start = load_policy(start_policy).state_dict()
    assert min(float((moved[name] - start[name]).abs().max() / moved[name].abs().max()) for name in moved) > 1e-3
