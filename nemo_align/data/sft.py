"""Dialogues for supervised fine-tuning: every assistant turn is learnt, once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from nemo_align.config.data import RowsConfig, SftDataConfig
from nemo_align.data.bad_rows import BadRows
from nemo_align.data.cache_key import cache_key, common_settings
from nemo_align.data.chat import Dialogue, RowError
from nemo_align.data.chat_template import ChatTemplate
from nemo_align.data.overlong import check_policy, fit_turns, too_long
from nemo_align.data.preparation import converted_rows
from nemo_align.data.tokenized_rows import TokenizedRows, open_or_build
from nemo_align.data.tokenized_rows_writer import TokenizedRowsWriter
from nemo_align.data.tokenizer import Tokenizer


def tokenize_sft(
    config: SftDataConfig, rows: Mapping[str, RowsConfig], tokenizer: Tokenizer, *, cache_dir: str | Path, seed: int
) -> TokenizedRows:
    """One sequence per dialogue, one after another in the order of `rows`; opened if `cache_dir` has it already.

    ValueError: a malformed row (file, line, field), an over-long one under `overlong=error`, or no row left.
    """
    check_policy(config.overlong, config.sequence_length)
    template = ChatTemplate(tokenizer, config.default_system)
    key = cache_key("sft", rows, tokenizer.fingerprint, common_settings(config, rows, seed), Path(cache_dir))

    def build(writer: TokenizedRowsWriter) -> Mapping[str, int]:
        counts: Counter[str] = Counter(rows=0, kept=0, dropped_overlong=0, truncated=0)
        bad = BadRows(config.bad_rows, writer)
        for origin, (dialogue,), reject in converted_rows(rows, ("dialogue",), counts, bad, seed=seed):
            assert isinstance(dialogue, Dialogue)
            try:
                sequence = _sequence(dialogue, template, config, counts)
            except RowError as error:
                reject(error)
                continue
            if sequence is not None:
                writer.add([sequence], origin=origin)
                counts["kept"] += 1
        return counts | bad.counts()

    return open_or_build(Path(cache_dir), kind="sft", fingerprint=key, segments=1, build=build, sources=list(rows))


def _sequence(
    dialogue: Dialogue, template: ChatTemplate, config: SftDataConfig, counts: Counter[str]
) -> tuple[list[int], list[bool]] | None:
    """(tokens, loss mask), shortened if need be; None if dropped. The last exchange always stays whole."""
    last = max(number for number, message in enumerate(dialogue.messages) if message.role == "assistant")
    turns = template.turns(dialogue.messages[: last + 1])
    tokens, mask = template.dialogue(turns)
    if len(tokens) > config.sequence_length:
        if config.overlong == "error":
            raise too_long(len(tokens), config.sequence_length, truncated=False)
        shorter = None
        if config.overlong == "truncate":
            stop_token = 1
            shorter = fit_turns(
                turns,
                limit=config.sequence_length,
                keep=2,
                length=lambda some: sum(map(len, some)) + stop_token,
            )
        if shorter is None:
            counts["dropped_overlong"] += 1
            return None
        counts["truncated"] += 1
        tokens, mask = template.dialogue(shorter)
    assert any(mask) and len(tokens) <= config.sequence_length
    return tokens, mask
