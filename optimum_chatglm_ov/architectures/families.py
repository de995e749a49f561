# SPDX-License-Identifier: Apache-2.0
"""The families of ChatGLM checkpoints, and what the name of one tells."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Checkpoints that compute, are prompted and sample alike.

    Args:
        name: what this family is called here.
        pattern: found in the name of its checkpoints, and of those made from them; upper and lower case are the same.
        generation: whose tokenizer and prompts it has.
        architecture: what it computes: the module of this folder that defines it.
        model_type: of its configurations.
        rope_ratio_type: what a `rope_ratio` other than 1 means, see `ChatGLMConfig`; `None`: it has none.
        query_log_scaling: see `ChatGLMConfig`.
        max_length, top_p, temperature: defaults of `chat()`; `max_length` counts prompt and answer.
        scales_rope: of its generation, only this family has a `rope_ratio` other than 1.
        context_above: of its generation, only this family has a longer context.
    """

    name: str
    pattern: str
    generation: str
    architecture: str = "chatglm2"
    model_type: str = "chatglm"
    rope_ratio_type: str | None = None
    query_log_scaling: bool = False
    max_length: int = 8192
    top_p: float = 0.8
    temperature: float = 0.8
    scales_rope: bool = False
    context_above: int = 0


# A number that goes on, or that counts bits, is no generation: chatglm-20230412, chatglm-4bit.
_END = r"(?!\d|[-_]?bit)"
# Of one generation, what is told apart by more comes first.
FAMILIES = (
    Family(
        "chatglm2-6b-32k",
        rf"chatglm[-_]?v?2{_END}.*32k",
        "chatglm2",
        rope_ratio_type="linear",
        max_length=32768,
        scales_rope=True,
    ),
    Family("chatglm2-6b", rf"chatglm[-_]?v?2{_END}", "chatglm2", rope_ratio_type="linear"),
    Family("codegeex2-6b", rf"codegeex[-_]?2{_END}", "chatglm2"),
    Family(
        "chatglm3-6b-128k",
        rf"chatglm[-_]?v?3{_END}.*128k",
        "chatglm3",
        rope_ratio_type="theta",
        query_log_scaling=True,
        max_length=131072,
        top_p=0.7,
        temperature=0.95,
        context_above=32768,
    ),
    Family("chatglm3-6b", rf"chatglm[-_]?v?3{_END}", "chatglm3", rope_ratio_type="theta"),
    Family("codegeex4-all-9b", rf"codegeex[-_]?4{_END}", "codegeex4", rope_ratio_type="theta"),
    Family("glm-4-9b", rf"glm[-_]?4{_END}|longwriter|longcite", "glm4", rope_ratio_type="theta"),
    Family("chatglm-6b", r"chatglm[-_]?6b", "chatglm", "chatglm", max_length=2048, top_p=0.7, temperature=0.95),
    Family("glm-4-9b-chat-hf", r"glm[-_]?4[-_]9b.*hf|glm[-_]edge", "glm-hf", architecture="glm", model_type="glm"),
    Family("glm-4-0414", r"glm[-_]?(?:4|z1)[-_].*0414", "glm-0414", architecture="glm4", model_type="glm4"),
)
ARCHITECTURES = frozenset(family.architecture for family in FAMILIES)
MODEL_TYPES = frozenset(family.model_type for family in FAMILIES)
# Whose configurations, torch classes and tokenizers transformers has.
MODEL_TYPES_OF_TRANSFORMERS = MODEL_TYPES - {"chatglm"}
# Of the tokenizers of this package; others come with their checkpoints.
GENERATIONS = ("chatglm", "chatglm2", "chatglm3", "glm4", "codegeex4")
# One vocabulary has been published for these, larger than any other.
GENERATIONS_OF_RANKS = ("glm4", "codegeex4")
LARGEST_SENTENCEPIECE_VOCABULARY = 100_000
# The one that has been published for ChatGLM2 and ChatGLM3; what has fewer tokens is no published checkpoint.
SENTENCEPIECE_VOCABULARY = 65_024


def model_name(name_or_path: str) -> str:
    """Reads the name in a Hub id, a path (with either slash) or a folder of the Hub's cache: its last part alone.

    What the folders above are called says nothing about a model, whoever made them.
    """
    path = posixpath.normpath(name_or_path.strip().replace("\\", "/")) if name_or_path.strip() else ""
    cached = re.search(r"(?:^|/)models--([^/]+)(?:/snapshots/[^/]+)?$", path)
    return cached[1].rpartition("--")[2] if cached else path.rpartition("/")[2]


def family_of_name(name_or_path: str, generations: Collection[str] = GENERATIONS) -> Family | None:
    """Finds the family among those of `generations` that a name tells; `None`: it tells none, or two generations."""
    name = model_name(name_or_path)
    found = [
        family
        for family in FAMILIES
        if family.generation in generations and re.search(family.pattern, name, re.IGNORECASE)
    ]
    return found[0] if len({family.generation for family in found}) == 1 else None


def family_of_generation(generation: str, rope_ratio: float | None, context_length: int) -> Family:
    """Finds the family of a generation that has such a `rope_ratio` and context length."""
    return next(
        family
        for family in FAMILIES
        if family.generation == generation
        and (rope_ratio not in (None, 1) or not family.scales_rope)
        and context_length > family.context_above
    )


def rope_ratio_type_of_generation(generation: str) -> str | None:
    """Tells what `rope_ratio` means in all families of a generation that have one."""
    types = {family.rope_ratio_type for family in FAMILIES if family.generation == generation} - {None}
    return types.pop() if len(types) == 1 else None
