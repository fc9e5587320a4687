"""What a SentencePiece file says besides its pieces: kind of model, normalisation, pieces matched in any text.

Read from the protobuf itself (sentencepiece_model.proto, field numbers below); the Python package does not tell.
"""

from __future__ import annotations

from dataclasses import dataclass

# The walker over a protobuf's fields; the data room edits the same file with it.
from nemo_align.data.sentencepiece_model import _fields, _read_varint

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # ModelProto
_PIECE_TYPE, _USER_DEFINED = 3, 4  # SentencePiece.type
_MODEL_TYPE, _UNIGRAM, _BPE = 3, 1, 2  # TrainerSpec.model_type
_CHARACTER_MAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 2, 3, 4  # NormalizerSpec


@dataclass(frozen=True)
class SentencePieceRules:
    """Settings of a SentencePiece model."""

    is_unigram: bool  # else BPE
    character_map: bytes  # compiled normalisation, empty for identity
    adds_space_before: bool  # puts a space before every text
    removes_extra_spaces: bool
    user_defined: frozenset[int]  # ids of pieces that are matched whole wherever they stand in a text


def read_rules(model: bytes) -> SentencePieceRules:
    """The settings in a serialized model.

    Raises:
        ValueError: not a SentencePiece model, or one of words or characters, which has no fast counterpart.
    """
    model_type, character_map, prefix, squeeze = _UNIGRAM, b"", True, True  # the format's defaults
    user_defined = set()
    token_id = 0
    for number, _, begin, end in _fields(model):
        message = model[begin:end]
        if number == _PIECES:
            if _last_number(message, _PIECE_TYPE, 1) == _USER_DEFINED:
                user_defined.add(token_id)
            token_id += 1
        elif number == _TRAINER:
            model_type = _last_number(message, _MODEL_TYPE, model_type)
        elif number == _NORMALIZER:
            prefix = bool(_last_number(message, _ADD_DUMMY_PREFIX, prefix))
            squeeze = bool(_last_number(message, _REMOVE_EXTRA_WHITESPACES, squeeze))
            for field, _, start, stop in _fields(message):
                if field == _CHARACTER_MAP:
                    character_map = message[start:stop]
    if model_type not in (_UNIGRAM, _BPE):
        raise ValueError("the SentencePiece model is one of words or characters; only BPE and unigram can be exported")
    return SentencePieceRules(model_type == _UNIGRAM, character_map, prefix, squeeze, frozenset(user_defined))


def _last_number(message: bytes, wanted: int, default: int) -> int:
    """An integer field: the last occurrence counts, as protobuf says."""
    value = default
    for number, _, begin, _end in _fields(message):
        if number == wanted:
            value = _read_varint(message, begin)[0]
    return value
