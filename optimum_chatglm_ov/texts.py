# SPDX-License-Identifier: Apache-2.0
"""Texts that models are calibrated and compared on, as blocks of token ids."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


# Data sets known by name, as in optimum-cli's `--dataset`; the only sources that need a network.
_NAMED = {
    "wikitext2": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
    "c4": ("allenai/c4", {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}),
    "c4-new": ("allenai/c4", {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}),
}


def read_texts(source: str | Path | Iterable[Any]) -> Iterable[str]:
    """The texts of `source`.

    Args:
        source: a UTF-8 text file (its paragraphs, separated by blank lines), "wikitext2", "c4" or "c4-new" (downloaded
            by `datasets`), strings, or rows with a "text" column, such as a `datasets.Dataset`.

    Raises:
        ValueError: the source is none of those, or has no text.
    """
    if isinstance(source, (str, Path)):
        texts = _named(str(source)) if str(source) in _NAMED else _paragraphs(Path(source))
    else:
        texts = (_text(row) for row in source)
    texts = iter(texts)
    first = next((text for text in texts if text.strip()), None)
    if first is None:
        raise ValueError(f"No text found in {_brief(source)}; expected at least one line that is not blank.")
    return itertools.chain([first], (text for text in texts if text.strip()))


def blocks(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Token ids of `texts` joined by newlines and cut into blocks of `length`; the last one may be shorter."""
    rest: list[int] = []
    for text in texts:
        rest += tokenizer.encode(text + "\n", add_special_tokens=False)
        while len(rest) >= length:
            yield rest[:length]
            rest = rest[length:]
    if rest:
        yield rest


def generated(block: list[int], tokenizer: Any) -> tuple[list[int], int]:
    """`block` as what a model generates: behind the special tokens of an empty prompt, whose number comes second.

    In chatglm-6b only tokens behind `<sop>` see nothing but what was before them.
    """
    prompt = tokenizer.build_inputs_with_special_tokens([])
    return prompt + block, len(prompt)


def _paragraphs(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: cannot read the text ({error}); expected a UTF-8 text file, one of {', '.join(_NAMED)}, a list "
            "of strings or a `datasets.Dataset`."
        ) from error
    return iter(text.split("\n\n"))


def _named(name: str) -> Iterator[str]:
    path, arguments = _NAMED[name]
    try:
        from datasets import load_dataset

        rows = load_dataset(path, split="train", **arguments)
    except Exception as error:  # a missing package, no network, a Hub error: all have the same way out
        raise ValueError(
            f"The data set {name!r} could not be loaded ({error}). Give a text file, a list of strings or a "
            "`datasets.Dataset` that is on this machine."
        ) from error
    return (_text(row) for row in rows)


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


def _brief(value: Any) -> str:
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 100 else text[:97] + "..."
