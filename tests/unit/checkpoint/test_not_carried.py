"""What no other format has room for is named before it is left out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from nemo_align.checkpoint.conversion import job
from nemo_align.checkpoint.conversion.convert import convert, open_source
from nemo_align.checkpoint.conversion.job import Settings
from nemo_align.checkpoint.conversion.model import tokens_beyond
from nemo_align.checkpoint.conversion.open_huggingface import open_huggingface
from nemo_align.checkpoint.conversion.to_huggingface import to_huggingface
from nemo_align.checkpoint.conversion.to_megatron import to_megatron
from nemo_align.config.conversion import ConvertConfig
from tests.stage_inputs import StageInputs
from tests.unit.checkpoint.test_conversion_sources import SIZES, write_hf


@pytest.fixture
def chat(stage_inputs: StageInputs, tmp_path: Path) -> Path:
    """A folder with a tokenizer whose ids all have an embedding, or not (SIZES)."""
    folder = write_hf(tmp_path / "hf")
    (folder / "tokenizer.model").write_bytes(stage_inputs.tokenizer.read_bytes())
    return folder


def test_a_chat_template_and_settings_that_are_not_carried_are_named(chat: Path) -> None:
    assert open_huggingface(chat).notes == []
    (chat / "chat_template.jinja").write_text("{{ messages }}")
    settings = {"eos_token_id": [3, 7], "temperature": 0.6, "top_p": 0.9, "transformers_version": "5.0"}
    (chat / "generation_config.json").write_text(json.dumps(settings))
    template, generation = open_huggingface(chat).notes
    assert template == f"{chat}: its chat template is not carried; an export has that of Nemotron-4"
    assert generation.endswith("generation_config.json is not carried: temperature 0.6, top_p 0.9, eos_token_id 7")


def test_our_own_exports_have_nothing_to_name(chat: Path, tmp_path: Path) -> None:
    model = open_huggingface(chat)
    job.carry_out([model], to_megatron(model), tmp_path / "megatron", Settings(workers=1))
    made = open_source(tmp_path / "megatron", "megatron")
    job.carry_out([made], to_huggingface(made), tmp_path / "back", Settings(workers=1))
    assert (tmp_path / "back" / "chat_template.jinja").exists()
    assert open_huggingface(tmp_path / "back").notes == []


def test_tokens_without_an_embedding_are_named(
    chat: Path, stage_inputs: StageInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, count = SIZES["vocab_size"], 601
    assert rows < count
    expected = f"the tokenizer has {count} tokens and the model {rows}: those beyond have no embedding"
    assert [note.partition(": ")[2] for note in tokens_beyond(open_huggingface(chat))] == [expected]
    with caplog.at_level(logging.WARNING, "nemo_align"):
        target = str(tmp_path / "megatron")
        convert(ConvertConfig(source_format="hf", target_format="megatron", source=str(chat), target=target))
    assert expected in caplog.text


def test_a_stopped_conversion_says_where_it_goes_on(
    chat: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_huggingface(chat)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_refuse_changed", interrupted)
    with caplog.at_level(logging.WARNING, "nemo_align"), pytest.raises(KeyboardInterrupt):
        job.carry_out([model], to_megatron(model), tmp_path / "megatron", Settings(workers=1))
    (left,) = tmp_path.glob(".tmp-megatron-*")
    assert f"parts are done and stay in {left}: the same command goes on there" in caplog.text
