"""Every loss and its gradient through the real schedule, against closed forms and one plain forward per sequence.

The oracle never packs, never splits a batch, and takes each derivative from the formula instead of autograd:
    preference   dL/dlog pi(c_t) = beta dL/du, dL/dlog pi(l_t) = -beta dL/du, divided by the number of pairs
    language     dL/dlog p_t = -1 / number of predicted tokens
    regression   dL/dp = 2 (p - y) / number of labels
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.distributed.pool import with_topology
from tests.stage_inputs import MODEL, stage_overrides

BETA, ETA, SFT_WEIGHT = 0.3, 0.7, 0.05


def sigmoid(value: float) -> float:
    return float(1 / (1 + np.exp(-value)))


# kind -> (loss, dL/du) of u = beta d and g = eta x reward gap; written out from the report's definitions.
def bernoulli_kl(p: float, q: float) -> float:
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


CLOSED_FORMS = {
    "dpo": lambda u, g: (-np.log(sigmoid(u)), sigmoid(u) - 1),
    "ipo": lambda u, g: ((u / BETA - 1 / (2 * BETA)) ** 2, 2 / BETA * (u / BETA - 1 / (2 * BETA))),
    "rpo_bwd_kl": lambda u, g: (bernoulli_kl(sigmoid(g), sigmoid(u)), sigmoid(u) - sigmoid(g)),
    "rpo_fwd_kl": lambda u, g: (bernoulli_kl(sigmoid(u), sigmoid(g)), sigmoid(u) * (1 - sigmoid(u)) * (u - g)),
    "rpo_sq": lambda u, g: ((u - g) ** 2, 2 * (u - g)),
}


def build(topology, config, reward=None):
    from nemo_align.model.build import build_model

    return build_model(config.model, config.parallel, config.precision, topology, reward_head=reward)


def through_the_schedule(topology, config, chunks, rows, objective, extra_targets=None):
    """Loss and gradients of one global batch of all rows in several micro-batches."""
    from nemo_align.data.source import RowSource
    from nemo_align.data.step_plan import StepLayout
    from nemo_align.training.optimizer import wrap_data_parallel
    from nemo_align.training.schedule_step import run_step

    wrapped = wrap_data_parallel(chunks, config.parallel, config.precision)
    layout = StepLayout(capacity=200)
    source = RowSource(rows, layout=layout, data_rank=0, seed=0, extra_targets=extra_targets)
    step = source.step(0, len(rows))
    assert step.plan.num_micro_batches > 2
    outcome = run_step(wrapped, step, objective, topology)
    return outcome.metrics, {name: p.main_grad.clone() for name, p in chunks[0].named_parameters()}


def hidden_or_logits(model, tokens):
    """[S, V or A] of one sequence alone."""
    import torch

    row = torch.as_tensor(np.asarray(tokens, dtype=np.int64))[None]
    return model(row, torch.arange(row.shape[1])[None], None)[0]


def label_log_probs(model, tokens, mask, vocab_size):
    """log p of each predicted token of a sequence alone, through torch's log_softmax."""
    import torch

    logits = hidden_or_logits(model, tokens)[:-1, :vocab_size]
    labels = torch.as_tensor(np.asarray(tokens, dtype=np.int64))[1:]
    chosen = torch.log_softmax(logits.float(), dim=-1).gather(-1, labels[:, None])[:, 0]
    return chosen[torch.as_tensor(np.asarray(mask))[1:]]


