"""generation_config.json: how a text begins, what ends it, and what fills a batch."""

from __future__ import annotations

from nemo_align.data.chat_template import TURN_START
from nemo_align.data.tokenizer import Tokenizer

_CHAT_VERBS = ("sft", "preference")  # their models end a turn with the token that opens the next


def generation_config(tokenizer: Tokenizer, verb: str) -> dict[str, int | list[int]]:
    """The values of the file for a model that the stage `verb` made."""
    stops = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    turn_start = tokenizer.find_control_id(TURN_START)
    if verb in _CHAT_VERBS and turn_start is not None:
        stops.append(turn_start)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
    return {key: value for key, value in ids.items() if value is not None and value != []}  # 0 is an id
