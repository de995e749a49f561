# SPDX-License-Identifier: Apache-2.0
"""GLM and GLM-4-0414, the model types of transformers: configurations, files, auto classes and what is merged."""

import json

import numpy as np
import pytest
import torch
from conftest import EXACT, openvino_layers, says
from fast_tokenizer import make_tokenizer
from peft import LoraConfig, get_peft_model
from torch_models import TORCH_MODELS, config, random_model, torch_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.architectures.rope import rotary_embedding_of
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.ir import load_config
from optimum_chatglm_ov.native.fuse_attention import cache_layout


IDS = torch.randint(3, 300, (1, 19), generator=torch.Generator().manual_seed(5))
# What config.json of GLM-4-0414 has where its card recommends YaRN for long texts.
RECOMMENDED_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def write_config(folder, model_type, **changes):
    folder.mkdir(exist_ok=True)
    values = {"model_type": model_type, "head_dim": 32, "max_position_embeddings": 32768} | changes
    (folder / "config.json").write_text(json.dumps(values))
    return folder


# Configurations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"hidden_act": "gelu"},
            "`hidden_act` is 'gelu', which glm4 is not exported with; expected 'silu' or 'swish'",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "`quantization_config` is .*gptq"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "`num_attention_heads`=6 is not a multiple"),
        ({"partial_rotary_factor": 0.1}, "`partial_rotary_factor`=0.1 lets 3 of 32 channels"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "`rope_type` is 'dynamic'; expected one of 'def"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "`factor` of the rotary embedding is 0.5"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "short_factor": [1]}}, "'linear' has short_factor"),
    ],
)
def test_switches_without_a_graph_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_config(write_config(tmp_path, "glm4", **changes))


def test_rope_ratio_type_is_for_chatglm(tmp_path):
    with pytest.raises(ValueError, match="`rope_ratio_type` is a key of ChatGLM, and .* is a glm. Leave it out"):
        load_config(write_config(tmp_path, "glm"), rope_ratio_type="theta")


@pytest.mark.parametrize("model_type", ["glm", "glm4"])
def test_both_forms_of_rope_settings_say_the_same(model_type, tmp_path):
    """Those of transformers 4, and the dictionary of version 5, which version 4 leaves unread."""
    yarn = {**RECOMMENDED_YARN, "attention_factor": 1.25}
    old = {"rope_theta": 5000.0, "partial_rotary_factor": 0.25, "rope_scaling": yarn}
    new = {"rope_parameters": {**yarn, "rope_type": "yarn", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}}
    first, second = (
        rotary_embedding_of(load_config(write_config(tmp_path / name, model_type, **form)))
        for name, form in (("old", old), ("new", new))
    )
    np.testing.assert_array_equal(first.inv_freq, second.inv_freq)
    assert (first.rotary_dim, first.attention_factor, first.context_length) == (8, 1.25, 131072)
    assert (second.rotary_dim, second.attention_factor, second.context_length) == (8, 1.25, 131072)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "beta_fast": 8, "beta_slow": 2},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8192,
            "mscale": 2,
            "mscale_all_dim": 1,
        },
    ],
    ids=str,
)
def test_frequencies_are_those_of_transformers(settings):
    glm = config("glm4", max_position_embeddings=32768, rope_scaling=dict(settings))
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](glm, "cpu")
    found = rotary_embedding_of(glm)
    np.testing.assert_allclose(found.inv_freq, inv_freq.numpy(), rtol=1e-6)
    assert found.attention_factor == pytest.approx(attention_factor)


def test_yarn_as_recommended_extends_the_context(tmp_path):
    """The card leaves `max_position_embeddings` at the length of the training; saving and loading changes nothing."""
    found = load_config(write_config(tmp_path / "first", "glm4", rope_scaling=RECOMMENDED_YARN))
    found.save_pretrained(tmp_path / "second")
    again = load_config(tmp_path / "second")
    for loaded in (found, again):
        assert loaded.max_position_embeddings == 131072
        assert rotary_embedding_of(loaded).attention_factor == pytest.approx(0.1 * np.log(4) + 1)


# Models --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_MODELS)
def test_native_operations_take_every_layer(name, checkpoint, tmp_path):
    model = OVChatGLMForCausalLM.from_pretrained(
        checkpoint(name), export=True, load_in_8bit=True, attention="fused", linear="fused"
    )
    # the embedding's own table is not packed a second time
    assert openvino_layers(model) == int(model.config.tie_word_embeddings)
    folder = export_model(checkpoint(name), tmp_path / "ir", attention="fused")
    layout = cache_layout(OVChatGLMForCausalLM.load_model(folder / "openvino_model.xml"))
    assert len(layout.layers) == torch_model(name).config.num_hidden_layers


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_quantised_weights_keep_what_the_model_says(weight_format, checkpoint, tmp_path):
    folder = export_model(checkpoint("glm4"), tmp_path / "ir", weight_format=weight_format)
    expected = torch_model("glm4")(IDS).logits[0].detach()
    found = OVChatGLMForCausalLM.from_pretrained(folder, ov_config=EXACT)(IDS).logits[0]
    error = (found - expected).pow(2).mean().sqrt() / expected.std()
    assert 0 < error < {"int8": 0.04, "int4": 0.5}[weight_format]


