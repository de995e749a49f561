# SPDX-License-Identifier: Apache-2.0
"""The defaults of `generate` that an exported model comes with."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from ..errors import CheckpointError
from ..ir import end_turns, log_ignored_cache
from ..unsupported import check_settings


logger = logging.getLogger(__name__)

# Settings of a generation that count in one mode alone.
_OF_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
_OF_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty", "constraints")
_OF_RETURNED_DICT = ("output_attentions", "output_hidden_states", "output_logits", "output_scores")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_OTHER_CACHES = ("cache_implementation", "cache_config", "return_legacy_cache")


def read_generation_config(source: Path, config: PretrainedConfig, tokenizer: Any) -> GenerationConfig:
    """Reads the defaults of `generate` in folder `source`, without what has no effect or would spoil every answer.

    They name every id that ends a turn.

    Raises:
        CheckpointError: generation_config.json cannot be read, or asks for what this model or transformers refuses.
    """
    file = source / "generation_config.json"
    if file.is_file():
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
            without_effect = _without_effect(settings)
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{file}: not a JSON object ({error}). Download it again.") from error
    else:
        file = source / "config.json"
        settings = {key: getattr(config, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        without_effect = _without_effect(settings)
    if settings.pop("use_cache", True) is False or not config.use_cache:
        log_ignored_cache(file if config.use_cache else source / "config.json")
    if without_effect:
        logger.info(f"{file}: without effect and left out: {', '.join(without_effect)}.")
    settings = {name: value for name, value in settings.items() if name not in without_effect}
    try:
        _check(settings)
        generation_config = GenerationConfig.from_dict(settings)
        check_settings(generation_config)
        if tokenizer is not None:
            end_turns(generation_config, tokenizer)
        with TemporaryDirectory(prefix="optimum_chatglm_ov-") as folder:
            generation_config.save_pretrained(folder)  # strict, as when the model is written
    except (TypeError, ValueError) as error:  # transformers compares before it looks at types
        raise CheckpointError(f"{file}: no text can be generated with it. Mend or remove the file. {error}") from error
    return generation_config


def _check(settings: Mapping[str, Any]) -> None:
    """Refuses settings with which every call of `generate` would fail.

    Raises:
        ValueError: one of `settings`, which are without those that have no effect.
    """
    for name in _IDS:
        value: Any = settings.get(name)
        several = name == "eos_token_id" and isinstance(value, list)
        ids: list[Any] = value if several else [] if value is None else [value]
        if not all(_is_number(token_id) and token_id >= 0 for token_id in ids):
            raise ValueError(f"`{name}` is {value!r}; expected the id of a token.")
    if settings.get("do_sample") and settings.get("temperature") is not None and not settings["temperature"] > 0:
        raise ValueError(f"`temperature` is {settings['temperature']}; expected more than 0 with `do_sample`.")
    if (settings.get("num_beam_groups") or 1) > 1:
        raise ValueError("`num_beam_groups`: not every version of transformers has groups of beams. Leave it out.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _without_effect(settings: Mapping[str, Any]) -> list[str]:
    """Names the settings that only count in a mode which the others do not choose.

    transformers does not save those, and some versions do not even read them.
    """
    names = set(_OF_OTHER_CACHES)  # keys and values stay inside this model
    has_beams = (settings.get("num_beams") or 1) > 1
    if not settings.get("do_sample"):
        names |= set(_OF_SAMPLING)
    if not has_beams:
        names |= set(_OF_BEAMS)
        if settings.get("num_beams") is None:
            names.add("num_beams")
    if not (settings.get("do_sample") or has_beams) or settings.get("num_return_sequences") is None:
        names.add("num_return_sequences")
    if not settings.get("return_dict_in_generate"):
        names |= set(_OF_RETURNED_DICT)
    for name, value in settings.items():
        if value in ([], {}) or (name in _IDS and _is_number(value) and value < 0):  # nothing is named
            names.add(name)
    return sorted(names & settings.keys())
