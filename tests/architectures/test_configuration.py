# SPDX-License-Identifier: Apache-2.0
"""One configuration class for every config.json: names, defaults, and refusals."""

import json
import logging

import pytest
from conftest import DATA
from transformers import AutoConfig

from optimum_chatglm_ov import ChatGLMConfig, CheckpointError
from optimum_chatglm_ov.ir import load_config


def original(name, **changes):
    values = json.loads((DATA / "models" / name / "config.json").read_text())
    return {key: value for key, value in {**values, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatglm-6b", dict(architecture="chatglm", num_hidden_layers=28, num_key_value_heads=4, rope_theta=1e4)),
        ("chatglm2-6b", dict(architecture="chatglm2", num_key_value_heads=2, head_dim=16, rope_theta=1e4)),
        ("chatglm2-flags-mha-layernorm", dict(num_key_value_heads=4, rmsnorm=False)),
        ("chatglm2-6b-32k", dict(rope_ratio_type="linear", rope_theta=1e4, rope_position_scale=16)),
        ("chatglm3-6b-32k", dict(rope_ratio_type="theta", rope_theta=5e5, rope_position_scale=1)),
        ("chatglm3-6b-128k", dict(rope_theta=5e6, query_log_scaling=True, max_position_embeddings=131072)),
        ("glm-4-9b-chat", dict(rope_theta=5e6, query_log_scaling=False, vocab_size=640, eos_token_id=[556, 563, 565])),
    ],
)
def test_reads_original_files(name, expected, tmp_path):
    config = AutoConfig.from_pretrained(DATA / "models" / name)
    assert type(config) is ChatGLMConfig
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    for key, value in expected.items():
        assert getattr(config, key) == getattr(again, key) == value, key
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("chatglm-6b", {"position_encoding_2d": False}, "position_encoding_2d"),
        ("chatglm2-6b", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("chatglm2-6b", {"quantization_bit": 3}, "quantization_bit"),
        ("chatglm2-6b", {"multi_query_group_num": 3}, "multi_query_group_num"),
        ("chatglm2-6b", {"num_hidden_layers": 7}, "num_hidden_layers"),
        ("chatglm3-6b-32k", {"rope_ratio_type": "ntk"}, "rope_ratio_type"),
        ("chatglm3-6b-32k", {"rope_ratio": -1}, "rope_ratio"),
    ],
)
def test_refuses_what_it_cannot_honour(name, changes, named):
    with pytest.raises(ValueError, match=named):
        ChatGLMConfig(**original(name, **changes))


def test_rope_ratio_without_a_name_is_not_guessed():
    values = original("chatglm2-6b-32k", _name_or_path=...)
    with pytest.raises(ValueError, match="rope_ratio_type"):
        ChatGLMConfig(**values).rope_theta  # noqa: B018
    assert ChatGLMConfig(**values, rope_ratio_type="theta").rope_theta == 16e4
    assert ChatGLMConfig(**values, rope_ratio_type="linear").rope_position_scale == 16


def test_the_tokenizer_tells_what_rope_ratio_means(tmp_path, caplog):
    class RoleTokens:
        chatglm_generation = "chatglm3"

    (tmp_path / "config.json").write_text(json.dumps(original("chatglm3-6b-32k", _name_or_path="./finetuned")))
    with caplog.at_level(logging.INFO, logger="optimum_chatglm_ov"):
        assert load_config(tmp_path, None, RoleTokens()).rope_theta == 5e5
    assert "rope_ratio=50" in caplog.text
    with pytest.raises(ValueError, match="rope_ratio_type"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["chatglm-6b-3layer-untied", "chatglm2-6b"])
@pytest.mark.parametrize("change", [{"num_layers": "2"}, {"hidden_size": 64.0}, {"num_attention_heads": None}])
def test_sizes_are_whole_numbers(change, name):
    ((key, value),) = change.items()
    with pytest.raises(ValueError, match=f"`{key}` is {value!r}; expected a whole number"):
        ChatGLMConfig(**original(name, **change))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "not found"), ("{", "not valid JSON"), ('{"model_type": "llama"}', "'llama', expected 'chatglm'")],
)
def test_unusable_config_json(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message) as failure:
        load_config(tmp_path)
    assert str(tmp_path / "config.json") in str(failure.value)
