# SPDX-License-Identifier: Apache-2.0
"""Drafts of small models that have another vocabulary."""

import pytest
import torch
from conftest import EXACT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.cli.embedded import embedded_model


QUESTION = "What is OpenVINO?"


def llama():
    """A tiny Llama with random weights, and a tokenizer of 320 pieces."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    pieces.train_from_iterator([f"{QUESTION} OpenVINO is a toolkit. 你好"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).eval(), tokenizer


@pytest.fixture(scope="module")
def target():
    """The package's own model and its tokenizer."""
    with embedded_model() as folder:
        model = OVChatGLMForCausalLM.from_pretrained(folder, attention="native", ov_config=EXACT)
        yield model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(params=["llama", "glm-4-9b-chat"])
def assistant(request, exported):
    if request.param == "llama":
        return llama()
    folder = exported(request.param)
    model = OVChatGLMForCausalLM.from_pretrained(folder, attention="native", ov_config=EXACT)
    return model, AutoTokenizer.from_pretrained(folder)


def generate(target, assistant, **settings):
    model, tokenizer = target
    prompt = tokenizer.build_chat_input(QUESTION)["input_ids"]
    drafts = {}
    if assistant is not None:
        drafts = {"assistant_model": assistant[0], "tokenizer": tokenizer, "assistant_tokenizer": assistant[1]}
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, **settings, **drafts)
    return tokenizer.decode(output[0, prompt.shape[1] :])


def test_drafts_of_another_vocabulary_change_nothing(target, assistant):
    expected = generate(target, None, do_sample=False)
    assert "OpenVINO" in expected and generate(target, assistant, do_sample=False) == expected


def test_right_drafts_save_calls(target):
    """Drafts that go through text: those of the same model, taken for one of another vocabulary."""
    model, tokenizer = target
    expected = generate(target, None, do_sample=False)
    with embedded_model() as folder:
        other = OVChatGLMForCausalLM.from_pretrained(folder, attention="native", ov_config=EXACT)
    other.config.padded_vocab_size += 1  # equal ones are not for two tokenizers, says transformers
    calls, run = [], model.engine.run
    model.engine.run = lambda inputs: calls.append(inputs["input_ids"].shape[1]) or run(inputs)
    try:
        assert generate(target, (other, tokenizer), do_sample=False) == expected
    finally:
        del model.engine.run
    assert len(calls) < 10  # for 16 tokens


def test_sampling(target):
    assert generate(target, llama(), do_sample=True, temperature=1.0, top_p=1.0)
