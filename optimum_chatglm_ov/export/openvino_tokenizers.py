# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and the detokenizer as OpenVINO models, which GenAI and Model Server run."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import openvino as ov
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..ir import DETOKENIZER_MODEL, TOKENIZER_MODEL
from ..tokenization import ChatGLMTokenizer, TokenizerError
from ..tokenization.fast import NAMED_TOKENS, build_backend, chat_template_of, save_fast
from ..tokenization.fast.chatglm import NEVER
from ..tokenization.fast.glm4 import byte_level_name
from ..tokenization.special_tokens import MARK, NAMES_OF_FAST_INPUTS


logger = logging.getLogger(__name__)

_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
_SCORE_OF_BYTE = -50.0  # below that of every piece, near enough to them for sums in f32


def has_library() -> bool:
    """Tells whether openvino-tokenizers is installed; it comes with openvino-genai and with optimum-intel's extra."""
    return importlib.util.find_spec("openvino_tokenizers") is not None


def save_tokenizers(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes the tokenizer in every form: of this package, tokenizer.json, and as OpenVINO models where the library
    openvino-tokenizers is there. A warning says which form there is not, and why."""
    try:
        if isinstance(tokenizer, ChatGLMTokenizer):
            save_fast(tokenizer, folder)
        else:  # it is the one of tokenizer.json
            tokenizer.save_pretrained(folder)
    except TokenizerError as error:
        logger.warning(f"No tokenizer.json and no OpenVINO tokenizer are written: {error}")
        tokenizer.save_pretrained(folder)
        return
    if not has_library():
        logger.info(f"No {TOKENIZER_MODEL} is written: `pip install openvino-tokenizers` for it.")
        return
    save_openvino_tokenizers(tokenizer, folder)


def save_openvino_tokenizers(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes `openvino_tokenizer.xml` and `openvino_detokenizer.xml`, with their `.bin`, into `folder`.

    Raises:
        TokenizerError: the tokenizer was made with an option that tokenizer.json has no form for.
    """
    if isinstance(tokenizer, ChatGLMTokenizer):
        models = convert_tokenizers(tokenizer)
    else:
        from openvino_tokenizers import convert_tokenizer

        models = convert_tokenizer(tokenizer, with_detokenizer=True)
    for model, name in zip(models, (TOKENIZER_MODEL, DETOKENIZER_MODEL)):
        ov.save_model(model, Path(folder) / name, compress_to_fp16=False)


def convert_tokenizers(tokenizer: ChatGLMTokenizer) -> tuple[ov.Model, ov.Model]:
    """Converts the tokenizer and the detokenizer.

    The one makes of a text [B] `input_ids` and `attention_mask` i64 [B, L], padded on the left; the other makes of ids
    i64 [B, L] a text [B], without special tokens.

    Both have switches that GenAI sets: whether to add and to skip special tokens.
    """
    from openvino_tokenizers import convert_tokenizer

    definition = json.loads(build_backend(tokenizer).to_str())
    steps = definition["decoder"]["decoders"]
    if any(step["type"] == "ByteLevel" for step in steps):  # which puts the tokens together itself
        steps = [step for step in steps if step["type"] != "Fuse"]
    definition["decoder"]["decoders"] = list(map(_decoder, steps))
    if definition["model"]["type"] == "Unigram":
        _spell_in_bytes(definition)
    backend = Tokenizer.from_str(json.dumps(definition, ensure_ascii=False))
    names = {
        name: backend.id_to_token(getattr(tokenizer, f"{name}_id"))
        for name in NAMED_TOKENS
        if getattr(tokenizer, name, None) is not None
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            padding_side=tokenizer.padding_side,
            model_input_names=NAMES_OF_FAST_INPUTS,
            clean_up_tokenization_spaces=False,
            chat_template=chat_template_of(tokenizer),
            **names,
        )
        models = convert_tokenizer(fast, with_detokenizer=True)
    if definition["model"]["type"] == "BPE" and definition["model"]["byte_fallback"]:
        _name_tokens_by_their_text(models[1], backend)
    return models


def _name_tokens_by_their_text(detokenizer: ov.Model, backend: Tokenizer) -> None:
    """Gives `VocabDecoder` blanks and bytes for `▁` and `<0x41>`: there GenAI's grammars read what tokens write."""
    from openvino_tokenizers.utils import create_string_constant_node

    texts: list[bytes] = []
    for index in range(backend.get_vocab_size()):
        name = backend.id_to_token(index) or ""
        is_byte = _BYTE_PIECE.fullmatch(name)
        texts.append(bytes([int(name[3:5], 16)]) if is_byte else name.replace("▁", " ").encode())
    (decoder,) = [node for node in detokenizer.get_ops() if node.get_type_name() == "VocabDecoder"]
    for place, output in enumerate(create_string_constant_node(texts), 1):
        decoder.input(place).replace_source_output(output)
    detokenizer.validate_nodes_and_infer_types()


def _spell_in_bytes(definition: dict[str, Any]) -> None:
    """Makes unigrams of characters those of bytes: openvino-tokenizers has no byte fallback for them.

    Each byte is a character of its own, and a byte piece that is no other piece is one more piece, of the worst score.
    """
    vocabulary = definition["model"]["vocab"]
    pieces = {text for text, score in vocabulary if score > NEVER}
    for entry in vocabulary:
        text = entry[0]
        if _BYTE_PIECE.fullmatch(text) and entry[1] == NEVER:
            byte = int(text[3:5], 16)
            is_piece = byte < 0x80 and chr(byte) in pieces
            entry[:] = [MARK * is_piece + byte_level_name(bytes([byte])), _SCORE_OF_BYTE]
        elif entry[1] > NEVER:
            entry[0] = byte_level_name(text.encode())
        else:
            entry[1] = _SCORE_OF_BYTE
    definition["model"]["byte_fallback"] = False
    definition["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "use_regex": False,
        "trim_offsets": True,
    }
    steps = [step for step in definition["decoder"]["decoders"] if step["type"] != "ByteFallback"]
    # the library takes one blank off at last
    definition["decoder"]["decoders"] = [*steps, _replacement(MARK, ""), _replacement("^ ", "  ")]


def _decoder(step: dict[str, Any]) -> dict[str, Any]:
    """Makes a step of decoding as openvino-tokenizers reads it: it takes every text for a regular expression."""
    if step["type"] == "Replace":
        pattern = step["pattern"]
        return _replacement(pattern.get("Regex") or re.escape(pattern["String"]), step["content"])
    if step["type"] == "Strip":
        return _replacement(f"^{step['content']}{{1,{min(step['start'], 1 << 15)}}}", "")
    return step


def _replacement(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}
