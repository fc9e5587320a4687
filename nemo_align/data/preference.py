"""Pairs of responses for DPO, IPO and RPO: two sequences that share their prompt tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from nemo_align.config.data import ChatDataConfig, PreferenceDataConfig, RowsConfig
from nemo_align.data.bad_rows import BadRows
from nemo_align.data.cache_key import cache_key, common_settings
from nemo_align.data.chat import Pair, RowError
from nemo_align.data.chat_template import ChatTemplate, Turn
from nemo_align.data.overlong import check_policy, fit_turns, too_long
from nemo_align.data.preparation import converted_rows
from nemo_align.data.selection import Selection
from nemo_align.data.tokenized_rows import TokenizedRows, open_or_build
from nemo_align.data.tokenized_rows_writer import TokenizedRowsWriter
from nemo_align.data.tokenizer import Tokenizer

MISSING = float("nan")


def tokenize_preference(
    config: PreferenceDataConfig,
    rows: Mapping[str, RowsConfig],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | Path,
    seed: int,
    preference_loss: str,
) -> TokenizedRows:
    """Two segments per pair, chosen then rejected; targets "chosen_reward" and "rejected_reward" [N], NaN if absent.

    `preference_loss` decides whether rewards are needed and what `select.ties=auto` means. Held-out pairs go through
    the same selection.
    """
    check_policy(config.overlong, config.sequence_length)
    template = ChatTemplate(tokenizer, config.default_system)
    selection = Selection(config.select, preference_loss)
    settings = common_settings(config, rows, seed) | {
        "select": asdict(config.select),
        "drops_ties": selection.drops_ties,
        "needs_rewards": selection.needs_rewards is not None,
        "identical": "wrong",  # other than in caches of earlier versions, which left such pairs out unsaid
    }
    key = cache_key("preference", rows, tokenizer.fingerprint, settings, Path(cache_dir))

    def build(writer: TokenizedRowsWriter) -> Mapping[str, int]:
        counts: Counter[str] = Counter(rows=0, kept=0, dropped_overlong=0, truncated=0, dropped_ties=0)
        bad = BadRows(config.bad_rows, writer)
        for origin, (pair,), reject in converted_rows(rows, ("pair",), counts, bad, seed=seed):
            assert isinstance(pair, Pair)
            of_row: Counter[str] = Counter()  # a row that is rejected is counted as that alone
            try:
                chosen_pair = selection.apply(pair, of_row)
                sequences = None if chosen_pair is None else _sequences(chosen_pair, template, config, of_row)
            except RowError as error:
                reject(error)
                continue
            counts.update(of_row)
            if chosen_pair is None or sequences is None:
                continue
            rewards = {
                "chosen_reward": MISSING if chosen_pair.chosen_reward is None else chosen_pair.chosen_reward,
                "rejected_reward": MISSING if chosen_pair.rejected_reward is None else chosen_pair.rejected_reward,
            }
            writer.add(sequences, origin=origin, targets=rewards)
            counts["kept"] += 1
        return counts | bad.counts()

    return open_or_build(
        Path(cache_dir),
        kind="preference",
        fingerprint=key,
        segments=2,
        build=build,
        sources=list(rows),
        targets={"chosen_reward": None, "rejected_reward": None},
    )


def _sequences(
    pair: Pair, template: ChatTemplate, config: ChatDataConfig, counts: Counter[str]
) -> list[tuple[list[int], list[bool]]] | None:
    """(tokens, loss mask) of chosen and rejected, both after the same prompt; None if dropped.

    Responses stay whole and the prompt is cut alike for both, else the comparison would be of something else.
    """
    responses = [template.response(text) for text in (pair.chosen, pair.rejected)]
    stop_token = 1
    longest = max(map(len, responses)) + stop_token
    turns: list[Turn] = template.turns(pair.messages)
    prompt = template.prompt(turns)
    if len(prompt) + longest > config.sequence_length:
        if config.overlong == "drop":
            counts["dropped_overlong"] += 1
            return None
        if config.overlong == "error":
            raise too_long(len(prompt) + longest, config.sequence_length, truncated=False)
        shorter = fit_turns(
            turns, limit=config.sequence_length - longest, keep=1, length=lambda some: len(template.prompt(some))
        )
        if shorter is None:
            raise too_long(len(prompt) + longest, config.sequence_length, truncated=True)
        counts["truncated"] += 1
        prompt = template.prompt(shorter)
    return [template.prompt_and_response(prompt, response) for response in responses]
