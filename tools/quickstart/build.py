"""Builds the quickstart's data folder from the packages, every file the same on each run."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path

from nemo_align.data.tokenizer import load_tokenizer
from quickstart import sources
from quickstart.amounts import Amounts
from quickstart.code_tasks import CodeTask, code_tasks
from quickstart.corpus import Corpus, build_corpus
from quickstart.degrade import degrade
from quickstart.dialogues import ENGLISH, Conversation, conversations, messages
from quickstart.output import Output, Row, limits, spread
from quickstart.procedural_tasks import GENERATORS, ProceduralTask, procedural_tasks
from quickstart.split import TRAIN, VALIDATION, digest
from quickstart.tokenizer_training import train_tokenizer

SEED = 1234
CODE_SHARE_OF_GENERAL_SFT = 0.02  # arXiv 2406.11704, section 3.3.1
_PRETRAINING = ("english", "multilingual", "code")


def build(folder: Path, amounts: Amounts) -> dict:
    """Write the folder anew and return its manifest. The manifest is written last: with it, the folder is whole."""
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:5.1f} s] {text}", flush=True)

    if folder.exists():
        if any(folder.iterdir()) and not (folder / "tokenizer").is_dir():
            raise ValueError(f"{folder} is not empty and holds no quickstart data: choose another --output")
        shutil.rmtree(folder)
    say("reading tasks with code, dialogues and procedural tasks")
    code = sorted(code_tasks(), key=lambda item: digest(item.task))[: amounts.code_tasks]
    talk = list(conversations())
    tasks = list(procedural_tasks(_tasks_per_generator(amounts), SEED))
    say("reading Wikipedia pages")
    corpus = build_corpus(code, talk, tasks, amounts)
    say("training the tokenizer")
    path = folder / "tokenizer" / "tokenizer.model"
    train_tokenizer(corpus.tokenizer_texts(amounts.tokenizer_characters), path)
    output = Output(folder, load_tokenizer(path))
    say("writing pretraining text")
    _write_pretraining(output, corpus, amounts)
    say("writing dialogues, rated responses and pairs")
    code_rows = _write_code_sft(output, code, amounts)
    _write_general_sft(output, talk, tasks, code_rows, amounts)
    _write_reward(output, code, amounts)
    _write_task_pairs(output, tasks, amounts)
    _write_code_pairs(output, code, amounts)
    manifest = {"format": 1, "seed": SEED, "files": output.counts, "sources": sources.describe()}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"done: {folder}")
    return manifest


def _tasks_per_generator(amounts: Amounts) -> int:
    needed = 1.2 * (amounts.general_sft_tasks + amounts.task_pairs) + 2 * amounts.validation_rows
    return int(needed / len(GENERATORS)) + 1


def _write_pretraining(output: Output, corpus: Corpus, amounts: Amounts) -> None:
    held_out = amounts.held_out_tokens, amounts.held_out_document_tokens
    for kind in _PRETRAINING:
        documents = getattr(corpus, kind)
        output.documents(f"pretrain/{kind}", documents[TRAIN], getattr(amounts, f"{kind}_tokens"))
        output.documents(f"pretrain/validation_{kind}", documents[VALIDATION], *held_out)
    output.documents("continued/qa", corpus.qa[TRAIN], amounts.qa_tokens)
    output.documents("continued/validation_qa", corpus.qa[VALIDATION], *held_out)


def _write_code_sft(output: Output, code: list[CodeTask], amounts: Amounts) -> list[tuple[str, Row]]:
    """Task -> code. Returns the training rows."""
    rows = ((item.task, _exchange(item.task, item.code)) for item in code)
    written = output.rows(
        "code_sft/",
        rows,
        limits=limits(amounts.code_sft_rows, amounts.validation_rows),
        fits=lambda row: output.row_tokens(row) <= amounts.row_tokens,
    )
    return written[TRAIN]


def _write_general_sft(
    output: Output,
    talk: list[Conversation],
    tasks: list[ProceduralTask],
    code_rows: list[tuple[str, Row]],
    amounts: Amounts,
) -> None:
    """English dialogues and procedural tasks, and two per cent of code against forgetting."""
    english = [(c.prompt, {"messages": messages(c)}) for c in talk if c.language == ENGLISH]
    english = sorted(english, key=lambda pair: digest(pair[0]))[: amounts.general_sft_dialogues]
    solved = [(task.question, _exchange(task.question, task.answer)) for task in tasks[: amounts.general_sft_tasks]]
    share = CODE_SHARE_OF_GENERAL_SFT
    num_code = round((len(english) + len(solved)) * share / (1 - share))
    chosen = random.Random(SEED).sample(code_rows, min(num_code, len(code_rows)))
    output.rows(
        "general_sft/",
        spread(english, solved, chosen) if chosen else spread(english, solved),
        limits=limits(len(english) + len(solved) + len(chosen), amounts.validation_rows),
        fits=lambda row: output.row_tokens(row) <= amounts.row_tokens,
    )


def _write_reward(output: Output, code: list[CodeTask], amounts: Amounts) -> None:
    """Task and code with the five scores."""
    rows = ((i.task, {"prompt": i.task, "response": i.code, **i.scores}) for i in code if i.scores is not None)
    output.rows(
        "reward/",
        rows,
        limits=limits(amounts.reward_rows, amounts.validation_rows),
        fits=lambda row: output.row_tokens(row) <= amounts.row_tokens,
    )


def _write_task_pairs(output: Output, tasks: list[ProceduralTask], amounts: Amounts) -> None:
    """A right answer against a wrong one, with the verifier's scores."""
    rows = [
        (
            task.question,
            {
                "prompt": task.question,
                "chosen": task.answer,
                "rejected": task.wrong.answer,
                "chosen_reward": task.reward,
                "rejected_reward": task.wrong.reward,
                "mistake": task.wrong.mistake,
            },
        )
        for task in reversed(tasks)  # so that few tasks of General SFT come again
    ]
    output.rows(
        "preference/tasks_",
        rows,
        limits=limits(amounts.task_pairs, amounts.validation_rows),
        fits=lambda row: output.row_tokens(row) <= 2 * amounts.row_tokens,
    )


def _write_code_pairs(output: Output, code: list[CodeTask], amounts: Amounts) -> None:
    """Readable code against the same code degraded; their rewards come from the reward model, through `score`."""
    rows = []
    for item in code:
        if output.num_tokens(item.code) <= amounts.response_tokens and (worse := degrade(item.code)):
            rows.append((item.task, {"prompt": item.task, "chosen": item.code, "rejected": worse}))
    output.rows(
        "preference/code_",
        rows,
        limits=limits(amounts.code_pairs, amounts.validation_rows),
        fits=lambda row: (
            output.row_tokens(row) <= 2 * amounts.row_tokens and len(row["rejected"]) < 0.9 * len(row["chosen"])
        ),
    )


def _exchange(prompt: str, response: str) -> Row:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]}
