"""Reward regression against transformers' NemotronForSequenceClassification with problem_type="regression".

The definitions differ in four places; each is dealt with so that what is common is compared to rounding:

- Which token is read. Theirs: the last that is not padding. Ours: the appended reward token. It stands last, so both
  read it (padding on the right with an id that no row ends with).
- A missing label. Theirs has no mask and divides by rows x attributes; ours leaves the label out and divides by the
  labels that are there. So their label is set to their own prediction, whose error is zero, and their mean is rescaled
  by the number of labels.
- The head's bias. Theirs has none: an export folds ours into the final norm's (checkpoint/huggingface/reward_head.py).
  Without bias all gradients are compared; with it, what folding makes of them.
- Number format. Our head is fp32 whatever the rest is; in fp32 both are.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.stage_runs import numbers, run_stage
from tests.parity.trained import assert_close, assert_numbers_close, gradients_of, tensors_of
from tests.stage_inputs import StageInputs, stage_overrides

BATCH, STEPS, BETA1, BETA2, EPS, LR, WEIGHT_DECAY = 10, 4, 0.9, 0.95, 1e-3, 1e-3, 0.1
ATTRIBUTES = ["clarity", "safety"]


def overrides(inputs: StageInputs, rows: Path, start: Path, steps: int) -> list[str]:
    return [
        *stage_overrides(inputs, "reward"),
        f"data.train.rows.path={rows}",
        f"checkpoint.init_from={start}",
        "data.sequence_length=192",
        f"train.max_steps={steps}",
        "train.epochs=2",
        "train.validate_at_start=false",
        f"optimizer.lr={LR}",
        f"optimizer.beta1={BETA1}",
        f"optimizer.beta2={BETA2}",
        f"optimizer.eps={EPS}",
        f"optimizer.weight_decay={WEIGHT_DECAY}",
        "optimizer.clip_grad=0",
    ]


@pytest.fixture(scope="module")
def reward_start(request, pool1, stage_inputs, start_policy, tmp_path_factory) -> tuple[Path, bool]:
    """A reward model after two steps as a Hugging Face folder, whose head both sides load; and if it has a bias."""
    bias = request.param == "bias"
    run_dir = tmp_path_factory.mktemp("reward_start")
    settings = [
        *overrides(stage_inputs, stage_inputs.rows("rated"), start_policy, steps=2),
        f"reward.head_bias={str(bias).lower()}",
        "reward.head_init_std=0.2",
        "checkpoint.export_hf=true",
    ]
    run_stage(pool1, "reward", run_dir, settings)
    return run_dir / "hf", bias


@pytest.fixture(scope="module", params=["all_labels", "missing_labels"])
def rated(request, stage_inputs, tmp_path_factory) -> Path:
    """Rated rows: in the inputs every fourth or so lacks one label; here they have it, or have not."""
    path = tmp_path_factory.mktemp(request.param) / "rows.jsonl"
    rows = [json.loads(line) for line in stage_inputs.rows("rated").read_text().splitlines()]
    assert any(row["safety"] is None for row in rows)
    if request.param == "all_labels":
        rows = [row | {"safety": 0.5 if row["safety"] is None else row["safety"]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batches(inputs: StageInputs, rated: Path, steps: int) -> list[dict[str, torch.Tensor]]:
    """Rows of the sampler's order, padded on the right; labels [rows, attributes] with NaN where missing."""
    from nemo_align.data.chat import Message
    from nemo_align.data.chat_template import render_rated
    from nemo_align.data.sampler import EpochSampler
    from nemo_align.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(inputs.tokenizer)
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    sampler, found = EpochSampler(len(rows), seed=1234), []
    for step in range(steps):
        chosen = [rows[index] for index in sampler.batch(step * BATCH, BATCH)]
        texts = [(Message("user", row["prompt"]), Message("assistant", row["response"])) for row in chosen]
        tokens = [torch.tensor(render_rated(text, tokenizer)) for text in texts]
        assert len({len(row) for row in tokens}) > 3
        assert all(row[-1] == tokenizer.control_id("<extra_id_2>") != tokenizer.pad_id for row in tokens)
        pad = torch.nn.utils.rnn.pad_sequence
        found.append(
            {
                "input_ids": pad(tokens, batch_first=True, padding_value=tokenizer.pad_id),
                "attention_mask": pad([torch.ones_like(row) for row in tokens], batch_first=True),
                "labels": torch.tensor(
                    [[float("nan") if row[a] is None else row[a] for a in ATTRIBUTES] for row in chosen]
                ),
            }
        )
    return found


