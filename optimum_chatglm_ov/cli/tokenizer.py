# SPDX-License-Identifier: Apache-2.0
"""Writes the tokenizer of a checkpoint or of an exported model in the forms that other programs read: tokenizer.json,
and OpenVINO models where openvino-tokenizers is installed."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `chatglm-ov tokenizer`."""
    parser.add_argument("folder", type=Path, help="folder with tokenizer.model or ice_text.model")
    parser.add_argument("output", type=Path, help="folder to write; may be the same")


def run(args: argparse.Namespace) -> int:
    """Converts, and says what was written."""
    from ..export.openvino_tokenizers import save_tokenizers
    from ..ir import OPENVINO_TOKENIZER_FILES
    from ..output import complete_folder
    from ..tokenization import load_tokenizer
    from ..tokenization.fast import TOKENIZER_FILES

    tokenizer = load_tokenizer(args.folder)
    replaced = frozenset((*TOKENIZER_FILES, *OPENVINO_TOKENIZER_FILES))
    with complete_folder(args.output.absolute(), replaces=replaced) as folder:
        save_tokenizers(tokenizer, folder)
        written = sorted(file.name for file in folder.iterdir())
    print(f"{args.output}: {', '.join(written)}")
    return 0
