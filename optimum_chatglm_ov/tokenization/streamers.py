# SPDX-License-Identifier: Apache-2.0
"""Streamers whose pieces, put together, are the decoded text."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer


class _WholeCharacters:
    """Hands out text as soon as it is final.

    The streamers of transformers forget the line before, so that a SentencePiece tokenizer takes the first word of
    each line for the first of the text and drops the blank in front of it; and at the end they show the bytes of an
    unfinished character as U+FFFD.
    """

    def put(self, value: Any) -> None:
        """Takes the next token ids, [n] or [1, n].

        Raises:
            ValueError: there is more than one row.
        """
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(f"A streamer shows one text; found a batch of {value.shape[0]}. Generate one at a time.")
        if self.skip_prompt and self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.token_cache.extend(value.flatten().tolist())
        text = self._decoded()
        end = len(text)
        if self.tokenizer.clean_up_tokenization_spaces:
            # Blanks and what follows them can still change; a line break or a Chinese character ends that.
            if text and text[-1] != "\n" and not self._is_chinese_char(ord(text[-1])):
                end = text.rfind(" ") + 1
                end = len(text[:end].rstrip(" "))
        self._hand_out(text[: max(end, self.print_len)])
        if text.endswith("\n"):  # the last token stays, so that what follows is not taken for the beginning
            self.token_cache = self.token_cache[-1:]
            self.print_len = len(self._decoded())

    def end(self) -> None:
        """Hands out the rest; the bytes of an unfinished character are dropped."""
        text = self._decoded()[self.print_len :] if self.token_cache else ""
        self.token_cache, self.print_len, self.next_tokens_are_prompt = [], 0, True
        self.on_finalized_text(text, stream_end=True)

    def _decoded(self) -> str:
        if isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return self.tokenizer.decode(self.token_cache, **self.decode_kwargs).rstrip("\ufffd")
        return self.tokenizer.decode(self.token_cache, **{**self.decode_kwargs, "skip_incomplete_tail": True})

    def _hand_out(self, text: str) -> None:
        new = text[self.print_len :]
        self.print_len = len(text)
        if new:
            self.on_finalized_text(new)


class ChatGLMTextStreamer(_WholeCharacters, TextStreamer):
    """[`~transformers.TextStreamer`] that keeps blanks at the beginning of lines and shows whole characters only."""


class ChatGLMTextIteratorStreamer(_WholeCharacters, TextIteratorStreamer):
    """[`~transformers.TextIteratorStreamer`] with the properties of [`ChatGLMTextStreamer`]."""