def _label(value: float | None) -> float:
    return float("nan") if value is None else value


def their_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """transformers' own loss, with a label that is missing standing where the model predicts."""
    labels = batch["labels"]
    given = ~labels.isnan()
    if given.all():
        return model(**batch).loss
    with torch.no_grad():
        predictions = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    output = model(**batch | {"labels": torch.where(given, labels, predictions)})
    return output.loss * labels.numel() / given.sum()


def load_reward_model(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert model.config.problem_type == "regression" and type(model).__name__ == "NemotronForSequenceClassification"
    return model


@pytest.mark.parametrize("reward_start", ["no_bias", "bias"], indirect=True)
def test_loss_and_every_gradient(reward_start, rated, pool1, stage_inputs, tmp_path):
    folder, bias = reward_start
    extra = ["reward.load_head=true", f"reward.head_bias={str(bias).lower()}"]
    records = run_stage(pool1, "reward", tmp_path, [*overrides(stage_inputs, rated, folder, 1), *extra])
    model = load_reward_model(folder)
    loss = their_loss(model, batches(stage_inputs, rated, 1)[0])
    loss.backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    ours = gradients_of(tmp_path, BETA1)
    what = f"reward {'with bias' if bias else 'without bias'}, {rated.parent.name}"
    assert_numbers_close(f"{what}: loss", [numbers(records, "train")[0]["loss"]], [loss.item()], 5e-6)
    if bias:
        # Theirs reads y + d where ours reads y and adds c = W d: dL/dW of theirs is ours plus (dL/dc) d^T, and what
        # reaches the norm's bias is W^T (dL/dc) on both sides.
        shift = model.model.norm.bias.detach() - norm_bias_before_folding(folder)
        assert shift.abs().max() > 1e-3
        of_bias = ours.pop("score.bias")
        ours["score.weight"] = ours["score.weight"] + torch.outer(of_bias, shift)
        through_head = {"norm": model.score.weight.detach().T @ of_bias}
        assert_close(f"{what}: gradient of the head's bias", through_head, {"norm": theirs["model.norm.bias"]}, 5e-6)
    assert_close(f"{what}: gradients", ours, theirs, 2e-5)


def norm_bias_before_folding(folder: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(folder / "reward_head.safetensors")["final_norm_bias"]


@pytest.mark.parametrize("reward_start", ["no_bias"], indirect=True)  # a folded bias is no parameter of theirs
def test_weights_after_steps_of_adamw(reward_start, rated, pool1, stage_inputs, tmp_path):
    folder, _ = reward_start
    extra = ["reward.load_head=true", "reward.head_bias=false"]
    logged = numbers(
        run_stage(pool1, "reward", tmp_path, [*overrides(stage_inputs, rated, folder, STEPS), *extra]), "train"
    )
    model = load_reward_model(folder)
    named = dict(model.named_parameters())
    decays = [
        ([p for p in named.values() if p.dim() > 1], WEIGHT_DECAY),
        ([p for p in named.values() if p.dim() == 1], 0.0),
    ]
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for params, decay in decays], lr=LR, betas=(BETA1, BETA2), eps=EPS
    )
    losses = []
    for batch in batches(stage_inputs, rated, STEPS):
        optimizer.zero_grad()
        loss = their_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_numbers_close("reward: losses over steps", [record["loss"] for record in logged], losses, 1e-5)
    assert_close("reward: weights after steps", tensors_of(tmp_path), {n: p.detach() for n, p in named.items()}, 5e-6)
