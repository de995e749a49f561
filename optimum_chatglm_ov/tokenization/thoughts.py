# SPDX-License-Identifier: Apache-2.0
"""What a model thinks before it answers, as GLM-Z1 does: `<think>`, the thought, `</think>`, the answer."""

from __future__ import annotations

from .tool_calls.text import unfinished_mark


BEGIN_OF_THOUGHT, END_OF_THOUGHT = "<think>", "</think>"


def without_thought(text: str) -> str:
    """Returns the text of an answer without a thought that has ended."""
    _, ended, answer = text.partition(END_OF_THOUGHT)
    return "\n" + answer.lstrip("\n") if ended else text


class ThoughtReader:
    """Parts thought and answer of a text that comes in pieces; without a thought all is answer.

    Args:
        prompt: how it ends tells whether the thought has begun there.
    """

    def __init__(self, prompt: str):
        self._is_thinking = prompt.rstrip().endswith(BEGIN_OF_THOUGHT)
        self._may_begin, self._held = not self._is_thinking, ""

    def feed(self, text: str, is_last: bool = False) -> tuple[str, str]:
        """Returns the thought and the answer in what is certain by now."""
        text = self._held + text
        self._held = ""
        if self._may_begin:
            begun = text.lstrip()
            if not is_last and len(begun) < len(BEGIN_OF_THOUGHT) and BEGIN_OF_THOUGHT.startswith(begun):
                self._held = text
                return "", ""
            self._may_begin, self._is_thinking = False, begun.startswith(BEGIN_OF_THOUGHT)
            text = begun.removeprefix(BEGIN_OF_THOUGHT) if self._is_thinking else text
        if not self._is_thinking:
            return "", text
        thought, ended, answer = text.partition(END_OF_THOUGHT)
        if ended:
            self._is_thinking = False
            return thought, "\n" + answer
        certain = len(text) - (0 if is_last else unfinished_mark(text, (END_OF_THOUGHT,)))
        self._held = text[certain:]
        return text[:certain], ""
