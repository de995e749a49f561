# SPDX-License-Identifier: Apache-2.0
"""The bytes of each token, for grammars of structured output and for `logprobs`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BLANKS = re.compile(r"<\|blank_(\d+)\|>")
_PIECES = {"<n>": b"\n", "<|tab|>": b"\t"}


class TokenBytes:
    """What each token of a tokenizer contributes to a text."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._silent = {*tokenizer.all_special_ids, *tokenizer.turn_end_ids, *tokenizer.added_tokens_decoder}
        self._silent |= {tokenizer.get_command(token) for token in getattr(tokenizer, "control_tokens", ())}

    def __call__(self, token_id: int) -> bytes:
        """Returns the bytes of a token; none for control tokens, and for ids beyond the vocabulary."""
        if token_id in self._silent:
            return b""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(token, bytes):
            return token
        if token in _PIECES:
            return _PIECES[token]
        if blanks := _BLANKS.fullmatch(token):
            return b" " * int(blanks[1])
        if byte := _BYTE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()


def save_vocabulary(tokenizer: Any, folder: str) -> None:
    """Writes the files that openvino-genai takes a vocabulary from: an OpenVINO detokenizer, and the special ids."""
    import numpy as np
    import openvino as ov
    from openvino import opset15 as opset
    from openvino_tokenizers.tokenizer_pipeline import VocabDecoderStep

    bytes_of = TokenBytes(tokenizer)
    vocabulary = [bytes_of(token_id) for token_id in range(len(tokenizer))]
    ids = opset.parameter([-1, -1], np.int64, name="input_ids")
    step = VocabDecoderStep(vocab=vocabulary, skip_tokens=[tokenizer.eos_token_id])
    pieces = step.get_ov_subgraph([opset.convert(ids, "i32").output(0)])
    text = opset.string_tensor_pack(*pieces[2:5])
    model = ov.Model([text.output(0)], [ids], "detokenizer")
    model.output(0).tensor.set_names({"string_output"})
    ov.save_model(model, Path(folder) / "openvino_detokenizer.xml")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (Path(folder) / "config.json").write_text(json.dumps(special), encoding="utf-8")
