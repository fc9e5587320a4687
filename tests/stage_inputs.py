"""Small inputs for every stage: a tokenizer, rows of each kind and a pretraining blend, made from a seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

VOCABULARY = 601  # not divisible by any tensor size: the embeddings are padded differently at TP 1 and TP 2


@dataclass(frozen=True)
class StageInputs:
    """Files of one folder."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.model"

    def rows(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    @property
    def blend(self) -> Path:
        return self.folder / "blend"


# A model whose head_dim x heads differs from hidden_size, with fewer KV groups than heads, 4 layers for PP 2 x VP 2.
MODEL = [
    "model=tiny",
    "precision=fp32",
    f"model.vocab_size={VOCABULARY}",
    "model.make_vocab_size_divisible_by=8",
    "model.hidden_size=48",
    "model.head_dim=16",
    "model.ffn_hidden_size=96",
]

# Adam turns rounding into whole steps of the learning rate where a gradient is near zero; a large eps keeps the
# comparison about the gradient.
OPTIMIZER = ["optimizer.lr=1e-3", "optimizer.eps=1e-3"]


def stage_overrides(inputs: StageInputs, verb: str) -> list[str]:
    """Overrides that make `verb` run on these inputs, without layout, run_dir or initial weights."""
    tokenizer = f"data.tokenizer={inputs.tokenizer}"
    if verb == "pretrain":
        return [
            tokenizer,
            *OPTIMIZER,
            "data.sequence_length=48",
            "data.phases.first.steps=2",
            f"data.phases.first.blend.text.path={inputs.blend}",
            "data.phases.second.steps=1",
            f"data.phases.second.blend.text.path={inputs.blend}",
            f"data.validation.text.path={inputs.blend}",
            "train.global_batch_size=8",
            "train.micro_batch_size=2",
        ]
    rows = {"sft": "dialogues", "reward": "rated", "preference": "pairs"}[verb]
    common = [
        tokenizer,
        *OPTIMIZER,
        "data.sequence_length=96",
        f"data.train.rows.path={inputs.rows(rows)}",
        f"data.validation.rows.path={inputs.rows(rows + '_held_out')}",
        "train.global_batch_size=10",
        "train.max_steps=3",
    ]
    if verb == "reward":
        common += ["reward.attributes=[clarity,safety]", "reward.weights.clarity=1", "reward.weights.safety=0.5"]
    return common


def make_stage_inputs(folder: Path) -> StageInputs:
    """Write every file; the same bytes on every call."""
    import sentencepiece

    from nemo_align.data.indexed import write_indexed_dataset
    from nemo_align.data.tokenizer import load_tokenizer

    chance = random.Random(7)
    words = ["".join(chance.choice("abcdefghijklmnop") for _ in range(chance.randint(2, 7))) for _ in range(300)]

    def text(shortest: int, longest: int) -> str:
        return " ".join(chance.choice(words) for _ in range(chance.randint(shortest, longest)))

    inputs = StageInputs(folder)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text(8, 16) for _ in range(2000)]),
        model_prefix=str(inputs.tokenizer.with_suffix("")),
        vocab_size=VOCABULARY,
        model_type="bpe",
        unk_id=0,
        pad_id=1,
        bos_id=2,
        eos_id=3,
        control_symbols=[f"<extra_id_{number}>" for number in range(4)],
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )

    def dialogue() -> dict:
        turns = chance.randint(1, 2)
        roles = ("user", "assistant") * turns
        return {"messages": [{"role": role, "content": text(2, 9)} for role in roles]}

    def rated() -> dict:
        safety = chance.choice([None, 1, 2, 3])  # missing labels: denominators count labels, not rows
        return {"prompt": text(2, 8), "response": text(2, 12), "clarity": chance.uniform(0, 4), "safety": safety}

    def pair() -> dict:
        good = chance.uniform(1, 3)
        return {
            "prompt": text(2, 8),
            "chosen": text(2, 12),
            "rejected": text(2, 12),
            "chosen_reward": good,
            "rejected_reward": good - chance.uniform(0.1, 2),
        }

    for name, make, count in (("dialogues", dialogue, 33), ("rated", rated, 33), ("pairs", pair, 33)):
        for suffix, number in (("", count), ("_held_out", 7)):
            lines = [json.dumps(make()) for _ in range(number)]
            inputs.rows(name + suffix).write_text("\n".join(lines) + "\n")

    tokenizer = load_tokenizer(inputs.tokenizer)
    documents = [tokenizer.encode_text(text(20, 90)) for _ in range(40)]
    write_indexed_dataset(inputs.blend, documents, tokenizer.vocab_size, tokenizer.eos_id)
    return inputs
