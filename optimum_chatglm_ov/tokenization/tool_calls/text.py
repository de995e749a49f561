# SPDX-License-Identifier: Apache-2.0
"""Text that is given while it is written, once nothing that follows can change it."""

from __future__ import annotations

from collections.abc import Sequence

from ..messages import PLACEHOLDER, YEAR


def unfinished_mark(text: str, marks: Sequence[str]) -> int:
    """Measures the longest end of `text` with which one of `marks` begins, and which is not all of it."""
    return next(
        (
            length
            for length in range(min(len(text), max(map(len, marks)) - 1), 0, -1)
            if any(len(mark) > length and mark.startswith(text[-length:]) for mark in marks)
        ),
        0,
    )


class MessageText:
    """The texts of an answer's messages, each stripped, with a line break between them."""

    def __init__(self) -> None:
        self._held = ""
        self._has_begun = False  # this message has text
        self._has_text = False  # one of the messages has

    def feed(self, text: str) -> str:
        """Reads more of the message; returns what is certain by now."""
        text = (self._held + text).replace(PLACEHOLDER, YEAR)
        if not self._has_begun:
            text = text.lstrip()
        certain = text[: len(text) - unfinished_mark(text, (PLACEHOLDER,))].rstrip()
        self._held = text[len(certain) :]
        return self._begun(certain)

    def end(self) -> str:
        """Ends the message; returns what was held back of it."""
        text, self._held = self._held.rstrip(), ""
        text = self._begun(text)
        self._has_begun = False
        return text

    def go_on(self) -> None:
        """Notes that what comes next is not the beginning of a message."""
        self._has_begun = self._has_text = True

    def _begun(self, text: str) -> str:
        if not text:
            return ""
        line_break = "\n" if self._has_text and not self._has_begun else ""
        self._has_begun = self._has_text = True
        return line_break + text
