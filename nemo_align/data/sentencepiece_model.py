"""Two edits of a serialized SentencePiece model that leave every piece and id as it is.

SentencePiece matches USER_DEFINED pieces in any text. A user who writes `<extra_id_1>Assistant` would so open a turn of
his own. CONTROL pieces are never matched, so text is encoded with a copy of the model in which the control tokens are
CONTROL. Only these few bytes of the protobuf change (sentencepiece_model.proto, field numbers below), which needs no
protobuf package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# Pieces that mean something to a template. Other user-defined pieces (runs of spaces, HTML tags) stay as they are.
CONTROL_TOKEN = re.compile(
    r"<extra_id_\d+>|<\|[^|<>\s]+\|>|</?s>|<(pad|unk|bos|eos|mask|cls|sep|start_of_turn|end_of_turn)>|"
    r"\[/?(INST|SYS|PAD|BOS|EOS|CLS|SEP|MASK)\]|<SPECIAL_\d+>"
)

_PIECES = 1  # ModelProto.pieces, repeated message
_PIECE_TEXT, _PIECE_TYPE = 1, 3  # SentencePiece.piece, SentencePiece.type
_TYPE_CONTROL, _TYPE_USER_DEFINED = 3, 4
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
# ModelProto.normalizer_spec (3) { add_dummy_prefix (3): false }. A second message of a field merges into the first.
_NO_DUMMY_PREFIX = bytes([3 << 3 | _BYTES, 2, 3 << 3 | _VARINT, 0])


def controls_never_in_text(model: bytes) -> bytes:
    """The model with every USER_DEFINED piece that CONTROL_TOKEN matches turned CONTROL."""
    parts = []
    for number, start, value_start, end in _fields(model):
        piece = model[value_start:end]
        if number == _PIECES and _is_user_defined_control(piece):
            piece += bytes([_PIECE_TYPE << 3 | _VARINT, _TYPE_CONTROL])  # the last value of a field counts
            parts.append(bytes([_PIECES << 3 | _BYTES]) + _varint(len(piece)) + piece)
        else:
            parts.append(model[start:end])
    return b"".join(parts)


def without_dummy_prefix(model: bytes) -> bytes:
    """The model that puts no space before a text: for texts that follow something."""
    return model + _NO_DUMMY_PREFIX


def _is_user_defined_control(piece: bytes) -> bool:
    text, kind = b"", 1
    for number, _, value_start, end in _fields(piece):
        if number == _PIECE_TEXT:
            text = piece[value_start:end]
        elif number == _PIECE_TYPE:
            kind = _read_varint(piece, value_start)[0]
    return kind == _TYPE_USER_DEFINED and CONTROL_TOKEN.fullmatch(text.decode("utf-8")) is not None


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(field number, start of the field, start of its value, end) of each field."""
    position = 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position)
        wire = key & 7
        if wire == _BYTES:
            length, position = _read_varint(message, position)
            end = position + length
        elif wire == _VARINT:
            end = _read_varint(message, position)[1]
        elif wire in (_FIXED32, _FIXED64):
            end = position + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"not a SentencePiece model: wire type {wire} at byte {start}")
        if end > len(message):
            raise ValueError(f"not a whole SentencePiece model: it ends inside the field at byte {start}")
        yield key >> 3, start, position, end
        position = end


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data):
            raise ValueError("not a whole SentencePiece model: it ends inside a number")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
