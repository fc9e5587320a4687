"""One case of the invariance design: how the package runs it and how the oracle does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tests.distributed.invariance_design import ALL_ARCHITECTURES, PREFERENCES
from tests.oracle import data
from tests.oracle.checkpoints import write_hugging_face
from tests.oracle.model import Weights, random_weights
from tests.oracle.objectives import LanguageModel, Preference, PreferenceSettings, Regression
from tests.oracle.pairwise import Case
from tests.oracle.training import Optimizer, Outcome, train
from tests.stage_inputs import StageInputs

STEPS = 3
SEED = 1234  # runtime.seed's default
SEQUENCE = 96  # tokens of the longest row
WINDOW = 48  # tokens of a pretraining sample
ATTRIBUTES = ["clarity", "safety"]
ROWS = {"sft": "dialogues", "regression": "rated", "preference": "pairs"}
# Room for at least two sequences: even four examples on three ranks share a micro-batch then.
PACKED = {"packed": 2 * SEQUENCE, "packed wide": 4 * SEQUENCE}
TERMS = {  # level of `terms` -> (sft_loss_weight, preference_average_log_probs)
    "preference": (0.0, False),
    "with sft": (0.05, False),
    "averaged with sft": (0.3, True),
}
ETA = 0.7
# IPO drives d to 1 / (2 beta): with 0.1 its gradients would be far larger than those of the others, and Adam's eps
# small beside them.
BETA = {"ipo": 0.5}
# Adam turns rounding into whole steps of the learning rate where a gradient is near zero; a large eps keeps the
# comparison about the gradient.
LR, MIN_LR, EPS, CLIP = 1e-3, 2e-4, 1e-3, 0.1
# Distance of log-probabilities (and of margins, which are a tenth of such) below which a format may order them wrongly.
RESOLUTION = {"fp32": 1e-5, "bf16": 0.05}


def verb_of(case: Case) -> str:
    objective = case["objective"]
    return "preference" if objective in PREFERENCES else {"regression": "reward"}.get(objective, objective)


@dataclass(frozen=True)
class Models:
    """Initial weights of every architecture as Hugging Face folders, written when first asked for."""

    folder: Path

    def weights(self, case: Case, *, bf16: bool = False) -> Weights:
        """What a run starts from. bf16: rounded as the package rounds; a reward head stays in fp32."""
        arch = ALL_ARCHITECTURES[case["architecture"]]
        reward = case["objective"] == "regression"
        weights = random_weights(arch, seed=11, attributes=len(ATTRIBUTES) if reward else None)
        if bf16:
            return {n: v if n.startswith("score.") else v.bfloat16().double() for n, v in weights.items()}
        return weights

    def path(self, case: Case) -> Path:
        reward = case["objective"] == "regression"
        path = self.folder / f"{case['architecture'].replace(' ', '_')}{'_reward' if reward else ''}"
        if not path.exists():
            arch = ALL_ARCHITECTURES[case["architecture"]]
            write_hugging_face(path, self.weights(case), arch, ATTRIBUTES if reward else None)
        return path


def batch_sizes(case: Case) -> list[int]:
    """Examples of each step. Pretraining wants whole micro-batches on every rank, rows do not."""
    if case["objective"] != "pretrain":
        # 12 x 3 examples out of 33: the third batch crosses the border of an epoch.
        return [{"little": 4, "much": 12}[case["accumulation"]]] * STEPS
    unit = case["micro_batch"] * case["data"] * (case["pipeline"] if case["virtual_pipeline"] > 1 else 1)
    size = unit * {"little": 1, "much": 3}[case["accumulation"]]
    return [size, 2 * size, 2 * size] if case["batch_ramp"] else [size] * STEPS


def schedule_of(case: Case) -> dict[str, int | str]:
    """Keys of the schedule. The first step of a warm-up of two has half of the rate."""
    return {
        "constant": {"schedule": "constant"},
        "cosine": {"schedule": "cosine", "warmup_steps": 1},
        "linear": {"schedule": "linear", "warmup_steps": 2},
        "wsd": {"schedule": "wsd", "decay_steps": 2},
    }[case["schedule"]]


def overrides_of(case: Case, inputs: StageInputs, models: Models) -> list[str]:
    """Overrides of the run without its layout and folder."""
    verb, sizes = verb_of(case), batch_sizes(case)
    common = {
        "data.tokenizer": inputs.tokenizer,
        "checkpoint.init_from": models.path(case),
        "model.make_vocab_size_divisible_by": 1,
        "checkpoint.save_every": 1,
        "checkpoint.fully_reshardable": "true",
        "checkpoint.keep_last": STEPS,
        "optimizer.lr": LR,
        "optimizer.eps": EPS,
        "optimizer.clip_grad": CLIP if case["clipping"] else 0,
        "train.global_batch_size": sizes[-1],
        **{f"optimizer.{key}": value for key, value in schedule_of(case).items()},
    }
    if case["schedule"] != "constant":
        common["optimizer.min_lr"] = MIN_LR
    if verb == "pretrain":
        common |= {
            "data.sequence_length": WINDOW,
            "data.phases.first.steps": STEPS - 1,
            "data.phases.first.blend.text.path": inputs.blend,
            "data.phases.second.steps": 1,
            "data.phases.second.blend.text.path": inputs.blend,
            "data.validation.text.path": inputs.blend,
            "train.micro_batch_size": case["micro_batch"],
        }
        if case["batch_ramp"]:
            entries = [(0, sizes[0]), (sizes[0] * WINDOW, sizes[-1])]
            text = ",".join(f"{{from_tokens: {start}, global_batch_size: {size}}}" for start, size in entries)
            common["train.batch_ramp"] = f"[{text}]"
        return _as_overrides(common)
    rows = ROWS["preference" if verb == "preference" else case["objective"]]
    common |= {
        "data.sequence_length": SEQUENCE,
        "data.train.rows.path": inputs.rows(rows),
        "data.validation.rows.path": inputs.rows(f"{rows}_held_out"),
        "train.max_steps": STEPS,
    }
    if case["micro_batch"] in PACKED:
        common["train.micro_batch_tokens"] = PACKED[case["micro_batch"]]
    else:
        common |= {"train.packing": "false", "train.micro_batch_size": case["micro_batch"]}
    if verb == "reward":
        common |= {"reward.attributes": f"[{','.join(ATTRIBUTES)}]", "reward.load_head": "true"}
        common |= {f"reward.weights.{name}": 1.0 for name in ATTRIBUTES}
    if verb == "preference":
        sft_weight, average = TERMS[case["terms"]]
        common |= {
            "preference.preference_loss": case["objective"],
            "preference.sft_loss_weight": sft_weight,
            "preference.preference_average_log_probs": str(average).lower(),
        }
        if case["objective"].startswith("rpo"):
            common["preference.gt_reward_scale"] = ETA
        if case["objective"] in BETA:
            common["preference.ref_policy_kl_penalty"] = BETA[case["objective"]]
    return _as_overrides(common)


def _as_overrides(values: dict) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def parallel_of(case: Case) -> dict:
    """Fields of the `parallel` group."""
    names = ("data", "tensor", "pipeline", "sequence", "virtual_pipeline", "distributed_optimizer", "recompute")
    overlap = case["overlap"]
    return {
        **{name: case[name] for name in names},
        "overlap_grad_reduce": overlap != "none",
        "overlap_param_gather": overlap == "both",
    }


def world_size(case: Case) -> int:
    return case["data"] * case["tensor"] * case["pipeline"]


@cache
def _examples(inputs: StageInputs, kind: str) -> tuple[list[data.Example], list[data.Example]]:
    """(training rows, held-out rows) of a kind."""
    chat = data.Chat(inputs.tokenizer)
    files = [inputs.rows(ROWS[kind] + suffix) for suffix in ("", "_held_out")]
    if kind == "sft":
        return tuple(data.dialogues(chat, file, SEQUENCE) for file in files)
    if kind == "regression":
        return tuple(data.rated_responses(chat, file, ATTRIBUTES) for file in files)
    return tuple(data.pairs(chat, file) for file in files)


def batches_of(case: Case, inputs: StageInputs) -> tuple[list[list[data.Example]], list[data.Example]]:
    """(examples of each step, held-out examples)."""
    sizes = batch_sizes(case)
    if case["objective"] == "pretrain":
        end = data.Chat(inputs.tokenizer).end_of_document
        texts = data.documents(inputs.blend.with_suffix(".bin"), end)
        phases = [sizes[:-1], sizes[-1:]]
        samples = [data.pretraining_samples(texts, sum(phase), WINDOW, SEED) for phase in phases]
        order, held_out = [*samples[0], *samples[1]], data.held_out_windows(texts, WINDOW, end)
    else:
        rows, held_out = _examples(inputs, "preference" if case["objective"] in PREFERENCES else case["objective"])
        order = [rows[index] for index in data.order_of_rows(len(rows), SEED, sum(sizes))]
    starts = [sum(sizes[:step]) for step in range(STEPS)]
    return [order[start : start + size] for start, size in zip(starts, sizes, strict=True)], held_out


def oracle_of(case: Case, inputs: StageInputs, models: Models, *, bf16: bool = False) -> Outcome:
    """The run in plain fp64. bf16: from weights of that format."""
    resolution = RESOLUTION["bf16" if bf16 else "fp32"]
    arch = ALL_ARCHITECTURES[case["architecture"]]
    weights = models.weights(case, bf16=bf16)
    batches, held_out = batches_of(case, inputs)
    if case["objective"] in PREFERENCES:
        sft_weight, average = TERMS[case["terms"]]
        eta = ETA if case["objective"].startswith("rpo") else 1.0
        beta = BETA.get(case["objective"], 0.1)
        settings = PreferenceSettings(case["objective"], beta, eta, sft_weight=sft_weight, average=average)
        objective = Preference(arch, settings, weights, resolution)
    elif case["objective"] == "regression":
        objective = Regression(arch, ATTRIBUTES)
    else:
        objective = LanguageModel(arch, resolution)

    def held_out_metrics(weights: Weights) -> dict[str, float]:
        with torch.no_grad():
            loss, metrics = objective(weights, held_out)
            if isinstance(objective, Regression):
                metrics |= objective.held_out_metrics(weights, held_out, _examples(inputs, "regression")[0])
        return {"loss": float(loss), **metrics}

    optimizer = Optimizer(
        lr=LR,
        eps=EPS,
        clip_grad=CLIP if case["clipping"] else 0.0,
        min_lr=0.0 if case["schedule"] == "constant" else MIN_LR,
        **schedule_of(case),
    )
    return train(objective, weights, batches, optimizer, held_out_metrics)