def test_calibration_sees_texts_behind_the_tokens_of_an_empty_prompt(checkpoint, tmp_path):
    texts = ["the quick brown fox jumps over the lazy dog"] * 4
    settings = {"bits": 4, "quant_method": "awq", "dataset": texts, "num_samples": 2}
    folder = export_model(checkpoint("glm"), tmp_path / "ir", quantization_config=settings)
    assert (folder / "openvino_config.json").is_file()


def test_adapters_are_merged(checkpoint, tmp_path):
    targets = ["q_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    base = random_model(config("glm4"))
    torch.manual_seed(0)
    adapted = get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(IDS).logits
    model = OVChatGLMForCausalLM.from_pretrained(
        checkpoint("glm4"), export=True, adapters=[tmp_path / "adapter"], ov_config=EXACT
    )
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-3, rtol=0)
    assert (expected - torch_model("glm4")(IDS).logits).abs().max() > 0.1


def test_weights_of_a_wrong_shape_are_named_as_in_the_checkpoint(checkpoint, tmp_path):
    torch_model("glm").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"intermediate_size": 80}))
    with pytest.raises(ValueError, match=r"wrong shape: model.layers.0.mlp.gate_up_proj.weight is \[192, 64\]"):
        export_model(tmp_path, tmp_path / "ir")


# Files and auto classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glm", "glm4"])
def test_auto_classes_load_what_is_asked_for(name, checkpoint, tmp_path, capsys):
    source, folder = checkpoint(name), tmp_path / "ir"
    assert main(["export", str(source), str(folder)]) == 0
    assert main(["chat", "--model", str(folder), "--prompt", "hello", "--max-new-tokens", "3"]) == 0
    assert ", first after" in capsys.readouterr().err
    assert isinstance(
        AutoModelForCausalLM.from_pretrained(source), PreTrainedModel
    )  # torch's, as without this package
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is OVChatGLMForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert tokenizer("你好")["input_ids"] == make_tokenizer()("你好")["input_ids"]
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    expected = pipeline("text-generation", model=torch_model(name), tokenizer=tokenizer)("hello", **arguments)
    for given in ({"model": model, "tokenizer": tokenizer}, {"model": str(folder)}):
        assert pipeline("text-generation", **given)("hello", **arguments) == expected


def test_a_saved_model_loads_again(exported, tmp_path):
    model = OVChatGLMForCausalLM.from_pretrained(exported("glm4-yarn-one-group"), ov_config=EXACT)
    model.save_pretrained(tmp_path)
    again = OVChatGLMForCausalLM.from_pretrained(tmp_path, ov_config=EXACT)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=0, rtol=0)
    assert again.config.model_type == "glm4" and again.generation_config.eos_token_id == [1, 2]


# Conversations -------------------------------------------------------------------------------------------------------


def answers(model, text, query, history=None):
    """What `chat()` and the last of `stream_chat()` make of `text`, which ends with a turn of the user."""
    tokenizer = make_tokenizer()
    ids = [*tokenizer.encode(text, add_special_tokens=False), 1]
    settings = says(ids, max_new_tokens=len(ids))
    answer = model.chat(tokenizer, query, history=list(history or []), **settings)
    *_, streamed = model.stream_chat(tokenizer, query, history=list(history or []), **says(ids, len(ids)))
    assert streamed == answer
    return answer


def test_chat_follows_the_template_of_the_checkpoint(exported):
    model = OVChatGLMForCausalLM.from_pretrained(exported("glm4"))
    response, history = answers(model, "\n你好", "hello")
    assert response == "你好"
    assert history == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "metadata": "", "content": "你好"},
    ]
    seen = []
    generate = model.generate
    model.generate = lambda **arguments: seen.append(arguments["input_ids"]) or generate(**arguments)
    model.chat(make_tokenizer(), "more", history=list(history), do_sample=False, max_new_tokens=1)
    messages = [*history, {"role": "user", "content": "more"}]
    text = make_tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert seen[0].tolist() == [make_tokenizer().encode(text, add_special_tokens=False)]


def test_chat_reads_calls(exported):
    model = OVChatGLMForCausalLM.from_pretrained(exported("glm4"))
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    history = [{"role": "system", "content": "", "tools": tools}]
    response, _ = answers(model, 'weather\n{"city": "北京"}', "hello", history)
    assert response == {"name": "weather", "parameters": {"city": "北京"}}


def test_chat_leaves_out_thoughts_that_have_ended(exported):
    model = OVChatGLMForCausalLM.from_pretrained(exported("glm4"))
    response, history = answers(model, "\n<think>\nlong\n</think>\nshort", "hello")
    assert response == "short" and history[-1]["content"] == "short"


def test_a_tokenizer_without_a_template_is_refused(exported):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    model = OVChatGLMForCausalLM.from_pretrained(exported("glm4"))
    with pytest.raises(ValueError, match="without a chat template; expected the tokenizer of the checkpoint"):
        model.chat(tokenizer, "hello")
