# SPDX-License-Identifier: Apache-2.0
"""Compares tokenizer.json, and the OpenVINO tokenizer, with the exact tokenizer on a corpus of varied strings.

python tests/benchmarks/compare_tokenizers.py tests/data/tokenizers/tokenizers.chatglm3-6b
"""

import argparse
import sys
import unicodedata
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import openvino as ov  # noqa: E402
from text_corpus import texts  # noqa: E402

from optimum_chatglm_ov.export.openvino_tokenizers import convert_tokenizers  # noqa: E402
from optimum_chatglm_ov.tokenization import load_tokenizer  # noqa: E402
from optimum_chatglm_ov.tokenization.fast import build_backend  # noqa: E402
from optimum_chatglm_ov.tokenization.vocabulary import whole_characters  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--strings", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--openvino", type=int, default=2000, metavar="N", help="strings for the OpenVINO tokenizer")
    args = parser.parse_args()
    corpus = texts(args.strings, args.seed)
    for folder in args.folders:
        exact = load_tokenizer(folder)
        fast = build_backend(exact)
        wholes = [whole_characters(text) for text in corpus]
        found = [encoding.ids for encoding in fast.encode_batch(wholes, add_special_tokens=False)]
        expected = [exact.encode(text, add_special_tokens=False) for text in corpus]
        wrong = [text for text, one, other in zip(wholes, found, expected) if one != other]
        decoded = [fast.decode(ids, skip_special_tokens=False) == exact.decode(ids) for ids in expected]
        print(
            f"{folder.name}: {len(corpus)} strings, {len(wrong)} with other ids "
            f"({sum(map(_has_marks, wrong))} of them with several combining marks in a row), "
            f"{decoded.count(False)} with other text"
        )
        models = [ov.Core().compile_model(model, "CPU") for model in convert_tokenizers(exact)]
        strings = [text.replace("\0", "") for text in wholes[: args.openvino]]  # the binding drops them at ends
        ids = [models[0]([text])["input_ids"][0].tolist() for text in strings]
        expected = [exact(text)["input_ids"] for text in strings]
        wrong = [text for text, one, other in zip(strings, ids, expected) if one != other]
        marks, bytes_ = sum(map(_has_marks, wrong)), sum("<0x" in text for text in wrong)
        print(f"  OpenVINO: {len(strings)} strings, {len(wrong)} with other ids ({marks} marks, {bytes_} with '<0x')")


def _has_marks(text: str) -> bool:
    parts = unicodedata.normalize("NFKD", text)
    return any(unicodedata.combining(one) and unicodedata.combining(two) for one, two in zip(parts, parts[1:]))


if __name__ == "__main__":
    main()
