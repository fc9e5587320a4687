"""What a Hugging Face folder tells of the stage that made its model: on the way back it must not be forgotten.

The stage decides what ends a text (generation_config.json), and a chat model without that stop runs on.
"""

from __future__ import annotations

import json
from pathlib import Path

from nemo_align.checkpoint.conversion.model_card import STAGES
from nemo_align.data.chat_template import TURN_START
from nemo_align.data.tokenizer import load_tokenizer

GENERATION_CONFIG = "generation_config.json"


def made_by(folder: Path, record: dict | None, *, is_reward: bool, has_tokenizer: bool) -> tuple[str, int]:
    """(stage, step): from `record`, our conversion.json, else from what ends a text, else ("convert", 0).

    Raises:
        ValueError: generation_config.json or the tokenizer is damaged.
    """
    source = None if record is None else record["source"]
    if isinstance(source, dict) and source.get("verb") in list(STAGES):  # a list: what JSON holds may not hash
        step = source.get("step")
        return source["verb"], step if type(step) is int and step >= 0 else 0
    if is_reward:
        return "reward", 0
    stops = generation_settings(folder).get("eos_token_id") if has_tokenizer else None
    if not isinstance(stops, list):
        return "convert", 0
    turn_start = load_tokenizer(folder).find_control_id(TURN_START)
    return ("convert" if turn_start is None or turn_start not in stops else "sft"), 0


def generation_settings(folder: Path) -> dict:
    """The values of generation_config.json; empty where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): download it again, or remove it") from None
    return values if isinstance(values, dict) else {}
