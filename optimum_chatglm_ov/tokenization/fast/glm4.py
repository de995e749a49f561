# SPDX-License-Identifier: Apache-2.0
"""The tokenizers of GLM-4 and CodeGeeX4 for `tokenizers`: byte-pair merges of bytes, ranked."""

from __future__ import annotations

import re

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ..glm4 import PATTERN, ChatGLM4Tokenizer


def build(tokenizer: ChatGLM4Tokenizer) -> Tokenizer:
    """Builds a tokenizer of `tokenizers` with the ids and texts of `tokenizer`."""
    ranks = tokenizer.mergeable_ranks
    names = {token: byte_level_name(token) for token in ranks}
    merges = [
        (names[token[:cut]], names[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    added = [token for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    # where a control token meets something, a blank comes between, as in the original
    control = "|".join(re.escape(token.content) for token in added)
    between = Regex(rf"(?<={control})(?=[\s\S])|(?<=[\s\S])(?={control})")
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Replace(between, " ")])
    prefix = ["[gMASK]", "<sop>"]
    backend.post_processor = processors.TemplateProcessing(
        single=[*prefix, "$A"],
        pair=[*prefix, "$A", "$B"],
        special_tokens=list(zip(prefix, tokenizer.get_prefix_tokens())),
    )
    return backend


def _alphabet() -> list[str]:
    """Lists the character that stands for each byte, in their order: the byte's own where that can be seen."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


_ALPHABET = _alphabet()


def byte_level_name(token: bytes) -> str:
    """Names a token of bytes: each byte as one character, the form of byte-level tokenizers."""
    return "".join(_ALPHABET[byte] for byte in token)
