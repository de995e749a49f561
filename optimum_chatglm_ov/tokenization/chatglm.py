# SPDX-License-Identifier: Apache-2.0
"""Tokenizer of ChatGLM-6B."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from transformers import AddedToken
from transformers.utils import PaddingStrategy

from .base import ChatGLMTokenizer
from .chat_templates import CHATGLM_TEMPLATE
from .rounds import RoundsTokenizer
from .special_tokens import read_special_tokens
from .vocabulary import TokenizerError, load_sentencepiece, whole_characters


_BLANKS = re.compile(" {2,80}")
_BLANK_PIECE = re.compile(r"<\|blank_(\d+)\|>")
_DEFAULT_TOKENS = {
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "[MASK]",
}
_IMAGE_TOKEN = re.compile(r"<image_(\d+)>")


class ChatGLM1Tokenizer(RoundsTokenizer, saved_as="ChatGLMTokenizer"):
    r"""SentencePiece (unigram, NFKC) with pieces of its own for line breaks, tabs and runs of 2 to 80 blanks.

    A prompt ends in `[gMASK] <sop>`. Token ids alone are returned unless padding is asked for; then also

    - **attention_mask** bool [1, L, L] per text, `True` where a query must not see a key, and
    - **position_ids** int64 [2, L] per text: the position in the prompt, and the position in the answer.

    Args:
        num_image_tokens (`int`, defaults to 20000): ids below it are `<image_0>`, `<image_1>`, ...; the first
            revisions of the checkpoint have 20000, later ones say 0 in tokenizer_config.json.
        remove_space, do_lower_case (`bool`): applied to the text before anything else.
    """

    chatglm_generation = "chatglm"
    vocabulary_argument = "ice_text_file"
    default_chat_template = CHATGLM_TEMPLATE

    def __init__(
        self,
        vocab_file: str | None = None,
        ice_text_file: str | None = None,
        num_image_tokens: int = 20000,
        remove_space: bool = False,
        do_lower_case: bool = False,
        clean_up_tokenization_spaces: bool = True,
        **kwargs: Any,
    ):
        self.num_image_tokens = num_image_tokens
        self.remove_space = remove_space
        self.do_lower_case = do_lower_case
        read_special_tokens(kwargs)
        # transformers >= 5 collects these two in a table, and would have them recognised in text.
        for table in ("extra_special_tokens", "model_specific_special_tokens"):
            if isinstance(kwargs.get(table), dict):
                kwargs.update(kwargs.pop(table))
        self.gmask_token = str(kwargs.pop("gmask_token", None) or "[gMASK]")
        self.end_token = str(kwargs.pop("end_token", None) or "</s>")
        chosen = {name: str(kwargs.pop(name, None) or token) for name, token in _DEFAULT_TOKENS.items()}
        super().__init__(
            vocab_file if ice_text_file is None else None,
            ice_text_file,
            num_image_tokens=num_image_tokens,
            remove_space=remove_space,
            do_lower_case=do_lower_case,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            **_DEFAULT_TOKENS,
            **kwargs,
        )
        # In text the defaults swallow the blanks around them, also where others have replaced them.
        self.added_tokens_decoder = {
            self._convert_token_to_id(token): AddedToken(
                token, lstrip=True, rstrip=True, normalized=False, special=True
            )
            for token in _DEFAULT_TOKENS.values()
        }
        self.add_special_tokens(chosen)

    def _load_vocabulary(self) -> None:
        self.sp_model = load_sentencepiece(self.vocab_file)
        missing = [piece for piece in ("<n>", "<|tab|>", "[gMASK]", "<sop>") if self._piece_to_id(piece) is None]
        if missing:
            raise TokenizerError(
                f"{self.vocab_file} has no piece {', '.join(missing)}; expected the ice_text.model of ChatGLM-6B. "
                "Copy it from the original repository."
            )

    def _piece_to_id(self, piece: str) -> int | None:
        index = self.sp_model.piece_to_id(piece)
        return None if index == self.sp_model.unk_id() and piece != "<unk>" else index

    def _has_in_vocabulary(self, token: str) -> bool:
        return self._piece_to_id(token) is not None or self._image_token_id(token) is not None

    # Vocabulary ----------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of image tokens and text pieces."""
        return self.num_image_tokens + self.sp_model.get_piece_size()

    @property
    def gmask_token_id(self) -> int:
        """Id of `[gMASK]`."""
        return self._convert_token_to_id(self.gmask_token)

    @property
    def end_token_id(self) -> int:
        """Id of `</s>`."""
        return self._convert_token_to_id(self.end_token)

    def get_vocab(self) -> dict[str, int]:
        """Returns token -> id, added tokens included."""
        vocab = {self._convert_id_to_token(index): index for index in range(self.vocab_size)}
        return {**vocab, **self.added_tokens_encoder}

    def _convert_token_to_id(self, token: str) -> int:
        image_token_id = self._image_token_id(token)
        return self.num_image_tokens + self.sp_model.piece_to_id(token) if image_token_id is None else image_token_id

    def _image_token_id(self, token: str) -> int | None:
        image = _IMAGE_TOKEN.fullmatch(token)
        return int(image[1]) if image and int(image[1]) < self.num_image_tokens else None

    def _convert_id_to_token(self, index: int) -> str:
        if index < self.num_image_tokens:
            return f"<image_{index}>"
        if index >= self.vocab_size:  # a row of the embedding that only fills it up
            return ""
        return self.sp_model.id_to_piece(index - self.num_image_tokens)

    # Encoding ------------------------------------------------------------------------------------------------------

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        text = _BLANKS.sub(lambda blanks: f"<|blank_{len(blanks[0])}|>", text)
        return self.sp_model.encode(whole_characters(text), out_type=str)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Makes `first [gMASK] <sop>`, or `first [gMASK] <sop> second <eop>`."""
        ids = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def _pad(
        self,
        encoded_inputs: dict[str, Any],
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, Any]:
        """Pads ids, and adds the mask [1, L, L] and the positions [2, L] of each text when padding was asked for."""
        encoded_inputs.pop("attention_mask", None)
        ids = list(encoded_inputs["input_ids"])
        positions = encoded_inputs.pop("position_ids", None)
        encoded_inputs = super(ChatGLMTokenizer, self)._pad(
            encoded_inputs, max_length, padding_strategy, pad_to_multiple_of, padding_side, return_attention_mask=False
        )
        if padding_strategy == PaddingStrategy.DO_NOT_PAD:
            return encoded_inputs
        padding = len(encoded_inputs["input_ids"]) - len(ids)
        before, after = (padding, 0) if (padding_side or self.padding_side) == "left" else (0, padding)
        if return_attention_mask is not False:
            encoded_inputs["attention_mask"] = np.pad(
                self._blocked(ids), ((0, 0), (before, after), (before, after)), constant_values=True
            )
        if positions is None:
            positions = self._positions(ids)
        encoded_inputs["position_ids"] = np.pad(positions, ((0, 0), (before, after)))
        return encoded_inputs

    def _prompt_length(self, ids: list[int]) -> int:
        """Counts the ids before `<sop>`: they see each other, what follows sees only what precedes it."""
        return ids.index(self.bos_token_id) if self.bos_token_id in ids else len(ids)

    def _blocked(self, ids: list[int]) -> np.ndarray:
        blocked = np.triu(np.ones((len(ids), len(ids)), dtype=bool), k=1)
        blocked[:, : self._prompt_length(ids)] = False
        return blocked[None]

    def _positions(self, ids: list[int]) -> np.ndarray:
        prompt_length = self._prompt_length(ids)
        positions = np.zeros((2, len(ids)), dtype=np.int64)
        positions[0] = np.arange(len(ids))
        # The original tokenizer lets [MASK] win over [gMASK], the original model the other way round.
        for mask_token_id in (self.mask_token_id, self.gmask_token_id):
            if mask_token_id in ids:
                positions[0, prompt_length:] = ids.index(mask_token_id)
                break
        positions[1, prompt_length:] = np.arange(1, len(ids) - prompt_length + 1)
        return positions

    # Decoding ------------------------------------------------------------------------------------------------------

    def _decode_ids(self, token_ids: int | list[int], skip_special_tokens: bool) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        dropped = {self.pad_token_id, *(self.all_special_ids if skip_special_tokens else ())}
        return self.convert_tokens_to_string(self.convert_ids_to_tokens([i for i in ids if i not in dropped]))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Joins `tokens` to a text, with line breaks, tabs and blanks for the pieces that stand for them."""
        text = self.sp_model.decode_pieces(tokens).replace("<n>", "\n").replace("<|tab|>", "\t")
        return _BLANK_PIECE.sub(lambda piece: " " * int(piece[1]), text)

    # Conversations -------------------------------------------------------------------------------------------------

    def _conversation_ids(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool, continue_final_message: bool
    ) -> list[int]:
        if continue_final_message:  # an answer that was begun stands after `[gMASK] <sop>`
            prompt = self._conversation_ids(messages[:-1], add_generation_prompt=True, continue_final_message=False)
            return prompt + self.encode(messages[-1]["content"], add_special_tokens=False)
        text = self._render(
            messages, chat_template=self.default_chat_template, add_generation_prompt=add_generation_prompt
        )
        return self.encode(text, add_special_tokens=add_generation_prompt)
