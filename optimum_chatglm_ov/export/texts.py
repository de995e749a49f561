# SPDX-License-Identifier: Apache-2.0
"""Texts that models are calibrated and compared on, as blocks of token ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


_C4 = {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}
# Data sets known by name, as in optimum-cli's `--dataset`; the only sources that need a network.
_NAMED = {
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "c4": _C4,
    "c4-new": _C4,
    "gsm8k": {"path": "openai/gsm8k", "name": "main"},
}
# A name for texts that the model to be calibrated generates (see `quantization.compress`).
OWN_TEXTS = "auto"


def read_texts(source: str | Path | Iterable[Any]) -> Iterable[str]:
    """Reads the texts of `source`.

    Args:
        source: a UTF-8 text file (its paragraphs, separated by blank lines), "wikitext2", "c4", "c4-new" or "gsm8k"
            (downloaded by `datasets`), strings, or rows with a "text" column, such as a `datasets.Dataset`.

    Raises:
        ValueError: the source is none of those, or has no text.
    """
    if isinstance(source, (str, Path)):
        name = name_and_length(source)[0]
        texts = _paragraphs(Path(source)) if name is None else _named(name)
    elif isinstance(source, Mapping):
        raise ValueError(
            f"The texts are a {type(source).__name__} with the keys {', '.join(map(repr, source))}. Pass one split, "
            "such as `data['train']`, or another value that is a list of texts."
        )
    elif isinstance(source, Iterable):
        texts = (_text(row) for row in source)
    else:
        raise ValueError(f"The texts are {_brief(source)}; expected {_expected()}.")
    texts = map(_unicode, texts)
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise ValueError(f"No text found in {_brief(source)}; expected at least one line that is not blank.")
    return itertools.chain([first], (text for text in texts if text.strip()))


def name_and_length(source: Any) -> tuple[str | None, int | None]:
    """Splits "wikitext2" or "wikitext2:seq_len=64" into the data set's name and `seq_len`; `None`: not given.

    Raises:
        ValueError: other options than a positive `seq_len`.
    """
    name, colon, options = source.partition(":") if isinstance(source, str) else ("", "", "")
    if name not in (*_NAMED, OWN_TEXTS):
        return None, None
    key, _, length = options.partition("=")
    if colon and (key.strip() != "seq_len" or not length.strip().isdecimal() or int(length) < 1):
        raise ValueError(f"{source!r}: the only option of a data set is `seq_len`, as in '{name}:seq_len=64'.")
    return name, int(length) if colon else None


def blocks(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Yields token ids of `texts`, joined by newlines and cut into blocks of `length`; the last one may be shorter."""
    rest: list[int] = []
    for text in texts:
        rest += tokenizer.encode(text + "\n", add_special_tokens=False)
        while len(rest) >= length:
            yield rest[:length]
            rest = rest[length:]
    if rest:
        yield rest


def generated(block: list[int], tokenizer: Any) -> tuple[list[int], int]:
    """Puts the special tokens of an empty prompt before `block`, as if generated; their number comes second.

    In chatglm-6b only tokens behind `<sop>` see nothing but what was before them.
    """
    prompt = tokenizer.encode("")
    return prompt + block, len(prompt)


def _expected() -> str:
    return f"a UTF-8 text file, one of {', '.join(_NAMED)}, a list of strings or a `datasets.Dataset`"


def _paragraphs(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{file}: cannot read the text ({reason}); expected {_expected()}.") from error
    return iter(text.split("\n\n"))


def _named(name: str) -> Iterator[str]:
    if name == OWN_TEXTS:
        raise ValueError(f"{name!r} stands for texts that the model makes itself, for its calibration alone.")
    try:
        from datasets import load_dataset

        rows = load_dataset(split="train", **_NAMED[name])
    except Exception as error:  # a missing package, no network, a Hub error: all have the same way out
        raise ValueError(
            f"The data set {name!r} could not be loaded ({error}). Give a text file, a list of strings or a "
            "`datasets.Dataset` that is on this machine."
        ) from error
    return map(_question if name == "gsm8k" else _text, rows)


def _question(row: Mapping[str, str]) -> str:
    return f"Question: {row['question']}\nAnswer: {row['answer']}"  # as optimum-intel does


def _text(row: Any) -> str:
    if isinstance(row, str):
        return row
    try:
        return str(row["text"])
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"A data set row is {_brief(row)}; expected a string or a row with a 'text' column. Rename the column, or "
            "give a list of strings."
        ) from error


def _unicode(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{_brief(text)}: {text[error.start]!r} at character {error.start} is half of a character. Decode the "
            "text with the encoding it has."
        ) from error
    return text


def _brief(value: Any) -> str:
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 100 else text[:97] + "..."
