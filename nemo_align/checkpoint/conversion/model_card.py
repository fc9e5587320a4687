"""README.md of an export: what the model is and how it came about, from the run directory where there is one."""

from __future__ import annotations

import json
import math
from pathlib import Path

from nemo_align.checkpoint.conversion.model import Model
from nemo_align.checkpoint.huggingface.whole_text import REMEDY
from nemo_align.data.tokenizer import Tokenizer
from nemo_align.model.counts import head_dim

STAGES = {  # the verbs that a checkpoint may come of
    "pretrain": "pretraining (next token)",
    "sft": "supervised fine-tuning",
    "reward": "reward model (regression on attributes)",
    "preference": "preference optimisation",
    "convert": "converted weights",
}


def model_card(model: Model, tokenizer: Tokenizer | None, *, dtype: str, joins_across_turns: bool = False) -> str:
    """Markdown with a YAML head. Sizes and stage come from the checkpoint; data, hyper-parameters and metrics from
    config.yaml and result.json of the run that it lies in. `joins_across_turns`: see huggingface/whole_text.py."""
    reward, config = model.reward, model.config
    tags = ["nemotron", "nemo_align", model.verb]
    task = "text-classification" if reward is not None else "text-generation"
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {task}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        "---",
    ]
    lines += ["", f"# {config.name}", "", f"Stage: {STAGES.get(model.verb, model.verb)}, "]
    lines[-1] += f"step {model.step}. Written by nemo_align."
    lines += ["", "## Model", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _sizes(model))]
    lines += [f"| number format | {dtype} |"]
    if tokenizer is not None:
        lines += [f"| tokenizer | {tokenizer.vocab_size:,} tokens |"]
    lines += ["", *(_reward_text(reward) if reward is not None else _policy_text(tokenizer))]
    if joins_across_turns:
        lines += [
            "**A dialogue must not be encoded as one text.** The vocabulary joins newlines with their neighbours, and "
            f"in training they stood apart. {REMEDY}.",
            "",
        ]
    if model.merged is not None:
        lines += _merge_text(model.merged)
    if model.run_dir is not None:
        lines += _run_text(model, model.run_dir)
    return "\n".join(lines) + "\n"


def _sizes(opened: Model) -> list[tuple[str, str]]:
    model = opened.config
    return [
        ("parameters", f"{sum(math.prod(tensor.shape) for tensor in opened.tensors.values()):,}"),
        ("layers", str(model.num_layers)),
        ("hidden size", str(model.hidden_size)),
        ("feed-forward size", str(model.ffn_hidden_size)),
        (
            "attention heads / key-value heads / head size",
            " / ".join(str(value) for value in (model.num_attention_heads, model.num_query_groups, head_dim(model))),
        ),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("context", f"{model.max_sequence_length:,} tokens"),
    ]


def _policy_text(tokenizer: Tokenizer | None) -> list[str]:
    if tokenizer is None:
        return []
    return [
        "The chat template is in `chat_template.jinja`; a turn ends with `<extra_id_1>`. In training no BOS is added.",
        "",
    ]


def _reward_text(reward: dict) -> list[str]:
    lines = [
        "## Scores",
        "",
        "One number per attribute, read at the last token that is not padding (the reward token):",
        "",
    ]
    weights = reward["weights"] or {}
    lines += ["| attribute | weight in the scalar reward |", "|---|---|"]
    lines += [f"| {name} | {weights.get(name, '')} |" for name in reward["attributes"]]
    folded = (
        " `score` has no bias: the trained one stands in the final norm's, and `reward_head.safetensors` keeps the "
        "head as trained."
    )
    lines += ["", "Load it in float32 for the exact scores." + (folded if reward["head_bias"] else ""), ""]
    return lines


def _merge_text(merged: dict) -> list[str]:
    how = f"slerp at {merged['t']:g}" if merged["method"] == "slerp" else merged["method"]
    weights = [f", weight {weight:.6g}" for weight in merged.get("weights", [])] or [""] * len(merged["paths"])
    sources = [f"- `{path}`{weight}" for path, weight in zip(merged["paths"], weights, strict=True)]
    return ["## Merged", "", f"Made by `nemo-align merge` ({how}) of:", "", *sources, ""]


def _run_text(model: Model, run_dir: Path) -> list[str]:
    lines = []
    # A run's figures are those of its last checkpoint: shown for an earlier one they would praise what it is not.
    if (result := _result(run_dir)) and result.get("output") == model.path.relative_to(run_dir).as_posix():
        lines += ["## Training", "", "| | |", "|---|---|"]
        names = {"experiment": "experiment", "steps": "steps", "examples": "examples", "tokens": "tokens"}
        names |= {"train_seconds": "training seconds", "mfu": "MFU (real tokens)", "peak_source": "MFU peak from"}
        lines += [f"| {label} | {_shown(result[key])} |" for key, label in names.items() if result.get(key) is not None]
        for when in ("first", "last"):
            for name, value in (result.get(when) or {}).items():
                lines.append(f"| {name} ({when}) | {_shown(value)} |")
        lines.append("")
    if (path := run_dir / "config.yaml").is_file():
        config = path.read_text(encoding="utf-8").rstrip()
        lines += ["<details><summary>Configuration of the run: data and hyper-parameters</summary>", ""]
        lines += ["```yaml", config, "```", "", "</details>", ""]
    return lines


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _result(run_dir: Path) -> dict:
    """result.json; empty where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = run_dir / "result.json"
    if not path.is_file():
        return {}
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to export without the run's figures") from None
    return result if isinstance(result, dict) else {}
