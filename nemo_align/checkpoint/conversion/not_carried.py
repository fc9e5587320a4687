"""What a Hugging Face folder says beside its weights and tokens that no other format has room for.

An export writes Nemotron-4's chat template and the stops of our stages; what stood there before is named, not lost in
silence.
"""

from __future__ import annotations

import json
from pathlib import Path

from nemo_align.checkpoint.conversion.origin import GENERATION_CONFIG, generation_settings
from nemo_align.checkpoint.huggingface.tokenizer_files import CHAT_TEMPLATE_FILE
from nemo_align.data.chat_template import CHAT_TEMPLATE_JINJA, REWARD_CHAT_TEMPLATE_JINJA, TURN_START
from nemo_align.data.tokenizer import load_tokenizer

_OF_THE_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config")


def not_carried(folder: Path) -> list[str]:
    """Notes on the chat template and the generation settings of a folder that has a tokenizer.

    Raises:
        ValueError: generation_config.json is damaged.
    """
    notes = []
    if (template := _template(folder)) and template not in (CHAT_TEMPLATE_JINJA, REWARD_CHAT_TEMPLATE_JINJA):
        notes.append(f"{folder}: its chat template is not carried; an export has that of Nemotron-4")
    settings = generation_settings(folder)
    lost = [f"{key} {value}" for key, value in settings.items() if key not in _OF_THE_TOKENIZER]
    if stops := _stops_beyond(folder, settings.get("eos_token_id")):
        lost.append(f"eos_token_id {', '.join(map(str, stops))}")
    if lost:
        notes.append(f"{folder / GENERATION_CONFIG} is not carried: {', '.join(lost)}")
    return notes


def _template(folder: Path) -> str | None:
    path = folder / CHAT_TEMPLATE_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    config = folder / "tokenizer_config.json"
    try:
        found = json.loads(config.read_bytes())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # those who need the file say what is wrong
        return None
    return found if isinstance(found, str) else None


def _stops_beyond(folder: Path, ids: object) -> list[int]:
    """Ids that end a text there and are neither the tokenizer's end nor the start of a turn."""
    found = ids if isinstance(ids, list) else [ids]
    found = [stop for stop in found if type(stop) is int]
    if not found:
        return []
    tokenizer = load_tokenizer(folder)
    return [stop for stop in found if stop not in (tokenizer.eos_id, tokenizer.find_control_id(TURN_START))]
