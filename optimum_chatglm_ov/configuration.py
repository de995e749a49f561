# SPDX-License-Identifier: Apache-2.0
"""One configuration for the whole ChatGLM family, read from the original `config.json` as it is."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PretrainedConfig

from .architectures.families import (
    FAMILIES,
    GENERATIONS,
    GENERATIONS_OF_RANKS,
    LARGEST_SENTENCEPIECE_VOCABULARY,
    SENTENCEPIECE_VOCABULARY,
    Family,
    family_of_generation,
    family_of_name,
)


logger = logging.getLogger(__name__)

# Standard attribute name -> key of chatglm-6b, key of chatglm2-6b and everything after it.
_ORIGINAL_KEYS = {
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "num_hidden_layers": ("num_layers", "num_layers"),
    "intermediate_size": ("inner_hidden_size", "ffn_hidden_size"),
    "max_position_embeddings": ("max_sequence_length", "seq_length"),
    "head_dim": ("kv_channels", "kv_channels"),
    "rms_norm_eps": ("layernorm_epsilon", "layernorm_epsilon"),
}

# Defaults of the original configuration classes: a key missing from config.json has these values there.
_DEFAULTS_CHATGLM = {
    "vocab_size": 150528,
    "hidden_size": 4096,
    "num_layers": 28,
    "num_attention_heads": 32,
    "layernorm_epsilon": 1e-5,
    "bos_token_id": 150004,
    "eos_token_id": 150005,
    "mask_token_id": 150000,
    "gmask_token_id": 150001,
    "pad_token_id": 0,
    "max_sequence_length": 2048,
    "inner_hidden_size": 16384,
    "position_encoding_2d": True,
    "tie_word_embeddings": True,
    "quantization_bit": 0,
    "pre_seq_len": None,
    "prefix_projection": False,
}
_DEFAULTS_CHATGLM2 = {
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 2048,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "tie_word_embeddings": False,
    "rope_ratio": 1,
    "quantization_bit": 0,
    "pre_seq_len": None,
    "prefix_projection": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_SIZES = (
    "ffn_hidden_size",
    "hidden_size",
    "inner_hidden_size",
    "kv_channels",
    "max_sequence_length",
    "multi_query_group_num",
    "num_attention_heads",
    "num_layers",
    "padded_vocab_size",
    "seq_length",
    "vocab_size",
)
_MARKS_OF_CHATGLM = ("inner_hidden_size", "position_encoding_2d", "gmask_token_id", "max_sequence_length")


class ChatGLMConfig(PretrainedConfig):
    r"""Configuration of every ChatGLM generation.

    The keys of the original `config.json` are kept under their own names (and saved under them); the names the rest
    of the ecosystem uses (`num_hidden_layers`, `num_key_value_heads`, `head_dim`, `intermediate_size`,
    `max_position_embeddings`, `vocab_size`, `rope_theta`) are read-only properties, also accepted as arguments.

    Keys that this class adds:

    - **rope_ratio_type** (`"linear"`, `"theta"` or `None`): what `rope_ratio` means. chatglm2-6b-32k divides
      positions by it (`"linear"`), chatglm3-6b-32k/128k and GLM-4 multiply the rotary base by it (`"theta"`). When it
      is not given it follows from the vocabulary, else from the model's name in `_name_or_path` (its last part);
      `None` means that neither tells, and reading [`~ChatGLMConfig.rope_theta`] then raises.
    - **query_log_scaling** (`bool`): queries at position i are multiplied by `max(1, ln(i + 65) / ln 2048)`,
      as chatglm3-6b-128k does.

    Raises:
        ValueError: a key asks for mathematics that no ChatGLM checkpoint has, or two keys contradict each other.
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **kwargs: Any):
        for key in ("auto_map", "custom_pipelines"):  # point at remote code, which is never used
            kwargs.pop(key, None)
        kwargs.pop("model_type", None)  # null in some files
        for key in ("rope_scaling", "rope_theta"):
            if kwargs.get(key) is not None:
                raise ValueError(
                    f"`{key}`={kwargs[key]} is not a key of ChatGLM, which scales its rotary embedding by "
                    "`rope_ratio` and `rope_ratio_type`; remove it from config.json and set those."
                )
            kwargs.pop(key, None)
        self.architecture = kwargs.pop("architecture", None) or (
            "chatglm" if any(key in kwargs for key in _MARKS_OF_CHATGLM) else "chatglm2"
        )
        if self.architecture not in ("chatglm", "chatglm2"):
            raise ValueError(
                f"`architecture` is {self.architecture!r}; expected 'chatglm' (chatglm-6b) or 'chatglm2'."
            )
        _accept_standard_names(kwargs, 0 if self.architecture == "chatglm" else 1)

        defaults = _DEFAULTS_CHATGLM if self.architecture == "chatglm" else _DEFAULTS_CHATGLM2
        original = {key: kwargs.pop(key, default) for key, default in defaults.items()}
        for key in _SIZES:
            if key in original and (type(original[key]) is not int or original[key] < 1):
                raise ValueError(f"`{key}` is {original[key]!r}; expected a whole number, 1 or more.")
        for key in ("layernorm_epsilon", "rope_ratio"):
            if not isinstance(original.get(key), (int, float, type(None))):
                raise ValueError(f"`{key}` is {original[key]!r}; expected a number.")
        rope_ratio_type = kwargs.pop("rope_ratio_type", None)
        query_log_scaling = kwargs.pop("query_log_scaling", None)
        # `_name_or_path` as the checkpoint's authors wrote it; transformers overwrites the attribute when loading.
        original_name = str(kwargs.pop("original_name_or_path", None) or kwargs.get("_name_or_path") or "")

        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(**kwargs)
        # After super(): transformers >= 5 drops token ids given to the base class.
        for key, value in original.items():
            setattr(self, key, value)
        self.is_encoder_decoder = False
        self.original_name_or_path = original_name

        if self.architecture == "chatglm2":
            self.rope_ratio_type = rope_ratio_type or self._infer_rope_ratio_type()
            self.query_log_scaling = (
                query_log_scaling if query_log_scaling is not None else self._infer_query_log_scaling()
            )
        self._validate()

    @property
    def has_vocabulary_of_ranks(self) -> bool:
        """Tells whether the vocabulary is that of GLM-4 and CodeGeeX4, which is larger than any other."""
        return self.architecture == "chatglm2" and self.padded_vocab_size > LARGEST_SENTENCEPIECE_VOCABULARY

    @property
    def generations(self) -> tuple[str, ...]:
        """The generations that this may be of by its architecture and vocabulary, the oldest first."""
        if self.has_vocabulary_of_ranks:
            return GENERATIONS_OF_RANKS
        families = [family for family in FAMILIES if family.architecture == self.architecture]
        found = dict.fromkeys(family.generation for family in families)
        return tuple(generation for generation in found if generation not in GENERATIONS_OF_RANKS)

    def named_family(self) -> Family | None:
        """Finds the family that the name tells, unless the vocabulary contradicts."""
        is_told = self.architecture == "chatglm2" and self.padded_vocab_size >= SENTENCEPIECE_VOCABULARY
        return family_of_name(self.original_name_or_path, self.generations if is_told else GENERATIONS)

    def _infer_rope_ratio_type(self) -> str | None:
        if self.rope_ratio in (None, 1) or self.has_vocabulary_of_ranks:
            return "theta"  # GLM-4 and CodeGeeX4 always scale the base
        family = self.named_family()
        if family is None or family.rope_ratio_type is None:
            return None
        logger.info(
            f"rope_ratio={self.rope_ratio} is read as {family.rope_ratio_type!r}, from the name "
            f"{self.original_name_or_path!r}; override it with `rope_ratio_type`."
        )
        return family.rope_ratio_type

    def _infer_query_log_scaling(self) -> bool:
        """Recognises chatglm3-6b-128k: a context beyond 32k with the vocabulary of ChatGLM2 and 3."""
        family = self.named_family()
        if self.has_vocabulary_of_ranks or family is not None and family.generation != "chatglm3":
            return False
        if family is not None and family.query_log_scaling:
            return True
        found = family_of_generation("chatglm3", self.rope_ratio, self.seq_length).query_log_scaling
        if found:
            logger.warning(
                f"seq_length={self.seq_length}: queries are scaled by the logarithm of their position as in "
                "chatglm3-6b-128k; set `query_log_scaling` to false in config.json if this model does not."
            )
        return found

    def _validate(self) -> None:
        if self.hidden_size % self.num_attention_heads and self.architecture == "chatglm":
            raise ValueError(
                f"`hidden_size`={self.hidden_size} is not a multiple of "
                f"`num_attention_heads`={self.num_attention_heads}."
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads`={self.num_attention_heads} is not a multiple of "
                f"`multi_query_group_num`={self.num_key_value_heads}."
            )
        if self.head_dim % 4:
            raise ValueError(f"A head dimension of {self.head_dim} was found; expected a multiple of 4.")
        if self.quantization_bit not in (0, 4, 8, None):
            raise ValueError(f"`quantization_bit` is {self.quantization_bit}; expected 0 (none), 4 or 8.")
        if self.architecture == "chatglm":
            if not self.position_encoding_2d:
                raise ValueError(
                    "`position_encoding_2d` is false; no published ChatGLM-6B has one-dimensional positions, "
                    "and the export supports only `position_encoding_2d: true`."
                )
            return
        if self.tie_word_embeddings:
            raise ValueError(
                "`tie_word_embeddings` is true, but ChatGLM2 and later never tie their output layer to the embedding; "
                "set it to false."
            )
        if self.rope_ratio_type not in ("linear", "theta", None):
            raise ValueError(f"`rope_ratio_type` is {self.rope_ratio_type!r}; expected 'linear' or 'theta'.")
        if self.rope_ratio is not None and self.rope_ratio <= 0:
            raise ValueError(f"`rope_ratio` is {self.rope_ratio}; expected a positive number.")

    # The ecosystem's names -----------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Reads a standard name from the original key (called only when normal lookup fails)."""
        keys = _ORIGINAL_KEYS.get(name)
        if keys is not None and "architecture" in self.__dict__:
            key = keys[0 if self.architecture == "chatglm" else 1]
            if key in self.__dict__:
                return self.__dict__[key]
            if name == "head_dim":
                return self.hidden_size // self.num_attention_heads
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def num_key_value_heads(self) -> int:
        """Number of key/value heads: the query groups of ChatGLM2 and later, else one per attention head."""
        grouped = self.architecture == "chatglm2" and self.multi_query_attention
        return self.multi_query_group_num if grouped else self.num_attention_heads

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies.

        Raises:
            ValueError: `rope_ratio` is not 1 and nothing tells what it means.
        """
        return 10000.0 * (self.rope_ratio if self._rope_ratio_applies_to("theta") else 1)

    @property
    def rope_position_scale(self) -> float:
        """What positions are divided by before the rotary embedding (position interpolation, 1 = none)."""
        return float(self.rope_ratio) if self._rope_ratio_applies_to("linear") else 1.0

    def _rope_ratio_applies_to(self, rope_ratio_type: str) -> bool:
        if self.architecture == "chatglm" or self.rope_ratio in (None, 1):
            return False
        if self.rope_ratio_type is None:
            raise ValueError(
                f"config.json has `rope_ratio`={self.rope_ratio}, which chatglm2-6b-32k uses to divide positions and "
                "later models to multiply the rotary base, and neither `_name_or_path` "
                f"{self.original_name_or_path!r} with `padded_vocab_size` {self.padded_vocab_size} nor the tokenizer "
                'tells which this checkpoint is. Set `rope_ratio_type` to "linear" (positions) or "theta" (base) in '
                "config.json or pass it to the export (`--rope-ratio-type` on the command line)."
            )
        return self.rope_ratio_type == rope_ratio_type


def _accept_standard_names(kwargs: dict[str, Any], column: int) -> None:
    """Moves standard names in `kwargs` to the original key; raises `ValueError` when both are there and differ."""
    for name, keys in _ORIGINAL_KEYS.items():
        key = keys[column]
        if name == key or name not in kwargs:
            continue
        value = kwargs.pop(name)
        if kwargs.setdefault(key, value) != value:
            raise ValueError(f"`{name}`={value} and `{key}`={kwargs[key]} contradict each other; they name one thing.")
    groups = kwargs.pop("num_key_value_heads", None)
    if groups is not None and column == 0:
        if groups != kwargs.get("num_attention_heads", _DEFAULTS_CHATGLM["num_attention_heads"]):
            raise ValueError(f"`num_key_value_heads`={groups}, but ChatGLM-6B has one per attention head; remove it.")
    elif groups is not None:
        if kwargs.setdefault("multi_query_group_num", groups) != groups and kwargs.get("multi_query_attention", True):
            raise ValueError(
                f"`num_key_value_heads`={groups} and `multi_query_group_num`={kwargs['multi_query_group_num']} "
                "contradict each other; they name one thing."
            )
        kwargs.setdefault("multi_query_attention", True)
