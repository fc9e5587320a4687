"""TRL's DPOTrainer, run as its users run it: train() on conversational rows, a copy of the weights as reference."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.parity.start_model import load_policy


@dataclass
class TrlRun:
    """What TRL logged at each step, its gradients before each optimizer step, its weights at the end, its tokens."""

    logged: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    tokens: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)  # prompt, chosen, rejected

    def values(self, name: str) -> list[float]:
        """One metric, step by step."""
        return [record[name] for record in self.logged]


@mock.patch.dict(os.environ)  # accelerate leaves variables behind
def train_dpo(start: Path, rows: list[dict], output: Path, **settings: Any) -> TrlRun:
    """Train in fp32 on the CPU, on `rows` in their order; `settings` are DPOConfig's."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    run = TrlRun()

    class InOrder(DPOTrainer):
        """The trainer without shuffling."""

        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(train_dataset or self.train_dataset)

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            run.gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})

    model = load_policy(start)
    trainer = InOrder(
        model=model,
        ref_model=load_policy(start),
        args=DPOConfig(
            output_dir=str(output),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            lr_scheduler_type="constant",
            max_grad_norm=1e9,  # nothing is clipped, and the norm is logged
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
        callbacks=[Gradients()],
    )
    trainer.remove_callback(PrinterCallback)
    columns = [trainer.train_dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    run.tokens = list(zip(*columns, strict=True))
    trainer.train()
    run.logged = [record for record in trainer.state.log_history if "loss" in record]
    run.weights = {name: p.detach() for name, p in model.named_parameters()}
    return run
