"""The tokenizer of a `.nemo`: the SentencePiece file that its configuration names."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_align.checkpoint.streaming.locations import Extent, Files

_SCHEME = "nemo:"
_LARGEST = 64 << 20  # of a SentencePiece file; those of Nemotron-4 have 4.55 MB


@dataclass(frozen=True)
class FoundTokenizer:
    """A SentencePiece file and its number of tokens."""

    extent: Extent
    vocab_size: int


def find_tokenizer(values: dict, files: Files) -> tuple[FoundTokenizer | None, list[str]]:
    """The tokenizer that `tokenizer.model` of the configuration names (`tokenizer_model` where that is missing), and
    what to tell the user.

    Raises:
        ValueError: a file that is named and not there, or is no SentencePiece model.
    """
    described = values.get("tokenizer")
    if not isinstance(described, dict):
        return None, ["the configuration names no tokenizer: the result has none"]
    library = described.get("library")
    if library != "sentencepiece":
        return None, [f"the tokenizer's library is {library!r}, only sentencepiece is read: the result has none"]
    named = {key: described.get(key) for key in ("model", "tokenizer_model") if described.get(key)}
    if not named:
        return None, ["the configuration names no SentencePiece file: the result has no tokenizer"]
    found = {key: _find(str(value), key, files) for key, value in named.items()}
    extent = found.get("model") or found.get("tokenizer_model")
    assert extent is not None
    notes = []
    if len(found) == 2 and found["model"].read() != found["tokenizer_model"].read():
        notes.append("tokenizer.model and tokenizer.tokenizer_model differ: the first is used")
    return FoundTokenizer(extent, _vocab_size(extent, named)), notes


def _find(value: str, key: str, files: Files) -> Extent:
    name = value.removeprefix(_SCHEME)
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{files.root}: tokenizer.{key} is {value!r}, the name of a file in the .nemo expected")
    extent = files.find(name)
    if extent is None:
        raise ValueError(f"{files.root}: tokenizer.{key} names {name}, which is not there: the copy is not whole")
    if extent.num_bytes > _LARGEST:
        raise ValueError(f"{files.root}/{name} has {extent.num_bytes:,} bytes: that is no tokenizer")
    return extent


def _vocab_size(extent: Extent, named: dict) -> int:
    from sentencepiece import SentencePieceProcessor

    what = f"the tokenizer {next(iter(named.values()))} is no SentencePiece model"
    content = extent.read()
    if not content:  # which the library takes for none given
        raise ValueError(f"{what}: it is empty")
    try:
        return SentencePieceProcessor(model_proto=content).vocab_size()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from None
