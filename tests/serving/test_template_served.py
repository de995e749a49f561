# SPDX-License-Identifier: Apache-2.0
"""Models whose tokenizer and chat template are transformers' are served as those of this package's tokenizers."""

import pytest
import torch
from conftest import EXACT
from fast_tokenizer import make_tokenizer
from serving_support import NAME, engine_options, options, serving

from optimum_chatglm_ov import ChatGLMTextStreamer, OVChatGLMForCausalLM


@pytest.fixture(scope="module", params=["glm", "glm4"])
def model(request, exported):
    return OVChatGLMForCausalLM.from_pretrained(exported(request.param), ov_config=EXACT)


@pytest.fixture(params=["auto", "queue"])
def server(request, model):
    with serving(model.model_save_dir, options(), engine_options(kind=request.param, ov_config=EXACT)) as running:
        yield running


def test_answers_are_those_of_the_class(model, server):
    tokenizer = make_tokenizer()
    inputs = model.build_inputs(tokenizer, "hello 你好 😀")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello 你好 😀"}], add_generation_prompt=True, tokenize=False
    )
    assert inputs["input_ids"].tolist() == [tokenizer.encode(text, add_special_tokens=False)]
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = model.process_response("\n" + tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\ufffd")
    assert expected
    found = server.chat("hello 你好 😀", max_tokens=24)
    assert found.choices[0].message.content == expected
    assert found.usage.prompt_tokens == inputs["input_ids"].shape[1]
    chunks = server.chat("hello 你好 😀", max_tokens=24, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    completion = server.client.completions.create(model=NAME, prompt=inputs["input_ids"][0].tolist(), max_tokens=24)
    assert completion.choices[0].text.strip() == expected


def test_streamers_show_whole_characters(model):
    tokenizer, pieces = make_tokenizer(), []
    streamer = ChatGLMTextStreamer(tokenizer)
    streamer.on_finalized_text = lambda text, stream_end=False: pieces.append(text)
    text = "你好 😀 é\n  end"
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
