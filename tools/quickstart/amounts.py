"""How much of everything is written, so that the whole recipe trains about 3 million tokens (table: README.md)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """Upper bounds of what each file holds; `_tokens` count the tokenizer's, the others rows of training."""

    wikipedia_pages: int = 1000
    code_tasks: int = 10_000  # that are read
    english_tokens: int = 800_000
    multilingual_tokens: int = 400_000
    code_tokens: int = 400_000
    held_out_tokens: int = 16_000  # of each validation set of pretraining
    held_out_document_tokens: int = 2_000  # so that a set holds several pages
    qa_tokens: int = 150_000
    code_sft_rows: int = 1100
    general_sft_dialogues: int = 900
    general_sft_tasks: int = 1700
    reward_rows: int = 1400
    task_pairs: int = 900
    code_pairs: int = 500
    validation_rows: int = 96  # of each set of rows
    row_tokens: int = 512  # longer rows are left out
    response_tokens: int = 240  # of the code in a pair: both responses stay in one micro-batch
    tokenizer_characters: int = 3_000_000

    def small(self) -> Amounts:
        """A fortieth of everything that takes time: for tests."""
        scaled = {field.name: max(1, getattr(self, field.name) // 40) for field in fields(self)}
        small = replace(self, **scaled)
        return replace(
            small,
            wikipedia_pages=40,
            code_tasks=400,
            held_out_tokens=2_000,
            held_out_document_tokens=2_000,
            validation_rows=8,
            row_tokens=self.row_tokens,
            response_tokens=self.response_tokens,
            tokenizer_characters=600_000,
        )
