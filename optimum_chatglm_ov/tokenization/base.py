# SPDX-License-Identifier: Apache-2.0
"""What the tokenizers of every ChatGLM generation share."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import AddedToken, BatchEncoding, PreTrainedTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import PaddingStrategy, to_py_obj

from .chat_templates import is_own_template
from .generation import detect_generation
from .messages import ToolCall, check_roles, plain_messages
from .special_tokens import SPECIAL_TOKENS, other_class_is_expected, read_special_tokens, undo_fast_forms
from .vocabulary import TokenizerError


_TOKENIZER_CLASSES = {
    "chatglm": ("chatglm", "ChatGLM1Tokenizer"),
    "chatglm2": ("chatglm2", "ChatGLM2Tokenizer"),
    "chatglm3": ("chatglm3", "ChatGLM3Tokenizer"),
    "glm4": ("glm4", "ChatGLM4Tokenizer"),
    "codegeex4": ("codegeex4", "CodeGeeX4Tokenizer"),
}
# transformers >= 5 adds these to the arguments of every tokenizer; they describe one load, not the tokenizer.
_ARGUMENTS_OF_ONE_LOAD = ("auto_map", "is_local", "files_loaded", "tokenizer_file", "trust_remote_code", "_from_auto")
# What `clean_up_tokenization_spaces` does, in this order; not every version of transformers has it any more.
CLEANED_UP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    *((f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")),
)
_RETURN_DICT_BY_DEFAULT = (
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters["return_dict"].default
)


class ChatGLMTokenizer(PreTrainedTokenizer):
    r"""Tokenizer of any ChatGLM generation; making one returns the class of the generation that the file belongs to.

    Args:
        vocab_file (`str`): `tokenizer.model`, of ChatGLM2, ChatGLM3 or GLM-4.
        ice_text_file (`str`): `ice_text.model`, of ChatGLM.
        chatglm_generation (`"chatglm"`, `"chatglm2"`, `"chatglm3"`, `"glm4"` or `"codegeex4"`, *optional*):
            Found out from the files when not given; see [`~generation.detect_generation`].

    Raises:
        TokenizerError: there is no vocabulary file, or it is truncated or something else.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "ice_text_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    vocabulary_argument = "vocab_file"  # whose file it is
    padding_side = "left"
    chatglm_generation: str
    generation_is_assumed = False  # nothing told it
    default_chat_template: str
    roles: tuple[str, ...] = ("system", "user", "assistant", "observation")
    turn_end_tokens: tuple[str, ...] = ()  # beside `eos_token`

    def __init_subclass__(cls, saved_as: str | None = None, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if saved_as is not None:
            # transformers stores and compares a tokenizer's class by this name, which is the original repositories'.
            cls.__name__ = saved_as

    def __new__(cls, vocab_file: str | None = None, ice_text_file: str | None = None, **kwargs: Any):
        if cls is not ChatGLMTokenizer:
            return super().__new__(cls)
        path = _vocabulary_path(vocab_file, ice_text_file, kwargs.get("name_or_path"))
        generation, is_told = detect_generation(path, kwargs)
        module, name = _TOKENIZER_CLASSES[generation]
        tokenizer = super().__new__(getattr(importlib.import_module(f".{module}", __package__), name))
        if not is_told:
            object.__setattr__(tokenizer, "generation_is_assumed", True)  # transformers' own needs `__init__` before
        return tokenizer

    def __init__(self, vocab_file: str | None = None, ice_text_file: str | None = None, **kwargs: Any):
        for name in _ARGUMENTS_OF_ONE_LOAD:
            kwargs.pop(name, None)
        undo_fast_forms(kwargs)
        read_special_tokens(kwargs)
        if isinstance(kwargs.get("extra_special_tokens"), (list, tuple)):  # as transformers 5 saves them
            kwargs["additional_special_tokens"] = kwargs.pop("extra_special_tokens")
        self.vocab_file = _vocabulary_path(vocab_file, ice_text_file, kwargs.get("name_or_path"))
        self._load_vocabulary()
        self._complete_arguments(kwargs)
        kwargs["chatglm_generation"] = self.chatglm_generation
        if kwargs.get("chat_template") is None or is_own_template(kwargs["chat_template"]):
            kwargs["chat_template"] = self.default_chat_template
        super().__init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Loads from a folder or a Hub id; arguments as in transformers, and those of the class."""
        try:
            with other_class_is_expected():
                return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except ImportError as error:
            # Without protobuf, transformers turns every exception of a tokenizer's constructor into this one.
            if isinstance(error.__context__, TokenizerError):
                raise error.__context__ from None
            raise

    # What each generation defines ----------------------------------------------------------------------------------

    def _load_vocabulary(self) -> None:
        """Reads `self.vocab_file`."""
        raise NotImplementedError

    def _complete_arguments(self, kwargs: dict[str, Any]) -> None:
        """Changes the arguments that transformers gets, once the vocabulary is known."""

    def _has_in_vocabulary(self, token: str) -> bool:
        """Tells whether the vocabulary has `token`: an added token of that text would be matched in text."""
        return False

    def _decode_ids(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """Decodes `token_ids`, before blanks are cleaned up."""
        raise NotImplementedError

    def _conversation_ids(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, continue_final_message: bool
    ) -> list[int]:
        """Encodes a conversation by the generation's own rules, the basis of `apply_chat_template`."""
        raise NotImplementedError

    def build_chat_input(self, query: str, history: Sequence[Any] | None = None, role: str = "user") -> BatchEncoding:
        """Encodes the prompt of one more turn, as the original `chat()` gives it to the model.

        Args:
            query: what is said now.
            history: earlier turns, as messages (`{"role", "content", "metadata", "tools"}`, or as OpenAI has them) or
                as `(query, response)` pairs, whose response is `None` where there was none.
            role: who says it; `"user"` or `"observation"`.

        Returns:
            `input_ids`, and after ChatGLM also `attention_mask` and `position_ids`: int64 tensors [1, L].
        """
        raise NotImplementedError

    @property
    def turn_end_ids(self) -> list[int]:
        """Ids that end an answer, `eos_token_id` first."""
        return list(dict.fromkeys([self.eos_token_id, *self.convert_tokens_to_ids(list(self.turn_end_tokens))]))

    # Special tokens ------------------------------------------------------------------------------------------------

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kwargs: Any) -> int:
        """Adds special tokens, as in transformers; one that the vocabulary has is chosen, and stays text in a text."""
        chosen = {
            name: str(token)
            for name, token in special_tokens_dict.items()
            if name in SPECIAL_TOKENS and isinstance(token, (str, AddedToken)) and self._has_in_vocabulary(str(token))
        }
        for name, token in chosen.items():
            setattr(self, name, token)
        others = {name: token for name, token in special_tokens_dict.items() if name not in chosen}
        return super().add_special_tokens(others, *args, **kwargs)

    # Encoding ------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, **kwargs: Any) -> list[Any]:
        """Splits `text` into tokens. Added tokens are matched in it; other special tokens are text."""
        tokens = super().tokenize(text, **kwargs)
        # transformers 5 takes a text for a special token that is the same as one
        as_text = set(self.all_special_tokens) - self.added_tokens_encoder.keys()
        return [part for token in tokens for part in (self._tokenize(token) if token in as_text else [token])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Marks by 1 each id that `build_inputs_with_special_tokens` adds, by 0 each that it was given."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, already_has_special_tokens=True)
        text = self.build_inputs_with_special_tokens(
            [-1] * len(token_ids_0), None if token_ids_1 is None else [-1] * len(token_ids_1)
        )
        return [int(token_id != -1) for token_id in text]

    def _pad(
        self,
        encoded_inputs: dict[str, Any],
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        """Adds `position_ids` (0, 1, 2, ... for tokens, 0 for padding) to what transformers adds."""
        length = len(encoded_inputs["input_ids"])
        encoded_inputs = super()._pad(
            encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, padding_side, return_attention_mask
        )
        if "position_ids" in self.model_input_names:
            positions = list(encoded_inputs.get("position_ids", range(length)))
            padding = [0] * (len(encoded_inputs["input_ids"]) - len(positions))
            on_the_left = (padding_side or self.padding_side) == "left"
            encoded_inputs["position_ids"] = padding + positions if on_the_left else positions + padding
        return encoded_inputs

    # Decoding ------------------------------------------------------------------------------------------------------

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """Decodes one id, a list or tensor of ids, or (to a list of texts) a batch of them.

        Raises:
            ValueError: an id is negative, as the labels of a training are where nothing is learned.
        """
        token_ids = to_py_obj(token_ids)
        if isinstance(token_ids, (list, tuple)) and token_ids and isinstance(token_ids[0], (list, tuple)):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, **kwargs) for row in token_ids]
        return self._decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)

    def convert_ids_to_tokens(self, ids: int | list[int], skip_special_tokens: bool = False) -> Any:
        """Returns the token of one id, or those of a list.

        Raises:
            ValueError: an id is negative.
        """
        _check_ids(to_py_obj(ids))
        return super().convert_ids_to_tokens(ids, skip_special_tokens=skip_special_tokens)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        skip_incomplete_tail: bool = False,
        **kwargs: Any,
    ) -> str:
        """Decodes a row; `skip_incomplete_tail` leaves out a last character whose bytes are not all there yet."""
        _check_ids(token_ids)
        text = self._decode_ids(token_ids, skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        if clean_up_tokenization_spaces:
            for spaced, joined in CLEANED_UP:
                text = text.replace(spaced, joined)
        return text.rstrip("\ufffd") if skip_incomplete_tail else text

    # Conversations -------------------------------------------------------------------------------------------------

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[dict | Callable] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchEncoding:
        """Makes of a conversation text or token ids; arguments and results as in transformers.

        Without a template in the checkpoint or in `chat_template`, token ids are those of the original prompt
        building. A template that the checkpoint or the caller brings is rendered and tokenized. Except for GLM-4,
        whose original does otherwise, a control token that a message contains is text.

        Roles are `system`, `user`, `assistant` and `observation` (or `tool`); `tools` go into the system message;
        `tokenizer_kwargs` go to `pad`.

        Raises:
            ValueError: there is no message; or the generation has no form for a role, a content or a call.
        """
        if add_generation_prompt and continue_final_message:
            raise ValueError("`add_generation_prompt` and `continue_final_message` exclude each other; give one.")
        if chat_template is None and self.chat_template is None:
            chat_template = self.default_chat_template
        chat_template = self.get_chat_template(chat_template, tools)
        conversation = getattr(conversation, "messages", conversation)
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = [
            getattr(messages, "messages", messages) for messages in (conversation if batched else [conversation])
        ]
        own_template = is_own_template(chat_template)
        for messages in conversations:
            if not messages:
                raise ValueError("`conversation` is empty; expected at least one message with `role` and `content`.")
            check_roles(messages, self.roles if own_template else None, type(self).__qualname__)
        conversations = [self._prepare_messages(messages, tools) for messages in conversations]
        rendering = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **kwargs,
        }
        if not tokenize:
            texts = [self._render(messages, **rendering) for messages in conversations]
            return texts if batched else texts[0]
        rows = [
            self._conversation_ids(messages, add_generation_prompt, continue_final_message)
            if own_template
            else self._rendered_ids(messages, **rendering)
            for messages in conversations
        ]
        rows = [
            self.prepare_for_model(row, add_special_tokens=False, truncation=truncation, max_length=max_length)
            for row in rows
        ]
        encoded = self.pad(
            {"input_ids": [row["input_ids"] for row in rows]},
            padding=padding,
            max_length=max_length,
            return_tensors=return_tensors,
            **(tokenizer_kwargs or {}),
        )
        if not batched and return_tensors is None:
            encoded = BatchEncoding({key: value[0] for key, value in encoded.items()})
        if return_dict is None:
            return_dict = _RETURN_DICT_BY_DEFAULT
        return encoded if return_dict else encoded["input_ids"]

    def _render(self, messages: list[dict[str, Any]], **rendering: Any) -> str:
        return super().apply_chat_template(messages, tokenize=False, **rendering)

    def _rendered_ids(self, messages: list[dict[str, Any]], **rendering: Any) -> list[int]:
        """Encodes by a template that is not this package's."""
        return self.encode(self._render(messages, **rendering), add_special_tokens=False)

    def _prepare_messages(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict | Callable] | None
    ) -> list[dict[str, Any]]:
        messages = plain_messages(messages, self._call_messages)
        return self._with_tools(messages, tools) if tools else messages

    def _with_tools(self, messages: list[dict[str, Any]], tools: Sequence[dict | Callable]) -> list[dict[str, Any]]:
        """Returns `messages` with `tools` where this generation looks for them."""
        raise ValueError(f"{type(self).__qualname__} has no form for `tools`; use ChatGLM3 or GLM-4.")

    def _call_messages(self, calls: list[ToolCall], where: str) -> list[dict[str, Any]]:
        """Writes the calls in one message of the assistant as this generation does; `where` names it in errors."""
        raise ValueError(f"{where}: {type(self).__qualname__} has no form for `tool_calls`; use ChatGLM3 or GLM-4.")

    # Files ---------------------------------------------------------------------------------------------------------

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the vocabulary file into `save_directory` under its original name."""
        name = (filename_prefix + "-" if filename_prefix else "") + self.vocab_files_names[self.vocabulary_argument]
        target = os.path.join(save_directory, name)
        if os.path.abspath(target) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, target)
        return (target,)


def _vocabulary_path(vocab_file: str | None, ice_text_file: str | None, name_or_path: str | None) -> str:
    path = vocab_file or ice_text_file
    if path is None:
        raise TokenizerError(
            f"{name_or_path or 'The checkpoint'} has no vocabulary file; expected tokenizer.model (ChatGLM2, "
            "ChatGLM3, GLM-4) or ice_text.model (ChatGLM). Copy it from the original repository."
        )
    if not os.path.isfile(path):
        raise TokenizerError(f"{path}: no such vocabulary file. Give the path of tokenizer.model or ice_text.model.")
    return path


def _check_ids(token_ids: int | Sequence[int]) -> None:
    for token_id in [token_ids] if isinstance(token_ids, int) else token_ids:
        if token_id < 0:
            raise ValueError(
                f"{token_id} is not a token id; expected 0 or more. Labels have -100 where nothing is learned: "
                "replace it by `pad_token_id`, or leave it out, before decoding."
            )