def compare(gradients, model):
    """Elementwise; sums that nearly cancel keep their terms' rounding, so the bound follows the largest element."""
    import torch

    largest = max(float(parameter.grad.abs().max()) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            gradients[name],
            parameter.grad,
            rtol=2e-4,
            atol=2e-6 * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def preference_case(topology, config, cache, kind):
    from nemo_align.data.preference import tokenize_preference
    from nemo_align.data.tokenizer import load_tokenizer
    from nemo_align.stages.preference import PreferenceObjective

    rows = tokenize_preference(
        config.data,
        config.data.train,
        load_tokenizer(config.data.tokenizer),
        cache_dir=cache,
        seed=0,
        preference_loss=kind,
    )
    oracle = build(topology, config)[0]
    vocab = config.model.vocab_size
    chance = np.random.default_rng(5)
    sums = [
        [label_log_probs(oracle, *sequence, vocab).sum() for sequence in rows.sequences(i)] for i in range(len(rows))
    ]
    # A reference away from the policy, so that u differs from 0 and from pair to pair.
    reference = np.array([[float(x.detach()) for x in pair] for pair in sums]) + chance.normal(0, 3, (len(rows), 2))
    reference = reference.astype(np.float32)
    expected, surrogate = 0.0, 0.0
    for index, (chosen, rejected) in enumerate(sums):
        d = chosen - rejected - float(reference[index, 0]) + float(reference[index, 1])
        gap = ETA * float(rows.targets["chosen_reward"][index] - rows.targets["rejected_reward"][index])
        loss, slope = CLOSED_FORMS[kind](BETA * float(d.detach()), gap)
        expected += (loss - SFT_WEIGHT * float(chosen.detach())) / len(rows)
        surrogate = surrogate + BETA * slope * d / len(rows)
        surrogate = surrogate - SFT_WEIGHT * chosen / len(rows)
    surrogate.backward()
    metrics, gradients = through_the_schedule(
        topology,
        config,
        build(topology, config),
        rows,
        PreferenceObjective(config, topology),
        {"reference_chosen_logps": reference[:, 0], "reference_rejected_logps": reference[:, 1]},
    )
    assert metrics["loss"] == pytest.approx(expected, rel=2e-5)
    compare(gradients, oracle)


def language_case(topology, config, cache, kind):
    from nemo_align.data.sft import tokenize_sft
    from nemo_align.data.tokenizer import load_tokenizer
    from nemo_align.stages.language_model import LanguageModelObjective

    rows = tokenize_sft(config.data, config.data.train, load_tokenizer(config.data.tokenizer), cache_dir=cache, seed=0)
    oracle = build(topology, config)[0]
    vocab = config.model.vocab_size
    loss = -sum(label_log_probs(oracle, *rows.sequences(i)[0], vocab).sum() for i in range(len(rows)))
    loss = loss / int(rows.loss_tokens.sum())
    loss.backward()
    metrics, gradients = through_the_schedule(
        topology, config, build(topology, config), rows, LanguageModelObjective(vocab, topology)
    )
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    compare(gradients, oracle)


def regression_case(topology, config, cache, kind):
    import torch

    from nemo_align.data.regression import tokenize_regression
    from nemo_align.data.tokenizer import load_tokenizer
    from nemo_align.stages.reward import RegressionObjective

    attributes = config.reward.attributes
    rows = tokenize_regression(
        config.data,
        config.data.train,
        load_tokenizer(config.data.tokenizer),
        cache_dir=cache,
        seed=0,
        attributes=attributes,
    )
    oracle = build(topology, config, config.reward)[0]
    labels = rows.targets["labels"]
    count = int((~np.isnan(labels)).sum())
    assert count < labels.size, "some labels must be missing"
    expected, surrogate = 0.0, 0.0
    for index in range(len(rows)):
        tokens, _ = rows.sequences(index)[0]
        predicted = hidden_or_logits(oracle, tokens)[-1]
        error = np.nan_to_num(predicted.detach().numpy() - labels[index])
        expected += float((error**2).sum()) / count
        surrogate = surrogate + (torch.as_tensor(2 * error / count) * predicted).sum()
    surrogate.backward()
    metrics, gradients = through_the_schedule(
        topology, config, build(topology, config, config.reward), rows, RegressionObjective(attributes)
    )
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    compare(gradients, oracle)


CASES = {"sft": language_case, "reward": regression_case, "preference": preference_case}


def run_case(topology, verb, config_path, cache, kind):
    from nemo_align.config.compose import load_resolved

    CASES[verb](topology, load_resolved(verb, config_path), Path(cache), kind)


@pytest.mark.parametrize(
    ("verb", "kind"), [("sft", ""), ("reward", ""), *[("preference", kind) for kind in CLOSED_FORMS]]
)
def test_loss_and_every_gradient_equal_the_closed_form(verb, kind, pool1, stage_inputs, policy, tmp_path):
    from nemo_align.config.compose import compose, to_yaml

    extra = []
    if verb == "preference":
        extra = [
            f"preference.preference_loss={kind}",
            f"preference.ref_policy_kl_penalty={BETA}",
            *([f"preference.gt_reward_scale={ETA}"] if kind.startswith("rpo") else []),
            f"preference.sft_loss_weight={SFT_WEIGHT}",
        ]
    # Compared with a model of our own making: no checkpoint is read, though `preference` wants one named.
    if verb == "preference":
        extra.append(f"checkpoint.init_from={policy}")
    model = MODEL if verb != "preference" else ["precision=fp32"]
    config = compose(verb, [*model, *stage_overrides(stage_inputs, verb), *extra, f"run_dir={tmp_path}"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    pool1.run(with_topology, run_case, {}, verb, str(path), str(tmp_path / "cache"), kind)
