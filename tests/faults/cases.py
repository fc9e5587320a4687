"""The runs that are disturbed: one of each verb, small enough to be started hundreds of times."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.stage_inputs import MODEL, StageInputs, stage_overrides

STAGES = ("pretrain", "sft", "reward", "preference")
VALIDATE_EVERY = 3  # never at the step before a save, so that the two are told apart
SAVE_EVERY = 2
EXPORTING = ("pretrain", "preference")


@dataclass(frozen=True)
class Case:
    """A command line without run_dir."""

    name: str
    verb: str
    overrides: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        return [self.verb, *self.overrides]


@dataclass(frozen=True)
class FaultInputs:
    """The stages' inputs, with held-out sets and pairs enough for validation and the reference pass to be struck."""

    stage: StageInputs
    folder: Path

    def rows(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"


def make_inputs(stage: StageInputs, folder: Path) -> FaultInputs:
    """Write the longer files; the same bytes on every call."""
    inputs = FaultInputs(stage, folder)
    for name in ("dialogues", "rated", "pairs"):
        rows = [json.loads(line) for line in stage.rows(name).read_text().splitlines()]
        _write(inputs.rows(f"{name}_held_out"), [rows[index % len(rows)] for index in range(60)])
    pairs = [json.loads(line) for line in stage.rows("pairs").read_text().splitlines()]
    # Other prompts make other pairs: the cache of reference log-probabilities counts equal ones once.
    mixed = [
        {**pairs[index % len(pairs)], "prompt": pairs[(index + index // len(pairs)) % len(pairs)]["prompt"]}
        for index in range(240)
    ]
    _write(inputs.rows("pairs"), mixed)
    responses = [{"prompt": row["prompt"], "response": row[side]} for row in mixed for side in ("chosen", "rejected")]
    _write(inputs.rows("responses"), responses * 2)
    return inputs


def training_case(inputs: FaultInputs, verb: str, *, start: Path | None = None, extra: tuple[str, ...] = ()) -> Case:
    """`verb` on two ranks with its own layout; `start`: the run directory whose weights it begins with."""
    layout = {
        "pretrain": ["parallel.data=2"],
        "sft": ["parallel.data=2"],
        "reward": ["parallel.tensor=2", "parallel.sequence=true"],
        "preference": ["parallel.pipeline=2"],
    }[verb]
    # A run takes its model from the checkpoint that it starts from.
    begin = ["precision=fp32", f"checkpoint.init_from={start}"] if start else MODEL
    common = [
        f"checkpoint.save_every={SAVE_EVERY}",
        f"train.validate_every={VALIDATE_EVERY}",
        # Importing transformers for the export takes longer than all the rest of the end.
        f"checkpoint.export_hf={str(verb in EXPORTING).lower()}",
        "runtime.threads=1",
        "runtime.max_restarts=0",  # test_restarts.py lets the launcher start again
        "tracking.peak_tflops=0.1",  # measuring it takes a second of every start
    ]
    own: dict[str, list[str]] = {
        # The batch grows from 4 to 8 samples of 48 tokens after 5 steps, in the first of two phases.
        "pretrain": [
            "data.phases.first.steps=8",
            "data.phases.second.steps=6",
            "train.batch_ramp=[{from_tokens:0,global_batch_size:4},{from_tokens:960,global_batch_size:8}]",
        ],
        # 33 dialogues in batches of 10: an epoch ends inside of every third or fourth step; several share a row.
        "sft": ["train.max_steps=14", "train.micro_batch_tokens=192"],
        "reward": ["train.max_steps=10"],
        "preference": [
            "train.max_steps=12",
            "preference.preference_loss=rpo_bwd_kl",
            f"data.train.rows.path={inputs.rows('pairs')}",
        ],
    }
    held_out = {"sft": "dialogues", "reward": "rated", "preference": "pairs"}
    if verb in held_out:
        own[verb].append(f"data.validation.rows.path={inputs.rows(held_out[verb] + '_held_out')}")
    return Case(verb, verb, (*begin, *stage_overrides(inputs.stage, verb), *common, *layout, *own[verb], *extra))


def score_case(inputs: FaultInputs, reward_run: Path) -> Case:
    """Scoring with the model that the reward case trained."""
    overrides = (
        "precision=fp32",
        f"checkpoint.init_from={reward_run}",
        f"inputs.responses={inputs.rows('responses')}",
        "data.sequence_length=96",
        "parallel.data=2",
        "runtime.threads=1",
        "runtime.max_restarts=0",  # test_restarts.py lets the launcher start again
        "tracking.peak_tflops=0.1",
    )
    return Case("score", "score", overrides)


def pipeline_case(inputs: FaultInputs) -> Case:
    """SFT, a reward model, its scores, and preference training on them."""
    sft, reward, preference = (
        training_case(inputs, verb, start=None if verb == "sft" else Path("unused"))
        for verb in ("sft", "reward", "preference")
    )
    scored = [text for text in preference.overrides if not text.startswith("data.train.rows.path")]
    scored += ["data.train.rows.path={score}/pairs.jsonl", "data.select.inverted=swap", "train.max_steps=6"]
    stages = {
        "sft": ("sft", None, [*sft.overrides, "train.max_steps=6"]),
        "reward": ("reward", "sft", [*reward.overrides, "train.max_steps=6"]),
        "score": (
            "score",
            "reward",
            [
                "precision=fp32",
                f"inputs.pairs={inputs.rows('pairs')}",
                "data.sequence_length=96",
                "parallel.data=2",
                "runtime.max_restarts=0",
            ],
        ),
        "dpo": ("preference", "sft", scored),
    }
    texts: list[str] = []
    for name, (verb, source, overrides) in stages.items():
        listed = ",".join(f'"{text}"' for text in overrides if not text.startswith("checkpoint.init_from"))
        texts += [f"stages.{name}.verb={verb}", f"stages.{name}.overrides=[{listed}]"]
        texts += [f"stages.{name}.init_from={source}"] if source else []
    return Case("pipeline", "pipeline", tuple(texts))


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
