# SPDX-License-Identifier: Apache-2.0
"""What the name of a checkpoint tells, and what outranks it."""

import json
import logging
import shutil

import pytest
from tokenization_cases import DATA, folder
from transformers import AutoTokenizer

from optimum_chatglm_ov import ChatGLMConfig
from optimum_chatglm_ov.architectures.families import FAMILIES, GENERATIONS, family_of_name, model_name
from optimum_chatglm_ov.ir import load_config
from optimum_chatglm_ov.tokenization import (
    ChatGLM2Tokenizer,
    ChatGLM3Tokenizer,
    ChatGLM4Tokenizer,
    TokenizerError,
    load_tokenizer,
)
from optimum_chatglm_ov.tokenization.codegeex4 import CodeGeeX4Tokenizer


HASH = "0123456789012345678901234567890123456789"
NAMES = [
    ("THUDM/chatglm2-6b", "chatglm2-6b"),
    ("/home/u/ChatGLM3/chatglm2-6b", "chatglm2-6b"),
    ("/home/u/ChatGLM3/chatglm2-6b/", "chatglm2-6b"),
    ("C:\\models\\ChatGLM3\\chatglm2-6b\\", "chatglm2-6b"),
    ("./ChatGLM3/../chatglm2-6b/.", "chatglm2-6b"),
    (f"/home/ChatGLM3/hub/models--THUDM--chatglm2-6b/snapshots/{HASH}", "chatglm2-6b"),
    (f"models--THUDM--chatglm2-6b/snapshots/{HASH}/", "chatglm2-6b"),
    ("/cache/models--chatglm3-fans--chatglm2-6b", "chatglm2-6b"),
    (f"C:\\hub\\models--THUDM--chatglm2-6b\\snapshots\\{HASH}", "chatglm2-6b"),
    ("/home/u/chatglm2-6b/checkpoint-100", "checkpoint-100"),
    ("", ""),
]


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_the_last_part_of_a_path_is_the_name(path, name):
    assert model_name(path) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("THUDM/chatglm-6b-int4", "chatglm-6b"),
        ("THUDM/chatglm2-6b-32k-int4", "chatglm2-6b-32k"),
        ("ChatGLM2_6B_sft", "chatglm2-6b"),
        ("THUDM/chatglm3-6b-32k", "chatglm3-6b"),
        ("THUDM/chatglm3-6b-128k", "chatglm3-6b-128k"),
        ("THUDM/glm-4-9b-chat-1m", "glm-4-9b"),
        ("THUDM/LongWriter-glm4-9b", "glm-4-9b"),
        ("THUDM/codegeex2-6b", "codegeex2-6b"),
        ("THUDM/codegeex4-all-9b", "codegeex4-all-9b"),
        ("chatglm-4bit", None),
        ("chatglm-20230412", None),
        ("glm-45", None),
        ("chatglm2-or-chatglm3", None),
        ("chatglm2/finetuned", None),
    ],
)
def test_families_by_name(name, expected):
    family = family_of_name(name)
    assert (family and family.name) == expected


def test_every_family_is_found_by_its_own_name():
    own = [family for family in FAMILIES if family.model_type == ChatGLMConfig.model_type]
    assert [family_of_name(family.name) for family in own] == own
    assert {family.generation for family in own} == set(GENERATIONS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("THUDM/glm-4-9b-chat-hf", "glm"),
        ("THUDM/glm-edge-1.5b-chat", "glm"),
        ("THUDM/GLM-4-9B-0414", "glm4"),
        ("zai-org/GLM-4-32B-Base-0414", "glm4"),
        ("THUDM/GLM-Z1-Rumination-32B-0414", "glm4"),
        ("THUDM/glm-4-9b-chat", None),
    ],
)
def test_families_with_tokenizers_of_transformers(name, expected):
    family = family_of_name(name, {"glm-hf", "glm-0414"})
    assert (family and family.model_type) == expected


# What rope_ratio means ---------------------------------------------------------------------------------------------


