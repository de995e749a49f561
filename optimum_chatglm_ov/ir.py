# SPDX-License-Identifier: Apache-2.0
"""What the folder of an exported model is: its files, its configuration, the precision of its weights."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openvino as ov
from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig

from . import native
from .architectures.families import (
    GENERATIONS_OF_RANKS,
    MODEL_TYPES_OF_TRANSFORMERS,
    rope_ratio_type_of_generation,
)
from .architectures.registry import architecture_of
from .checkpoint.shards import WEIGHT_FILES
from .configuration import ChatGLMConfig
from .errors import ExportError
from .integrations.recognition import read_config
from .output import complete_folder


logger = logging.getLogger(__name__)

MODEL_FILE = "openvino_model.xml"
OPENVINO_MODEL_FILES = (MODEL_FILE, "openvino_model.bin")
# Everything but weights that loading a checkpoint or an exported model can ask for. Never a Python file.
CONFIGURATION_FILES = (
    "config.json",
    "generation_config.json",
    "openvino_config.json",
    "ice_text.model",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TOKENIZER_MODEL, DETOKENIZER_MODEL = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
OPENVINO_TOKENIZER_FILES = tuple(
    str(Path(name).with_suffix(suffix)) for name in (TOKENIZER_MODEL, DETOKENIZER_MODEL) for suffix in (".xml", ".bin")
)
# Of OpenVINO Model Server.
GRAPH_FILE, SERVER_CONFIG_FILE = "graph.pbtxt", "model_server.json"
# What an export may write: none of it is left over from an earlier one in the same folder.
_EXPORTED_FILES = frozenset(
    (*CONFIGURATION_FILES, *OPENVINO_MODEL_FILES, *OPENVINO_TOKENIZER_FILES, GRAPH_FILE, SERVER_CONFIG_FILE)
)
# Element type of the weights' constants -> format.
_NARROWEST_FIRST = {
    "nf4": "nf4",
    "f4e2m1": "mxfp4",
    "u4": "int4",
    "i4": "int4",
    "u8": "int8",
    "i8": "int8",
    "f16": "fp16",
    "bf16": "bf16",
}


def has_openvino_model(folder: str | Path) -> bool:
    """Tells whether `folder` holds an exported model (`openvino_model.xml` and `.bin`)."""
    return all((Path(folder) / name).is_file() for name in OPENVINO_MODEL_FILES)


def is_fused(folder: str | Path) -> bool:
    """Tells whether the exported model in `folder` holds the fused attention operation of this package."""
    return native.is_fused(Path(folder) / MODEL_FILE)


def weight_precision(model: ov.Model) -> str:
    """Finds the narrowest format among the weights of `model`: one of `QUANTIZED_FORMATS`, "fp16", "bf16" or "fp32".

    Matrices alone are counted, so shapes, axes and scales do not tell.
    """
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    types = [(node.get_element_type().get_type_name(), len(node.get_output_shape(0))) for node in constants]
    if ("f8e4m3", 1) in types:  # the 16 numbers that the matrices of cb4 are indices of
        return "cb4"
    found = {name for name, rank in types if rank >= 2}
    return next((name for element_type, name in _NARROWEST_FIRST.items() if element_type in found), "fp32")


def model_folder(output: str | Path) -> AbstractContextManager[Path]:
    """Makes a `complete_folder` for a model, with nothing left over of an earlier one.

    Raises:
        ExportError: `output` holds original weights; or see `complete_folder`.
    """
    folder = Path(os.path.realpath(output))
    weights = next((folder / name for name in WEIGHT_FILES if os.path.lexists(folder / name)), None)
    if weights is not None:
        raise ExportError(
            f"{output}: a model written here would replace the configuration and tokenizer of the original weights "
            f"{weights}. Choose another output folder."
        )
    return complete_folder(folder, replaces=_EXPORTED_FILES)


def load_config(source: Path, rope_ratio_type: str | None = None, tokenizer: Any = None) -> PretrainedConfig:
    """Loads the configuration in folder `source`, where the tokenizer, too, tells what `rope_ratio` means.

    Raises:
        CheckpointError: config.json is missing, not JSON or of another model type.
        ValueError: nothing tells what `rope_ratio` means, the configuration and the tokenizer contradict, or a key
            asks for what its architecture has not.
    """
    found = read_config(source)
    model_type = found.get("model_type")
    if model_type in MODEL_TYPES_OF_TRANSFORMERS:
        if rope_ratio_type:
            raise ValueError(f"`rope_ratio_type` is a key of ChatGLM, and {source} is a {model_type}. Leave it out.")
        config = CONFIG_MAPPING[model_type].from_pretrained(source)
    else:
        given = {"rope_ratio_type": rope_ratio_type} if rope_ratio_type else {}
        config = ChatGLMConfig.from_pretrained(source, **given)
        is_told = rope_ratio_type or found.get("rope_ratio_type")
        if getattr(config, "rope_ratio", None) not in (None, 1) and not is_told:
            config.rope_ratio_type = _agreed_rope_ratio_type(config, tokenizer)
            config.rope_theta  # noqa: B018  raises the explanation where nothing tells
    architecture_of(config).settle_config()
    return config


def _agreed_rope_ratio_type(config: ChatGLMConfig, tokenizer: Any) -> str | None:
    """Finds out what `rope_ratio` means by the configuration and by the tokenizer.

    Raises:
        ValueError: they contradict each other.
    """
    by_config, generation = config.rope_ratio_type, getattr(tokenizer, "chatglm_generation", None)
    if generation is None or getattr(tokenizer, "generation_is_assumed", False):
        return by_config
    by_tokenizer = rope_ratio_type_of_generation(generation)
    if by_tokenizer in (None, by_config):
        return by_config
    if by_config is not None and generation not in GENERATIONS_OF_RANKS:  # whose vocabulary leaves no doubt
        raise ValueError(
            f"What `rope_ratio`={config.rope_ratio} means is contradictory: the tokenizer is that of {generation}, "
            f"which makes it {by_tokenizer!r}, and config.json (`_name_or_path` {config.original_name_or_path!r}, "
            f"`padded_vocab_size` {config.padded_vocab_size}) makes it {by_config!r}. Decide with "
            'rope_ratio_type="linear" (positions are divided by it) or rope_ratio_type="theta" (the rotary base is '
            "multiplied by it), in config.json or as an argument of the export (`--rope-ratio-type` on the command "
            "line)."
        )
    logger.info(f"rope_ratio={config.rope_ratio} is read as {by_tokenizer!r}, from the {generation} tokenizer.")
    return by_tokenizer


def end_turns(generation_config: GenerationConfig, tokenizer: Any) -> None:
    """Lets generation stop at every id that ends a turn, beside those that `generation_config` names.

    Also of a base model: it hardly generates one, and a chat model that was made of it keeps its name.
    """
    named = generation_config.eos_token_id
    named = named if isinstance(named, list) else [] if named is None else [named]
    ids = list(dict.fromkeys([*named, *getattr(tokenizer, "turn_end_ids", ())]))
    if ids:
        generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]


def log_ignored_cache(file: Path) -> None:
    """Logs that a file would compute every token of an answer from the first, and that this is ignored."""
    logger.warning(
        f'{file}: "use_cache": false, as training leaves it, is ignored: every token would cost a pass over the whole '
        "text. Load the model with `use_cache=False` if that is meant."
    )
