# SPDX-License-Identifier: Apache-2.0
"""What is changed in transformers is still needed."""

import json
import shutil

import pytest
import transformers
from conftest import unpatched
from tokenization_cases import folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from optimum_chatglm_ov import ChatGLM3Tokenizer, ChatGLM4Tokenizer, OVChatGLMForCausalLM
from optimum_chatglm_ov.integrations.transformers import (
    LOADS_TORCH_WEIGHTS_ALONE,
    SKIPS_REGISTERED_TOKENIZERS,
    patch,
    register_tokenizers,
)


@pytest.mark.parametrize(
    "name, expected", [("models.chatglm3-6b", ChatGLM3Tokenizer), ("models.glm-4-9b-chat", ChatGLM4Tokenizer)]
)
def test_transformers_itself_skips_registered_tokenizers(name, expected, tmp_path):
    """If this fails, `SKIPS_REGISTERED_TOKENIZERS` does not name this version of transformers rightly."""
    copy = tmp_path / "copy"
    shutil.copytree(folder(name), copy)
    config = json.loads((copy / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = type(unpatched(AutoTokenizer)(AutoTokenizer, copy))
    assert (found is not expected) == SKIPS_REGISTERED_TOKENIZERS.contains(transformers.__version__, prereleases=True)
    assert type(AutoTokenizer.from_pretrained(copy)) is expected


def test_transformers_itself_looks_for_weights_of_torch(exported):
    """If this fails, `LOADS_TORCH_WEIGHTS_ALONE` does not name this version of transformers rightly."""
    try:
        found = type(unpatched(AutoModelForCausalLM)(AutoModelForCausalLM, exported("glm4-yarn-one-group")))
    except OSError as error:
        assert "glm4-yarn-one-group" in str(error)
        found = None
    is_needed = LOADS_TORCH_WEIGHTS_ALONE.contains(transformers.__version__, prereleases=True)
    assert (found is not OVChatGLMForCausalLM) == is_needed
    assert type(AutoModelForCausalLM.from_pretrained(exported("glm4-yarn-one-group"))) is OVChatGLMForCausalLM


def test_registering_and_changing_twice_changes_nothing():
    before = [AutoConfig.from_pretrained.__func__, AutoTokenizer.from_pretrained.__func__]
    register_tokenizers()
    patch()
    assert [AutoConfig.from_pretrained.__func__, AutoTokenizer.from_pretrained.__func__] == before
