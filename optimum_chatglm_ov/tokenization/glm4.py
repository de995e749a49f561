# SPDX-License-Identifier: Apache-2.0
"""Tokenizer of GLM-4-9B and CodeGeeX4."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import tiktoken
from transformers import AddedToken, BatchEncoding

from ..architectures.families import GENERATIONS_OF_RANKS
from .base import ChatGLMTokenizer
from .chat_templates import GLM4_TEMPLATE
from .generation import check_generation, detect_generation
from .messages import ToolCall, as_messages, check_role, with_tools, wrapped_functions
from .vocabulary import load_ranks


# How text is cut before byte-pair merging; that of tiktoken's cl100k_base.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)


class ChatGLM4Tokenizer(ChatGLMTokenizer):
    """Byte-level BPE of ranked tokens, followed by special tokens that are recognised in text.

    A prompt begins with `[gMASK] <sop>`. Ordinary tokens are `bytes`, special tokens `str`.
    """

    chatglm_generation = "glm4"
    default_chat_template = GLM4_TEMPLATE
    turn_end_tokens = ("<|user|>", "<|observation|>")

    def __new__(cls, vocab_file: str | None = None, ice_text_file: str | None = None, **kwargs: Any):
        # repositories of CodeGeeX4 name this class, too
        if cls is ChatGLM4Tokenizer and vocab_file is not None and os.path.isfile(vocab_file):
            if detect_generation(vocab_file, kwargs)[0] == "codegeex4":
                from .codegeex4 import CodeGeeX4Tokenizer

                cls = CodeGeeX4Tokenizer
        return super().__new__(cls, vocab_file, ice_text_file, **kwargs)

    def _load_vocabulary(self) -> None:
        self.mergeable_ranks = load_ranks(self.vocab_file)
        self.tokenizer = tiktoken.Encoding(
            "glm4", pat_str=PATTERN, mergeable_ranks=self.mergeable_ranks, special_tokens={}
        )

    def _complete_arguments(self, kwargs: dict[str, Any]) -> None:
        # AutoTokenizer finds this class by its name, before anything has looked at the argument.
        check_generation(
            kwargs.get("chatglm_generation", self.chatglm_generation), GENERATIONS_OF_RANKS, self.vocab_file
        )
        # transformers 4 and 5 store the special tokens under different keys; the table of added tokens they share.
        kwargs.pop("extra_special_tokens", None)
        added_tokens = kwargs.get("added_tokens_decoder") or {
            self.vocab_size + i: AddedToken(token, normalized=False, special=True)
            for i, token in enumerate(_SPECIAL_TOKENS)
        }
        kwargs["added_tokens_decoder"] = added_tokens
        kwargs["additional_special_tokens"] = [
            str(token) for _, token in sorted(added_tokens.items()) if token.special
        ]
        for name in ("eos_token", "pad_token"):
            kwargs[name] = str(kwargs.get(name) or "<|endoftext|>")

    # Vocabulary ----------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ranked tokens; special tokens come after them."""
        return self.tokenizer.n_vocab

    def get_vocab(self) -> dict[bytes | str, int]:
        """Returns token -> id, special tokens included."""
        return {**self.mergeable_ranks, **self.added_tokens_encoder}

    def _convert_token_to_id(self, token: bytes | str) -> int:
        if token not in self.mergeable_ranks:
            raise KeyError(f"GLM-4 has no token {token!r}; ordinary tokens are `bytes`.")
        return self.mergeable_ranks[token]

    def _convert_id_to_token(self, index: int) -> bytes:
        if index >= self.vocab_size:  # a row of the embedding that only fills it up
            return b""
        return self.tokenizer.decode_single_token_bytes(index)

    # Encoding ------------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str, **kwargs: Any) -> list[bytes]:
        return [self.tokenizer.decode_single_token_bytes(index) for index in self.tokenizer.encode_ordinary(text)]

    def get_prefix_tokens(self) -> list[int]:
        """Returns the ids of `[gMASK] <sop>`."""
        return self.convert_tokens_to_ids(["[gMASK]", "<sop>"])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Makes `[gMASK] <sop> text`.

        Raises:
            ValueError: there is a second text; GLM-4 has no token that ends one.
        """
        if token_ids_1 is not None:
            raise ValueError("GLM-4 cannot encode a pair of texts: it has no token that ends the second. Join them.")
        return [*self.get_prefix_tokens(), *token_ids_0]

    # Decoding ------------------------------------------------------------------------------------------------------

    def _decode_ids(self, token_ids: int | list[int], skip_special_tokens: bool) -> str:
        """Decodes with special tokens apart, a blank between them and their neighbours, as in the original."""
        parts, stretch = [], []
        # also of one id alone, for which the original has no text
        for index in [token_ids] if isinstance(token_ids, int) else token_ids:
            added = self._added_tokens_decoder.get(index)
            if added is None:
                stretch.append(self._convert_id_to_token(index))
            elif not (skip_special_tokens and added.special):
                parts += [self.convert_tokens_to_string(stretch), added.content]
                stretch = []
        parts.append(self.convert_tokens_to_string(stretch))
        return " ".join(part for part in parts if part)

    def convert_tokens_to_string(self, tokens: list[bytes | str]) -> str:
        """Joins `tokens` to a text; incomplete UTF-8 becomes U+FFFD."""
        text = b"".join(token.encode() if isinstance(token, str) else token for token in tokens)
        return text.decode("utf-8", errors="replace")

    # Conversations -------------------------------------------------------------------------------------------------

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """Encodes `<|role|>`, metadata and a line break, and the message; control tokens in these two are text.

        Raises:
            ValueError: `role` is not system, user, assistant or observation.
        """
        check_role(role, self.roles, type(self).__qualname__)
        text_ids = self.tokenizer.encode_ordinary
        return [self.convert_tokens_to_ids(f"<|{role}|>"), *text_ids(f"{metadata}\n"), *text_ids(message)]

    def build_chat_input(self, query: str, history: Sequence[Any] | None = None, role: str = "user") -> BatchEncoding:
        """Makes `input_ids`, `attention_mask` and `position_ids` [1, L], by the chat template."""
        messages = [*as_messages(history), {"role": role, "content": query}]
        return self.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def _conversation_ids(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, continue_final_message: bool
    ) -> list[int]:
        # Special tokens in messages take effect, as in the original.
        return self._rendered_ids(
            messages,
            chat_template=self.default_chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def _with_tools(self, messages: list[dict[str, Any]], tools: Sequence[dict | Callable]) -> list[dict[str, Any]]:
        return with_tools(messages, tools)

    def _prepare_messages(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict | Callable] | None
    ) -> list[dict[str, Any]]:
        return [
            {**message, "tools": wrapped_functions(message["tools"])} if "tools" in message else message
            for message in super()._prepare_messages(messages, tools)
        ]

    def _call_messages(self, calls: list[ToolCall], where: str) -> list[dict[str, Any]]:
        return [
            {"role": "assistant", "metadata": name, "content": json.dumps(arguments, ensure_ascii=False)}
            for name, arguments in calls
        ]
