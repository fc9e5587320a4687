"""What goes there and back beside the weights: the stage with its stop tokens, the tokenizer's files, what is noted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_align.checkpoint.conversion.convert import export_hf, import_hf
from nemo_align.checkpoint.conversion.job import Settings, carry_out
from nemo_align.checkpoint.conversion.model import Model
from nemo_align.checkpoint.conversion.open_huggingface import open_huggingface
from nemo_align.checkpoint.conversion.open_megatron import open_megatron
from nemo_align.checkpoint.conversion.to_huggingface import to_huggingface
from nemo_align.checkpoint.conversion.to_megatron import to_megatron
from nemo_align.checkpoint.nemo.open import open_nemo
from nemo_align.checkpoint.store import read_manifest
from nemo_align.data.tokenizer import OUR_CONFIG, load_tokenizer
from nemo_align.data.tokenizer_sentencepiece import SentencePieceTokenizer
from tests.nemo_files import Nemo, write_nemo
from tests.unit.checkpoint.test_conversion_sources import write_hf

TOKENIZER_FILES = {
    "tokenizer.model", OUR_CONFIG, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
}  # fmt: skip


def made(model: Model, path: Path, to: str) -> Path:
    carry_out([model], to_huggingface(model) if to == "hf" else to_megatron(model), path, Settings(workers=1))
    return path


def stops(folder: Path) -> list[int]:
    return json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


@pytest.fixture
def chat(tokenizer: bytes, tmp_path: Path) -> Path:
    """An SFT model as we export it."""
    folder = write_hf(tmp_path / "start")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    model = open_huggingface(folder)
    model.verb, model.step = "sft", 7
    return made(model, tmp_path / "chat", "hf")


def test_a_chat_model_keeps_its_stop(chat: Path, tmp_path: Path) -> None:
    turn_start = load_tokenizer(chat).control_id("<extra_id_1>")
    assert turn_start in stops(chat)
    path = import_hf(chat, tmp_path / "megatron")
    assert (read_manifest(path)["verb"], read_manifest(path)["step"]) == ("sft", 7)
    back = export_hf(path, tmp_path / "back")
    names = {file.name for file in chat.iterdir()}
    assert {file.name for file in back.iterdir()} == names
    for name in names - {"conversion.json", "README.md", "config.json"}:
        assert (back / name).read_bytes() == (chat / name).read_bytes(), name
    card = (back / "README.md").read_text()
    assert "Stage: supervised fine-tuning, step 7." in card and "\n- sft\n" in card


def test_a_chat_model_of_others_keeps_its_stop(chat: Path, tmp_path: Path) -> None:
    """Without our record what ends a text tells it."""
    (chat / "conversion.json").unlink()
    back = export_hf(import_hf(chat, tmp_path / "megatron"), tmp_path / "back")
    assert stops(back) == stops(chat)
    for ends in ([2], 2, [None], "4", [], [[4]], None):
        (chat / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert open_huggingface(chat).verb == "convert", ends
    for text in ("[]", "5"):
        (chat / "generation_config.json").write_text(text)
        assert open_huggingface(chat).verb == "convert"
    (chat / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not JSON"):
        open_huggingface(chat)


@pytest.mark.parametrize(
    "source, expected",
    [
        ({"verb": "preference", "step": 12}, ("preference", 12)),
        ({"verb": "pretrain", "step": "12"}, ("pretrain", 0)),
        ({"verb": "pretrain", "step": -1}, ("pretrain", 0)),
        ({"verb": "convert"}, ("convert", 0)),
        # Not ours: what ends a text decides.
        ({"verb": "rm -rf", "step": 12}, ("sft", 0)),
        ({"verb": ["sft"]}, ("sft", 0)),
        ([], ("sft", 0)),
        (None, ("sft", 0)),
    ],
)
def test_the_record_is_believed_where_it_makes_sense(source: object, expected: tuple, chat: Path) -> None:
    record = json.loads((chat / "conversion.json").read_text()) | {"source": source}
    (chat / "conversion.json").write_text(json.dumps(record))
    for verify in (False, True):
        model = open_huggingface(chat, verify=verify)
        assert (model.verb, model.step) == expected and bool(model.files) == verify


def test_ids_that_only_a_tokenizer_could_carry(chat: Path, tmp_path: Path) -> None:
    bare = write_hf(tmp_path / "bare")
    assert open_huggingface(bare).notes == [
        f"{bare} has no tokenizer: its special token ids are not carried "
        "(bos_token_id 1, eos_token_id 2, pad_token_id 0)"
    ]
    assert open_huggingface(chat).notes == []


@pytest.mark.parametrize("variant", ["base", "instruct", "reward"])
def test_every_road_from_a_nemo_ends_in_the_same_folder(variant: str, tokenizer: bytes, tmp_path: Path) -> None:
    source = write_nemo(tmp_path / "nemo", tokenizer, variant=variant).path
    straight = made(open_nemo(source), tmp_path / "straight", "hf")
    megatron = made(open_nemo(source), tmp_path / "megatron", "megatron")
    through = made(open_megatron(megatron), tmp_path / "through", "hf")
    again = export_hf(import_hf(straight, tmp_path / "again_megatron"), tmp_path / "again")
    names = {file.name for file in straight.iterdir()}
    assert names >= TOKENIZER_FILES
    for folder in (through, again):
        assert {file.name for file in folder.iterdir()} == names
        for name in (*TOKENIZER_FILES, "config.json"):
            assert (folder / name).read_bytes() == (straight / name).read_bytes(), name
        assert isinstance(load_tokenizer(folder), SentencePieceTokenizer)


def test_the_sentencepiece_file_of_an_older_export(nemo: Nemo, tokenizer: bytes, tmp_path: Path) -> None:
    """Read by tokenizer.json, as any folder that is not marked as ours; tokenizer.model goes along."""
    folder = made(open_nemo(nemo.path), tmp_path / "hf", "hf")
    for name in (OUR_CONFIG, "conversion.json"):
        (folder / name).unlink()
    megatron = import_hf(folder, tmp_path / "megatron")
    assert (megatron / "tokenizer" / "tokenizer.model").read_bytes() == tokenizer
    back = export_hf(megatron, tmp_path / "back")
    assert (back / "tokenizer.model").read_bytes() == tokenizer
    assert {file.name for file in folder.iterdir()} <= {file.name for file in back.iterdir()}


def test_what_is_no_sentencepiece_file_stays(nemo: Nemo, tmp_path: Path) -> None:
    """A link may lead to any file of this machine."""
    folder = made(open_nemo(nemo.path), tmp_path / "hf", "hf")
    for name in (OUR_CONFIG, "conversion.json", "tokenizer.model"):
        (folder / name).unlink()
    (tmp_path / "secret").write_text("key")
    (folder / "tokenizer.model").symlink_to(tmp_path / "secret")
    assert not (import_hf(folder, tmp_path / "megatron") / "tokenizer" / "tokenizer.model").exists()


def test_a_card_shows_the_figures_of_its_own_checkpoint(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    paths = [run_dir / "checkpoints" / name for name in ("step_0000004", "step_0000008")]
    for path in paths:
        import_hf(write_hf(tmp_path / path.name), path)
    (run_dir / "config.yaml").write_text("optimizer:\n  lr: 3.0e-07\n")
    result = {"steps": 8, "mfu": 0.41, "last": {"loss": 1.25}, "output": "checkpoints/step_0000008"}
    (run_dir / "result.json").write_text(json.dumps(result))
    cards = [(export_hf(path, tmp_path / f"hf_{path.name}") / "README.md").read_text() for path in paths]
    assert ["| loss (last) | 1.25 |" in card for card in cards] == [False, True]
    assert ["MFU" in card for card in cards] == [False, True]
    assert all("lr: 3.0e-07" in card for card in cards)
    (run_dir / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        export_hf(paths[0], tmp_path / "damaged")
