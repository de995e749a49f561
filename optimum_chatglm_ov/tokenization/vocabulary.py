# SPDX-License-Identifier: Apache-2.0
"""Reads the vocabulary files of ChatGLM: SentencePiece models (v1 to v3) and tiktoken-style ranks (GLM-4)."""

from __future__ import annotations

import base64
import binascii
import os
import re

import sentencepiece

from ..errors import ChatGLMError


_FIRST_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_LFS_POINTER = b"version https://git-lfs"


class TokenizerError(ChatGLMError, ValueError):
    """A vocabulary file or a tokenizer argument cannot be used."""


def vocabulary_format(vocab_file: str | os.PathLike) -> str:
    """Tells `"sentencepiece"` from `"ranks"` by the first bytes of the file.

    Raises:
        TokenizerError: the file is neither, is empty, or is a Git LFS pointer.
    """
    with open(vocab_file, "rb") as file:
        head = file.read(4096)
    if _FIRST_RANK_LINE.match(head):
        return "ranks"
    if head[:1] == b"\n":  # the first field of a SentencePiece model, a list of pieces
        return "sentencepiece"
    if head.startswith(_LFS_POINTER):
        found = "a Git LFS pointer; the file itself was not downloaded (run `git lfs pull`, or download it again)"
    else:
        found = f"it begins with {head[:16]!r}" if head else "it is empty"
    raise TokenizerError(
        f"{vocab_file} is not a ChatGLM vocabulary: {found}. Expected a SentencePiece model (ChatGLM, ChatGLM2, "
        "ChatGLM3) or a list of base64 tokens and ranks (GLM-4). Download it again from the original repository."
    )


def load_sentencepiece(vocab_file: str | os.PathLike) -> sentencepiece.SentencePieceProcessor:
    """Loads a vocabulary; raises `TokenizerError` unless `vocab_file` is a complete SentencePiece model."""
    found = vocabulary_format(vocab_file)
    if found != "sentencepiece":
        raise TokenizerError(
            f"{vocab_file} is a GLM-4 list of ranks; expected a SentencePiece model. Load it with ChatGLM4Tokenizer."
        )
    with open(vocab_file, "rb") as file:
        serialized = file.read()
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(serialized)
    except RuntimeError as error:
        raise TokenizerError(
            f"{vocab_file} ({len(serialized)} bytes) is not a complete SentencePiece model: {error}. "
            "Download it again from the original repository."
        ) from error
    return model


def load_ranks(vocab_file: str | os.PathLike) -> dict[bytes, int]:
    """Reads the id of each token by its bytes, from lines of a base64 token, a blank and the id.

    Raises:
        TokenizerError: a line has another form, or the ids are not 0, 1, 2, ... without a gap.
    """
    if vocabulary_format(vocab_file) != "ranks":
        raise TokenizerError(
            f"{vocab_file} is a SentencePiece model; expected the list of ranks of GLM-4. Load it with "
            "ChatGLMTokenizer."
        )
    ranks: dict[bytes, int] = {}
    with open(vocab_file, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error) as error:
                raise TokenizerError(
                    f"{vocab_file}, line {number}: found {line[:40]!r}, expected a base64 token, a blank and its "
                    "rank. Download the file again from the original repository."
                ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(
            f"{vocab_file}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}; lines are missing or "
            "repeated. Download the file again from the original repository."
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(
            f"{vocab_file} has no token for {len(missing)} of the 256 bytes; it is truncated. Download it again from "
            "the original repository."
        )
    return ranks


def whole_characters(text: str) -> str:
    """Puts surrogate pairs in `text` together; a lone half, which no encoding has, becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
