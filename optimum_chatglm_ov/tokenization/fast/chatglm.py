# SPDX-License-Identifier: Apache-2.0
"""ChatGLM's tokenizer for `tokenizers`: SentencePiece's unigrams after its normalisation."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..base import CLEANED_UP
from ..chatglm import ChatGLM1Tokenizer
from ..special_tokens import MARK
from ..vocabulary import TokenizerError
from .charsmap import charsmap_normalizers
from .pieces import BYTE, CONTROL, NORMAL, USER_DEFINED, PieceModel, read_pieces


# Of pieces that text is never cut into as long as there is another way.
NEVER = -1e5
_BLANK = " "  # what a text has none of once it is normalised, as the names of image tokens have: no text matches them
_UNKNOWN = "\ufdd1\ufdd2\ufdd1"  # stands in for the text of `<unk>` while blanks are taken off
_LONGEST_BLANK = 80
_LITERAL_BYTE = "<0x", "0123456789ABCDEF", ">"


def build(tokenizer: ChatGLM1Tokenizer) -> Tokenizer:
    """Builds a tokenizer of `tokenizers` with the ids and texts of `tokenizer`.

    Raises:
        TokenizerError: the tokenizer was made with an option that it has no form for.
    """
    if tokenizer.remove_space or tokenizer.do_lower_case:
        raise TokenizerError(
            f"{tokenizer.vocab_file}: `remove_space` and `do_lower_case` have no form in tokenizer.json. Set them to "
            "false in tokenizer_config.json, as the original repositories have them."
        )
    model = read_pieces(tokenizer.vocab_file)
    backend = Tokenizer(
        models.Unigram(
            vocab=_vocabulary(tokenizer, model),
            unk_id=tokenizer.num_image_tokens + tokenizer.sp_model.unk_id(),
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(_normalizers(model))
    splitter = _literal_bytes(model)
    if splitter is not None:
        backend.pre_tokenizer = splitter
    recognized = tokenizer.added_tokens_decoder
    for index, piece in enumerate(model.pieces, tokenizer.num_image_tokens):
        if index in recognized:
            backend.add_special_tokens([recognized[index]])
        elif piece.kind == CONTROL:
            backend.add_special_tokens([AddedToken(MARK + piece.text, normalized=False, special=True)])
    backend.decoder = decoders.Sequence(_decoders(tokenizer, model))
    mask, begin, end = tokenizer.gmask_token, str(tokenizer.bos_token), str(tokenizer.eos_token)
    ids = (tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    mask = MARK + mask
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", mask, begin],
        pair=["$A", mask, begin, "$B", end],
        special_tokens=list(zip((mask, begin, end), ids)),
    )
    return backend


def _vocabulary(tokenizer: ChatGLM1Tokenizer, model: PieceModel) -> list[tuple[str, float]]:
    first = tokenizer.num_image_tokens
    entries = [(f"{_BLANK}<image_{index}>", NEVER) for index in range(first)]
    for index, piece in enumerate(model.pieces, first):
        if piece.kind in (NORMAL, USER_DEFINED):
            entries.append((piece.text, piece.score))
        elif piece.kind == BYTE or index in tokenizer.added_tokens_decoder:
            entries.append((piece.text, NEVER))
        else:
            entries.append((MARK + piece.text, NEVER))
    return entries


def _normalizers(model: PieceModel) -> list[normalizers.Normalizer]:
    replace = normalizers.Replace
    steps = [replace(" " * width, f"<|blank_{width}|>") for width in range(_LONGEST_BLANK, 1, -1)]
    line_breaks = [replace("\n", "<n>"), replace("\t", "<|tab|>")]
    steps += charsmap_normalizers(model.charsmap, line_breaks) if model.charsmap else line_breaks
    if model.remove_extra_whitespaces:
        steps += [replace(Regex("^ +| +$"), ""), replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return [*steps, replace(" ", "▁")]


def _literal_bytes(model: PieceModel) -> pre_tokenizers.PreTokenizer | None:
    """Keeps `<0x41>` in a text from being taken for the byte, where a character of it is no piece.

    Such a character is part of no other piece either, so cutting beside it changes nothing else.
    """
    known = model.normal_pieces()
    begin, digits, end = _LITERAL_BYTE
    unknown = "".join(digit for digit in digits if digit not in known)
    if any(character not in known for character in begin + end):
        pattern = f"(?<=<)(?=0x[{digits}]{{2}}>)"
    elif unknown:
        pattern = f"(?<=<0x[{unknown}])(?=[{digits}]>)|(?<=<0x[{digits}])(?=[{unknown}]>)"
    else:
        return None
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _decoders(tokenizer: ChatGLM1Tokenizer, model: PieceModel) -> list[decoders.Decoder]:
    replace = decoders.Replace
    controls = [piece.text for piece in model.pieces if piece.kind == CONTROL]
    steps = [replace(name, "") for token in controls for name in (MARK + token, token)]
    steps += [replace("<unk>", _UNKNOWN), replace(_BLANK + "<", "<"), replace("▁", " "), decoders.ByteFallback()]
    steps += [decoders.Fuse(), decoders.Strip(" ", 1 << 16, 0), replace(_UNKNOWN, " ⁇ ")]
    steps += [replace("<n>", "\n"), replace("<|tab|>", "\t")]
    steps += [replace(f"<|blank_{width}|>", " " * width) for width in range(2, _LONGEST_BLANK + 1)]
    if tokenizer.clean_up_tokenization_spaces:
        steps += [replace(spaced, joined) for spaced, joined in CLEANED_UP]
    return steps