def checkpoint(target, model, tokenizer, tokenizer_config=None, **changes):
    """A folder with the configuration of one golden model, changed, and the tokenizer of another."""
    shutil.copytree(folder(tokenizer), target)
    values = json.loads((DATA / "models" / model / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    if tokenizer_config is not None:
        (target / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return target


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/home/u/glm-4/THUDM/chatglm3-6b-32k", "theta"),
        ("/home/u/glm-4/THUDM/chatglm2-6b-32k/", "linear"),
        (f"/hub/chatglm3/models--THUDM--chatglm2-6b-32k/snapshots/{HASH}", "linear"),
        (f"C:\\chatglm2\\models--THUDM--chatglm3-6b-32k\\snapshots\\{HASH}", "theta"),
        ("/home/u/chatglm2-6b-32k/checkpoint-100", None),
        ("chatglm2-or-chatglm3", None),
    ],
)
def test_only_the_name_tells_what_rope_ratio_means(name, expected):
    assert ChatGLMConfig(rope_ratio=16, _name_or_path=name).rope_ratio_type == expected


@pytest.mark.parametrize("name", ["THUDM/glm-4-9b-chat", "THUDM/codegeex4-all-9b", "/ChatGLM2-6B/glm-4-9b"])
def test_a_name_that_the_vocabulary_contradicts_tells_nothing(name, tmp_path):
    for vocabulary, expected in ((65024, None), (64, "theta"), (151552, "theta")):
        config = ChatGLMConfig(rope_ratio=16, _name_or_path=name, padded_vocab_size=vocabulary)
        assert config.rope_ratio_type == expected
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "chatglm", "rope_ratio": 16, "_name_or_path": name}))
    with pytest.raises(ValueError, match=f"'{name}' with `padded_vocab_size` 65024 .*Set `rope_ratio_type`"):
        load_config(tmp_path)
    assert load_config(tmp_path, "linear").rope_ratio_type == "linear"


def test_parent_folders_do_not_scale_queries():
    assert not ChatGLMConfig(_name_or_path="/chatglm3-6b-128k/chatglm3-6b", seq_length=8192).query_log_scaling
    assert ChatGLMConfig(_name_or_path="/glm-4/chatglm3-6b-128k", seq_length=8192).query_log_scaling


@pytest.mark.parametrize("name", ["THUDM/chatglm2-6b-32k", "THUDM/chatglm3-6b-128k"])
def test_the_vocabulary_outranks_the_name(name, tmp_path):
    config = ChatGLMConfig(rope_ratio=500, _name_or_path=name, padded_vocab_size=151552, seq_length=131072)
    assert (config.rope_ratio_type, config.query_log_scaling) == ("theta", False)
    path = checkpoint(tmp_path / "a", "glm-4-9b-chat", "models.glm-4-9b-chat", _name_or_path=name)
    assert load_config(path, None, AutoTokenizer.from_pretrained(path)).rope_ratio_type == "theta"


@pytest.mark.parametrize(
    ("model", "tokenizer_config"),
    [
        ("chatglm2-6b-32k", {"added_tokens_decoder": {"707": {"content": "<|assistant|>", "special": True}}}),
        ("chatglm2-6b-32k", {"chat_template": "{{ '<|assistant|>' }}"}),
        ("chatglm2-6b-32k", {"chatglm_generation": "chatglm3"}),
        ("chatglm3-6b-32k", {"chatglm_generation": "chatglm2"}),
    ],
)
def test_contradicting_evidence_is_refused(model, tokenizer_config, tmp_path):
    config = {"tokenizer_class": "ChatGLMTokenizer", **tokenizer_config}
    path = checkpoint(tmp_path / "a", model, "models.chatglm3-6b", config)
    tok = AutoTokenizer.from_pretrained(path)
    with pytest.raises(ValueError, match=r'contradictory.*rope_ratio_type="linear".*rope_ratio_type="theta"'):
        load_config(path, None, tok)
    for decision in ("linear", "theta"):
        assert load_config(path, decision, tok).rope_ratio_type == decision
    checkpoint(tmp_path / "b", model, "models.chatglm3-6b", config, rope_ratio_type="linear")
    assert load_config(tmp_path / "b", None, tok).rope_ratio_type == "linear"


@pytest.mark.parametrize(
    ("generation", "expected"), [("chatglm2", "linear"), ("chatglm3", "theta"), (None, "not known")]
)
def test_the_tokenizer_tells_where_the_name_does_not(generation, expected, tmp_path):
    config = {"tokenizer_class": "ChatGLMTokenizer", "chatglm_generation": generation}
    path = checkpoint(tmp_path / "a", "chatglm3-6b-32k", "models.chatglm3-6b", config, _name_or_path="./mine")
    tok = AutoTokenizer.from_pretrained(path)
    if generation is None:  # ChatGLM3 is assumed, with a warning; nobody has told it
        with pytest.raises(ValueError, match="rope_ratio_type"):
            load_config(path, None, tok)
    else:
        assert load_config(path, None, tok).rope_ratio_type == expected


