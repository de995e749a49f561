# SPDX-License-Identifier: Apache-2.0
"""Pieces, scores and normalisation of a SentencePiece model, read from its file.

The library `sentencepiece` shows neither the table of its normaliser nor the kinds of all pieces, and its own reader
of the file needs protobuf, which it does not bring.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of the message ModelProto


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


@dataclass
class PieceModel:
    """What a SentencePiece model says of itself.

    Attributes:
        pieces: by id.
        charsmap: the table of replacements of its normaliser, empty for none.
        add_dummy_prefix: whether a text gets a blank in front.
        remove_extra_whitespaces: whether blanks at both ends, and all but one of several, are dropped.
    """

    pieces: list[Piece] = field(default_factory=list)
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def normal_pieces(self) -> dict[str, float]:
        """Lists the pieces that text is cut into: their text -> score."""
        return {piece.text: piece.score for piece in self.pieces if piece.kind == NORMAL}


def read_pieces(vocab_file: str | Path) -> PieceModel:
    """Reads a SentencePiece model that `load_sentencepiece` takes."""
    model = PieceModel()
    for number, value in _fields(Path(vocab_file).read_bytes()):
        if number == _PIECES:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            model.pieces.append(Piece(piece[1].decode("utf-8"), score, piece.get(3, NORMAL)))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(value))
            model.charsmap = normalizer.get(2, b"")
            model.add_dummy_prefix = bool(normalizer.get(3, True))
            model.remove_extra_whitespaces = bool(normalizer.get(4, True))
    return model


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields numbers and values of the fields of a protobuf message: integers and bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        result = shift = 0
        while True:
            byte = message[place]
            place += 1
            result |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return result

    while place < len(message):
        key = varint()
        wire_type = key & 7
        if wire_type == _VARINT:
            yield key >> 3, varint()
            continue
        length = varint() if wire_type == _BYTES else {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}[wire_type]
        yield key >> 3, message[place : place + length]
        place += length
