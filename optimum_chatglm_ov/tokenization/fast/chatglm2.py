# SPDX-License-Identifier: Apache-2.0
"""The tokenizers of ChatGLM2, CodeGeeX2 and ChatGLM3 for `tokenizers`: byte-pair merges with byte fallback."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from ..chatglm2 import ChatGLM2Tokenizer
from ..chatglm3 import ChatGLM3Tokenizer
from ..special_tokens import MARK
from ..vocabulary import TokenizerError
from .pieces import BYTE, NORMAL, PieceModel, read_pieces


def build(tokenizer: ChatGLM2Tokenizer) -> Tokenizer:
    """Builds a tokenizer of `tokenizers` with the ids and texts of `tokenizer`.

    Raises:
        TokenizerError: the tokenizer was made with an option that it has no form for.
    """
    if getattr(tokenizer, "encode_special_tokens", False):
        raise TokenizerError(
            f"{tokenizer.vocab_file}: `encode_special_tokens` has no form in tokenizer.json. Leave it out of "
            "tokenizer_config.json; a chat template writes the roles."
        )
    model = read_pieces(tokenizer.vocab_file)
    recognized = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    backend = Tokenizer(
        models.BPE(vocab=_vocabulary(tokenizer, model), merges=_merges(model), byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁")] * model.add_dummy_prefix + [normalizers.Replace(" ", "▁")]
    )
    for token in control_tokens(tokenizer, model):
        added = recognized.get(token) or AddedToken(
            token, normalized=False, special=is_special(tokenizer, token.removeprefix(MARK))
        )
        (backend.add_special_tokens if added.special else backend.add_tokens)([added])
    # the original ChatGLM2 shows no control token, the original ChatGLM3 all
    shown = decoders.Replace(MARK, "") if _shows_controls(tokenizer) else decoders.Replace(Regex(f"^{MARK}.*"), "")
    hidden = [decoders.Replace(MARK + model.pieces[index].text, "") for index in _hidden(tokenizer)]
    backend.decoder = decoders.Sequence(
        [
            *(hidden if _shows_controls(tokenizer) else ()),
            shown,
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *[decoders.Strip(" ", 1, 0)] * model.add_dummy_prefix,
        ]
    )
    _add_prefix(backend, tokenizer, recognized)
    return backend


def is_special(tokenizer: ChatGLM2Tokenizer, token: str) -> bool:
    """Tells whether `skip_special_tokens` leaves a control token out.

    With ChatGLM3 these are the ones that end an answer, since its original shows the others whatever is asked for.
    """
    return not _shows_controls(tokenizer) or token in ("<unk>", "<s>", "</s>", *tokenizer.turn_end_tokens)


def control_tokens(tokenizer: ChatGLM2Tokenizer, model: PieceModel) -> list[str]:
    """Names all control tokens, in the order of their ids."""
    names = [MARK + piece.text for piece in model.pieces if piece.kind not in (NORMAL, BYTE)]
    recognized = tokenizer.added_tokens_encoder
    return names + [token if token in recognized else MARK + token for token in tokenizer.tokenizer.special_tokens]


def _shows_controls(tokenizer: ChatGLM2Tokenizer) -> bool:
    return isinstance(tokenizer, ChatGLM3Tokenizer)


def _hidden(tokenizer: ChatGLM2Tokenizer) -> tuple[int, ...]:
    vocabulary = tokenizer.tokenizer
    return vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id


def _vocabulary(tokenizer: ChatGLM2Tokenizer, model: PieceModel) -> dict[str, int]:
    vocabulary = {
        piece.text if piece.kind in (NORMAL, BYTE) else MARK + piece.text: index
        for index, piece in enumerate(model.pieces)
    }
    recognized = tokenizer.added_tokens_encoder
    for token, index in tokenizer.tokenizer.special_tokens.items():
        vocabulary[token if token in recognized else MARK + token] = index
    return vocabulary


def _merges(model: PieceModel) -> list[tuple[str, str]]:
    """Lists every pair of pieces that makes a piece, those of the best score first, as SentencePiece chooses them."""
    normal = model.normal_pieces()
    by_score = sorted(normal, key=normal.__getitem__, reverse=True)
    return [
        (piece[:cut], piece[cut:])
        for piece in by_score
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _add_prefix(backend: Tokenizer, tokenizer: ChatGLM2Tokenizer, recognized: dict[str, AddedToken]) -> None:
    names = [token if token in recognized else MARK + token for token in ("[gMASK]", "sop")]
    end = MARK + "</s>"
    ids = [*tokenizer.get_prefix_tokens(), tokenizer.get_command("<eos>")]
    backend.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B", end], special_tokens=list(zip([*names, end], ids))
    )