# Which tokenizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["_name_or_path", "original_name_or_path"])
@pytest.mark.parametrize("path", [path for path, name in NAMES if name == "chatglm2-6b"])
def test_parent_folders_do_not_tell_the_generation(path, key, tmp_path, caplog):
    source = checkpoint(tmp_path / "a", "chatglm2-6b", "models.chatglm2-6b", {}, **{"_name_or_path": None, key: path})
    assert type(AutoTokenizer.from_pretrained(source)) is ChatGLM2Tokenizer
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_folder_of_the_hub_cache_tells_the_generation(tmp_path, caplog):
    path = tmp_path / "ChatGLM3" / "models--THUDM--chatglm2-6b" / "snapshots" / HASH
    path.parent.mkdir(parents=True)
    checkpoint(path, "chatglm2-6b", "models.chatglm2-6b", {}, _name_or_path=None)
    assert type(AutoTokenizer.from_pretrained(path)) is ChatGLM2Tokenizer
    assert not caplog.records


def test_a_stored_name_outranks_that_of_the_folder(tmp_path):
    path = checkpoint(tmp_path / "chatglm3-tests", "chatglm2-6b", "models.chatglm2-6b", {})
    assert type(AutoTokenizer.from_pretrained(path)) is ChatGLM2Tokenizer


def test_role_tokens_outrank_names(tmp_path):
    config = {"name_or_path": "THUDM/chatglm2-6b", "added_tokens_decoder": {"707": {"content": "<|assistant|>"}}}
    path = checkpoint(tmp_path / "chatglm2-6b", "chatglm2-6b", "models.chatglm2-6b", config)
    assert type(AutoTokenizer.from_pretrained(path)) is ChatGLM3Tokenizer


def test_contradicting_stored_names_are_refused(tmp_path):
    path = checkpoint(tmp_path / "a", "chatglm2-6b", "models.chatglm2-6b", {"name_or_path": "THUDM/chatglm3-6b"})
    with pytest.raises(TokenizerError, match="'THUDM/chatglm3-6b' and .*'THUDM/chatglm2-6b'.*`chatglm_generation`"):
        AutoTokenizer.from_pretrained(path)
    assert type(AutoTokenizer.from_pretrained(path, chatglm_generation="chatglm2")) is ChatGLM2Tokenizer


@pytest.mark.parametrize(
    ("stored", "folder_name", "expected"),
    [
        ("THUDM/codegeex4-all-9b", "a", CodeGeeX4Tokenizer),
        ("", "codegeex4-all-9b", CodeGeeX4Tokenizer),
        ("THUDM/glm-4-9b-chat", "codegeex4-or-not", ChatGLM4Tokenizer),
        ("/codegeex4/mine", "a", ChatGLM4Tokenizer),
    ],
)
@pytest.mark.parametrize("tokenizer_class", ["ChatGLM4Tokenizer", "ChatGLMTokenizer", None])
def test_codegeex4_is_told_by_its_name(stored, folder_name, expected, tokenizer_class, tmp_path):
    config = {} if tokenizer_class is None else {"tokenizer_class": tokenizer_class}
    path = checkpoint(
        tmp_path / folder_name, "glm-4-9b-chat", "models.glm-4-9b-chat", config, _name_or_path=stored or None
    )
    tok = AutoTokenizer.from_pretrained(path)
    assert type(tok) is expected and not tok.generation_is_assumed
    tok.save_pretrained(tmp_path / "saved")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "saved")) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("THUDM/codegeex4-all-9b", CodeGeeX4Tokenizer),
        ("/codegeex4/glm-4-9b-chat", ChatGLM4Tokenizer),
        ("me/mine", ChatGLM4Tokenizer),
    ],
)
@pytest.mark.parametrize("key", ["original_name_or_path", "_name_or_path"])
def test_an_export_of_before_is_codegeex4_by_its_name(key, name, expected, tmp_path):
    stored = {"tokenizer_class": "ChatGLM4Tokenizer", "chatglm_generation": "glm4"}
    path = checkpoint(tmp_path / "a", "glm-4-9b-chat", "models.glm-4-9b-chat", stored, **{key: name})
    for load in (AutoTokenizer.from_pretrained, load_tokenizer):
        tok = load(path)
        assert type(tok) is expected and tok.chatglm_generation == tok.init_kwargs["chatglm_generation"]
    (path / "tokenizer_config.json").write_text(json.dumps(stored | {"chatglm_generation": None}))
    assert (
        type(AutoTokenizer.from_pretrained(path, chatglm_generation="glm4")) is ChatGLM4Tokenizer
    )  # who asks gets it
