# SPDX-License-Identifier: Apache-2.0
"""Tokenizer of ChatGLM2-6B and CodeGeeX2-6B."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import AddedToken

from .chat_templates import CHATGLM2_TEMPLATE
from .rounds import RoundsTokenizer
from .vocabulary import TokenizerError, load_sentencepiece, whole_characters


class SentencePieceVocabulary:
    """A SentencePiece model and the control tokens that follow its pieces."""

    def __init__(self, vocab_file: str | os.PathLike, control_tokens: Sequence[str]):
        self.sp_model = load_sentencepiece(vocab_file)
        if self.sp_model.piece_to_id("<0x0A>") == self.sp_model.unk_id():
            raise TokenizerError(
                f"{vocab_file} has no byte pieces; expected the tokenizer.model of ChatGLM2 or ChatGLM3. Copy it from "
                "the original repository."
            )
        self.n_words = self.sp_model.get_piece_size() + len(control_tokens)
        self.special_tokens = {token: self.sp_model.get_piece_size() + i for i, token in enumerate(control_tokens)}
        self.index_special_tokens = {index: token for token, index in self.special_tokens.items()}
        self.bos_id, self.eos_id, self.pad_id = self.sp_model.bos_id(), self.sp_model.eos_id(), self.sp_model.unk_id()

    def encode(self, text: str) -> list[int]:
        """Encodes `text`; control tokens in it are text."""
        return self.sp_model.encode(whole_characters(text))

    def decode(self, ids: list[int]) -> str:
        """Decodes `ids`, control tokens by name, and each stretch between them by itself."""
        text, stretch = "", []
        for index in ids:
            if index in self.index_special_tokens:
                text += self.sp_model.decode(stretch) + self.index_special_tokens[index]
                stretch = []
            else:
                stretch.append(index)
        return text + self.sp_model.decode(stretch)

    def token_to_id(self, token: str) -> int:
        """Finds the id of a control token or a piece; that of `<unk>` for anything else."""
        return self.special_tokens.get(token, self.sp_model.piece_to_id(token))

    def id_to_token(self, index: int) -> str:
        """Finds a control token or a piece.

        Raises:
            IndexError: there is no such id.
        """
        return self.index_special_tokens.get(index) or self.sp_model.id_to_piece(index)


# What a tokenizer has unless others were chosen.
_DEFAULT_TOKENS = {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}


class ChatGLM2Tokenizer(RoundsTokenizer, saved_as="ChatGLMTokenizer"):
    """SentencePiece BPE with byte fallback; a prompt begins with `[gMASK] sop`.

    Control tokens are never recognised in text, and `decode` leaves them out.
    """

    chatglm_generation = "chatglm2"
    default_chat_template = CHATGLM2_TEMPLATE
    control_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")

    def _load_vocabulary(self) -> None:
        self.tokenizer = SentencePieceVocabulary(self.vocab_file, self.control_tokens)
        self.special_tokens = {
            "<bos>": self.tokenizer.bos_id,
            "<eos>": self.tokenizer.eos_id,
            "<pad>": self.tokenizer.pad_id,
        }

    def __init__(self, vocab_file: str | None = None, ice_text_file: str | None = None, **kwargs: Any):
        super().__init__(vocab_file, ice_text_file, **kwargs)
        for name, token in self._chosen_tokens.items():
            setattr(self, name, token)

    def _complete_arguments(self, kwargs: dict[str, Any]) -> None:
        # Of special tokens that transformers is given when it begins, it makes added tokens, which are matched in
        # text. Those of the vocabulary are set afterwards, as a user sets them; folders saved by older transformers
        # repeat the defaults.
        self._chosen_tokens = {
            name: str(kwargs.pop(name))
            for name in self.SPECIAL_TOKENS_ATTRIBUTES
            if isinstance(kwargs.get(name), (str, AddedToken)) and self._has_in_vocabulary(str(kwargs[name]))
        }
        for name, token in _DEFAULT_TOKENS.items():
            if self._chosen_tokens.get(name) == token:
                del self._chosen_tokens[name]

    def _has_in_vocabulary(self, token: str) -> bool:
        return token == "<unk>" or self.tokenizer.token_to_id(token) != self.tokenizer.sp_model.unk_id()

    def __setattr__(self, key: str, value: Any) -> None:
        """Lets `pad_token_id` and its like set the token of that id, also one without a text of its own."""
        name = key.removesuffix("_id")
        if value is not None and key.endswith("_token_id") and name in self.SPECIAL_TOKENS_ATTRIBUTES:
            if not 0 <= value < len(self):
                raise ValueError(f"`{key}` is {value}; expected an id of the vocabulary, 0 to {len(self) - 1}.")
            added = self.added_tokens_decoder.get(value)
            key, value = name, self.tokenizer.id_to_token(value) if added is None else added.content
        super().__setattr__(key, value)

    # Vocabulary ----------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of pieces and control tokens."""
        return self.tokenizer.n_words

    @property
    def pad_token(self) -> str:
        """`<unk>`, unless another was set."""
        return str(self._special_tokens_map.get("pad_token") or _DEFAULT_TOKENS["pad_token"])

    @property
    def pad_token_id(self) -> int:
        """Id of `pad_token`."""
        return self.convert_tokens_to_ids(self.pad_token)

    @property
    def eos_token(self) -> str:
        """`</s>`, unless another was set."""
        return str(self._special_tokens_map.get("eos_token") or _DEFAULT_TOKENS["eos_token"])

    @property
    def eos_token_id(self) -> int:
        """Id of `eos_token`."""
        return self.convert_tokens_to_ids(self.eos_token)

    def get_command(self, token: str) -> int:
        """Finds the id of a control token, or of `<bos>`, `<eos>`, `<pad>`.

        Raises:
            ValueError: there is no such control token.
        """
        commands = {**self.special_tokens, **self.tokenizer.special_tokens}
        if token not in commands:
            raise ValueError(f"{token!r} is not a control token; they are {', '.join(commands)}.")
        return commands[token]

    def get_vocab(self) -> dict[str, int]:
        """Returns token -> id, added tokens included."""
        vocab = {self.tokenizer.id_to_token(index): index for index in range(self.vocab_size)}
        return {**vocab, **self.added_tokens_encoder}

    def _convert_token_to_id(self, token: str) -> int:
        return self.tokenizer.token_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        """Returns what the token contributes to a text.

        That is nothing for `<unk>`, `<s>`, `</s>`, control tokens, and ids after the vocabulary, whose
        rows fill up the embedding.
        """
        hidden = (self.tokenizer.bos_id, self.tokenizer.eos_id, self.tokenizer.pad_id)
        if index in hidden or index in self.tokenizer.index_special_tokens or index >= self.vocab_size:
            return ""
        return self.tokenizer.id_to_token(index)

    # Encoding ------------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self.tokenizer.sp_model.encode(whole_characters(text), out_type=str)

    def get_prefix_tokens(self) -> list[int]:
        """Returns the ids of `[gMASK] sop`."""
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Makes `[gMASK] sop first`, or `[gMASK] sop first second </s>`."""
        ids = [*self.get_prefix_tokens(), *token_ids_0]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.get_command("<eos>")]

    # Decoding ------------------------------------------------------------------------------------------------------

    def _decode_ids(self, token_ids: int | list[int], skip_special_tokens: bool) -> str:
        # The original takes a single token apart: a byte piece stays `<0x0A>`.
        return self.convert_tokens_to_string(
            list(self.convert_ids_to_tokens(token_ids, skip_special_tokens=skip_special_tokens))
        )

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins `tokens` to a text; incomplete UTF-8 becomes U+FFFD."""
        return self.tokenizer.sp_model.decode_pieces(tokens)

    # Conversations -------------------------------------------------------------------------------------------------

    def _conversation_ids(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, continue_final_message: bool
    ) -> list[int]:
        # An answer that was begun ends the text: nothing follows it in the template.
        text = self._render(
            messages, chat_template=self.default_chat_template, add_generation_prompt=add_generation_prompt
        )
        return self.encode(text)
