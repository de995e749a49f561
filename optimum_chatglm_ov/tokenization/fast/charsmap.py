# SPDX-License-Identifier: Apache-2.0
"""SentencePiece's table of replacements, in terms of the normalisers that `tokenizers` has.

The table is that of NFKC with exceptions: characters that are dropped or become blanks, one that stays (U+FF5E, the
full-width tilde), and those of newer versions of Unicode than the library's. `tokenizers` can take such a table as it
is, but then it looks at clusters of characters and loses the marks that follow a replaced character.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence

from tokenizers import Regex, normalizers


# Stand in for characters that NFKC would change; Unicode has no characters there, and never will.
_FIRST_STAND_IN, _STAND_INS = 0xFDE0, 16
_END_OF_KEY, _LABEL, _LEAF = (1 << 31) - 1, (1 << 31) | 0xFF, 1 << 8


def charsmap_normalizers(
    charsmap: bytes, line_breaks: Sequence[normalizers.Normalizer]
) -> list[normalizers.Normalizer]:
    """Makes normalisers that replace characters as the table `charsmap` says.

    Args:
        charsmap: of the SentencePiece model.
        line_breaks: normalisers that replace line breaks and tabs, of which the table makes blanks.
    """
    by_target: dict[str | None, list[str]] = {}
    for character, replacement in _exceptions(charsmap):
        by_target.setdefault(replacement if replacement != character else None, []).append(character)
    kept = by_target.pop(None, [])[:_STAND_INS]
    stand_ins = {character: chr(_FIRST_STAND_IN + place) for place, character in enumerate(kept)}
    # NFKC must not put together what a dropped character kept apart
    after = [normalizers.Replace(one_of(by_target.pop(target)), target) for target in ("", " ") if target in by_target]
    return [
        *(normalizers.Replace(character, stand_in) for character, stand_in in stand_ins.items()),
        *(normalizers.Replace(one_of(characters), target) for target, characters in by_target.items()),
        normalizers.NFKC(),
        *(normalizers.Replace(stand_in, character) for character, stand_in in stand_ins.items()),
        *line_breaks,
        *after,
    ]


def one_of(characters: Sequence[str]) -> Regex:
    """Makes a pattern that matches each of these characters."""
    return Regex("[" + "".join(f"\\x{{{ord(character):04X}}}" for character in characters) + "]")


@functools.lru_cache(maxsize=2)
def _exceptions(charsmap: bytes) -> tuple[tuple[str, str], ...]:
    """Finds the single characters that NFKC treats otherwise, and what becomes of them."""
    table = dict(_single_characters(charsmap))
    nfkc = normalizers.NFKC()
    codes = [code for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000 and code != ord("\n")]
    found = []
    for start in range(0, len(codes), 4096):
        block = [chr(code) for code in codes[start : start + 4096]]
        for character, normalized in zip(block, nfkc.normalize_str("\n".join(block)).split("\n")):
            replacement = table.get(character, character)
            if replacement != normalized:
                found.append((character, replacement))
    return tuple(found)


def _single_characters(charsmap: bytes) -> Iterator[tuple[str, str]]:
    """Yields the entries of the table whose key is one character.

    The table is a double-array trie of UTF-8 and a pool of texts, each ended by a zero byte.
    """
    if not charsmap:
        return
    (size,) = struct.unpack_from("<I", charsmap)
    units = struct.unpack_from(f"<{size // 4}I", charsmap, 4)
    pool = charsmap[4 + size :]

    def children(node: int, labels: range) -> Iterator[tuple[int, int]]:
        base = _children_of(node, units)
        for byte in labels:
            if base ^ byte < len(units) and units[base ^ byte] & _LABEL == byte:
                yield byte, base ^ byte

    def entries(node: int, key: bytes, missing: int) -> Iterator[tuple[str, str]]:
        if missing:
            for byte, child in children(node, range(0x80, 0xC0)):
                yield from entries(child, key + bytes([byte]), missing - 1)
        elif units[node] & _LEAF:
            start = units[_children_of(node, units)] & _END_OF_KEY
            yield key.decode("utf-8"), pool[start : pool.index(0, start)].decode("utf-8")

    for byte, child in children(0, range(1, 0xF5)):
        length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
        yield from entries(child, bytes([byte]), length - 1)


def _children_of(node: int, units: Sequence[int]) -> int:
    unit = units[node]
    return node ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6))
