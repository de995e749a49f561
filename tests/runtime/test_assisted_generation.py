# SPDX-License-Identifier: Apache-2.0
"""Drafts and kept caches change nothing but the work: prompt lookup, assistants and `past_key_values`."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import EXACT, Golden
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from optimum_chatglm_ov import ContextLengthError, OVChatGLMForCausalLM


NAMES = (
    "chatglm-6b-3layer-untied",
    "chatglm2-6b",
    "chatglm3-6b-128k",
    "glm-4-9b-chat",
    "glm",
    "glm4",
    "chatglm-6b-ptuning-v2",
    "chatglm2-6b-ptuning-v2",
)
GREEDY = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module")
def fused_model(exported):
    models = {}

    def load(name, which=0):
        if (name, which) not in models:
            models[name, which] = OVChatGLMForCausalLM.from_pretrained(
                exported(name), attention="fused", ov_config=EXACT
            )
        return models[name, which]

    return load


class Pieces(BaseStreamer):
    """Token ids as they arrive: the prompt, then what each step has accepted."""

    def __init__(self):
        self.pieces = []
        self.ended = False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, dtype=torch.bool)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup(name, fused_model):
    golden, model = Golden(name), fused_model(name)
    for case in golden.cases("", "greedy_"):
        inputs = golden.inputs(case)
        if len(inputs["input_ids"]) > 1:
            continue
        expected = model.generate(**inputs, **GREEDY)
        np.testing.assert_array_equal(expected.numpy(), golden[f"greedy_{case}"])
        for tokens in (1, 3, 10):
            ids = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=tokens, max_matching_ngram_size=1)
            np.testing.assert_array_equal(ids.numpy(), expected.numpy())


@pytest.mark.parametrize(
    "name, assistant",
    [(name, name) for name in NAMES]
    + [("chatglm-6b-3layer-untied", "chatglm-6b-ptuning-v2"), ("chatglm2-6b-ptuning-v2", "chatglm2-6b")],
)
def test_assistant(name, assistant, fused_model):
    golden, model = Golden(name), fused_model(name)
    assistant = fused_model(assistant, which=1)
    assistant.generation_config.do_sample = False  # transformers 4 draws drafts by chance where its checkpoint says so
    for _ in range(2):  # what the first left in either cache is no matter
        streamer = Pieces()
        ids = model.generate(**golden.inputs("single"), **GREEDY, assistant_model=assistant, streamer=streamer)
        np.testing.assert_array_equal(ids.numpy(), golden["greedy_single"])
        assert sum(streamer.pieces, []) == ids[0].tolist() and streamer.ended
        if assistant.config.name_or_path == model.config.name_or_path:
            assert max(map(len, streamer.pieces[1:])) > 1  # drafts were accepted


def test_drafts_of_a_repetitive_text(fused_model):
    model = fused_model("chatglm3-6b-128k")
    settings = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": 0}
    ids = torch.tensor([[2, 12, 13]])  # before long two tokens follow in turns
    expected = model.generate(ids, **settings)
    streamer = Pieces()
    found = model.generate(ids, **settings, prompt_lookup_num_tokens=4, streamer=streamer)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())
    assert max(map(len, streamer.pieces[1:])) > 1


def test_the_end_inside_a_draft(fused_model):
    golden, model, assistant = Golden("chatglm2-6b"), fused_model("chatglm2-6b"), fused_model("chatglm2-6b", 1)
    inputs, whole = golden.inputs("single"), golden["greedy_single"][0]
    prompt = inputs["input_ids"].shape[1]
    for last in range(prompt, prompt + 12):
        settings = {**GREEDY, "eos_token_id": int(whole[last])}
        expected = model.generate(**inputs, **settings)
        for drafts in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 5}):
            np.testing.assert_array_equal(model.generate(**inputs, **settings, **drafts).numpy(), expected.numpy())


def test_length_limits(fused_model):
    """Nothing is drafted beyond the limit, whatever it is; the context length is one."""
    model, assistant = fused_model("chatglm-6b-3layer-untied"), fused_model("chatglm-6b-3layer-untied", 1)
    inputs = Golden("chatglm-6b-3layer-untied").inputs("single")
    prompt = inputs["input_ids"].shape[1]
    context = model.config.max_position_embeddings
    repeated = torch.full((1, context - 8), 11)
    repeated[0, -2:] = inputs["input_ids"][0, -2:]
    for drafts in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 10}):
        for new_tokens in (1, 2, 5):
            ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, **drafts)
            assert ids.shape[1] == prompt + new_tokens
        expected = model.generate(repeated, max_length=context, do_sample=False)
        ids = model.generate(repeated, max_length=context, do_sample=False, **drafts)
        np.testing.assert_array_equal(ids.numpy(), expected.numpy())
        with pytest.raises(ContextLengthError):
            model.generate(repeated, max_new_tokens=9, do_sample=False, **drafts)


def test_stopping_criteria(fused_model):
    golden, model = Golden("glm-4-9b-chat"), fused_model("glm-4-9b-chat")
    inputs = golden.inputs("single")
    end = inputs["input_ids"].shape[1] + 5
    criteria = StoppingCriteriaList([StopAt(end)])
    ids = model.generate(**inputs, **GREEDY, stopping_criteria=criteria, prompt_lookup_num_tokens=1)
    assert end <= ids.shape[1] <= end + 1  # asked after each draft
    np.testing.assert_array_equal(ids.numpy(), golden["greedy_single"][:, : ids.shape[1]])


@pytest.mark.parametrize("drafts", ["assistant", "lookup"])
def test_sampling(drafts, fused_model):
    golden, model = Golden("chatglm3-6b-128k"), fused_model("chatglm3-6b-128k")
    assistant = fused_model("chatglm3-6b-128k", 1)
    settings = {"assistant_model": assistant} if drafts == "assistant" else {"prompt_lookup_num_tokens": 3}
    # one token has all the probability: what is drawn is the greedy one
    ids = model.generate(
        **golden.inputs("single"), max_new_tokens=24, do_sample=True, temperature=1.0, top_k=0, top_p=1e-6, **settings
    )
    np.testing.assert_array_equal(ids.numpy(), golden["greedy_single"])


def test_what_assisted_generation_cannot_use(fused_model, exact_model):
    model, ids = fused_model("chatglm2-6b"), torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="this very model"):
        model.generate(ids, **GREEDY, assistant_model=model)
    with pytest.raises(ValueError, match='inside this assistant model cannot.*attention="native"'):
        model.generate(ids, **GREEDY, assistant_model=exact_model("chatglm2-6b"))
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(ids.repeat(2, 1), **GREEDY, prompt_lookup_num_tokens=3)


# past_key_values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_several_tokens_at_once_equal_single_steps(name, fused_model):
    """Also after a roll back, and with the 2-D positions of chatglm-6b."""
    model, inputs = fused_model(name), Golden(name).inputs("single")
    new = torch.tensor([[11, 12, 13, 14, 15]])
    prompt = model(**inputs)
    past = prompt.past_key_values
    length = past.get_seq_length()
    expected = [model(new[:, i : i + 1], past_key_values=past).logits for i in range(5)]
    past.crop(length)
    np.testing.assert_allclose(
        model(new, past_key_values=past).logits.numpy(), torch.cat(expected, dim=1).numpy(), atol=1e-4
    )
    past.crop(-3)
    assert past.get_seq_length() == length + 2
    np.testing.assert_allclose(
        model(new[:, 2:], past_key_values=past).logits.numpy(), torch.cat(expected[2:], dim=1).numpy(), atol=1e-4
    )


@pytest.mark.parametrize("name", NAMES)
def test_generate_goes_on_from_a_cache(name, fused_model):
    golden, model = Golden(name), fused_model(name)
    inputs = golden.inputs("single")
    output = model.generate(**inputs, max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat((output.sequences, torch.tensor([[21, 22, 23]])), dim=1)
    kept = output.past_key_values.get_seq_length()
    assert kept == output.sequences.shape[1] - 1
    again = model.generate(longer, **GREEDY, past_key_values=output.past_key_values, return_dict_in_generate=True)
    assert again.past_key_values is output.past_key_values
    output.past_key_values.crop(kept)  # an edited end
    edited = torch.cat((longer[:, :-1], torch.tensor([[31, 32]])), dim=1)
    given = {} if "position_ids" not in inputs else {"position_ids": torch.zeros(1, 2, edited.shape[1]).long()}
    ids = model.generate(edited, **GREEDY, **given, past_key_values=output.past_key_values)
    np.testing.assert_array_equal(again.sequences.numpy(), model.generate(longer, **GREEDY).numpy())
    np.testing.assert_array_equal(ids.numpy(), model.generate(edited, **GREEDY).numpy())


def test_caches_that_do_not_fit(fused_model):
    model, other = fused_model("chatglm2-6b"), fused_model("chatglm2-6b", 1)
    ids = torch.tensor([[5, 6, 7]])
    past = model.generate(ids, **GREEDY, return_dict_in_generate=True).past_key_values
    assert "26 tokens" in repr(past)
    longer = torch.arange(40)[None]
    with pytest.raises(ValueError, match="FusedCache that this model has not returned"):
        other.generate(longer, **GREEDY, past_key_values=past)
    with pytest.raises(ValueError, match="DynamicCache that this model has not returned"):
        model.generate(longer, **GREEDY, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="hold 26 tokens; expected `input_ids` of the whole"):
        model.generate(ids, **GREEDY, past_key_values=past)
    for two in ({"inputs": longer.repeat(2, 1)}, {"inputs": longer, "do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(ValueError, match="hold 1 sequences .* but 2 were"):
            model.generate(**{**GREEDY, **two}, past_key_values=past)
    with pytest.raises(ValueError, match="hold 1 sequences, but `input_ids` has 2 rows"):
        model(ids.repeat(2, 1), past_key_values=past)
    with pytest.raises(ValueError, match="is a tuple; `generate` goes on from the `FusedCache`"):
        model.generate(longer, **GREEDY, past_key_values=((),))
    with pytest.raises(ValueError, match="beam search cannot go on"):
        model.generate(longer, **GREEDY, num_beams=2, past_key_values=past)
    with pytest.raises(ValueError, match=r"`attention_mask` is int64 \[1, 5\]; expected a tensor \[1, 27\]"):
        model(torch.tensor([[9]]), attention_mask=torch.ones((1, 5), dtype=torch.long), past_key_values=past)
    model.generate(ids, **GREEDY)
    for use in (lambda: model.generate(longer, **GREEDY, past_key_values=past), lambda: past.crop(3)):
        with pytest.raises(ValueError, match="outdated: the model has begun another sequence"):
            use()
    assert "outdated" in repr(past)


def test_cache_of_a_beam_search(fused_model):
    model = fused_model("chatglm3-6b-128k")
    prompt = Golden("chatglm3-6b-128k").inputs("single")["input_ids"]
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 12, "min_new_tokens": 12}
    output = model.generate(prompt, **beams, do_sample=False, return_dict_in_generate=True)
    past = output.past_key_values
    longer = torch.cat((output.sequences, torch.tensor([[21, 22]] * 3)), dim=1)
    for use in (
        lambda: model.generate(longer, **GREEDY, past_key_values=past),
        lambda: model(longer, past_key_values=past),
    ):
        with pytest.raises(ValueError, match="hold the beams that a beam search ended with"):
            use()
    past.crop(prompt.shape[1])
    for _ in range(2):
        found = model.generate(longer, **GREEDY, past_key_values=past)
        past.crop(prompt.shape[1] + 5)  # which now are tokens of the sequences
    np.testing.assert_array_equal(found.numpy(), model.generate(longer, **GREEDY).numpy())


def test_cache_of_a_beam_search_of_one_step(fused_model):
    model = fused_model("chatglm3-6b-128k")
    prompt = Golden("chatglm3-6b-128k").inputs("single")["input_ids"]
    beams = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 1, "do_sample": False}
    output = model.generate(prompt, **beams, return_dict_in_generate=True)
    past = output.past_key_values
    assert past.batch_size == 3
    past.crop(prompt.shape[1])
    found = model.generate(output.sequences, **GREEDY, past_key_values=past)
    np.testing.assert_array_equal(found.numpy(), model.generate(output.sequences, **GREEDY).numpy())


def test_a_call_after_a_beam_search_that_failed(fused_model):
    model = fused_model("chatglm-6b-3layer-untied")
    prompt = Golden("chatglm-6b-3layer-untied").inputs("single")["input_ids"]
    with pytest.raises(ValueError, match="prompt must hold"):
        model.generate(torch.tensor([[5, 6, 7]]), **GREEDY, num_beams=3)
    assert model(prompt.repeat(2, 1)).past_key_values.batch_size == 2  # not put together, as equal beams are


@pytest.mark.parametrize("attention", ["fused", "sdpa"])
def test_a_refused_call_leaves_the_running_one_alone(attention, exported):
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), attention=attention, ov_config=EXACT)
    long = torch.stack((torch.arange(5, 605), torch.arange(6, 606)))
    past = model(long).past_key_values
    model.request.reset_state()
    model.request.start_async()  # the same again, as by another thread
    with pytest.raises(RuntimeError, match="busy"):
        model(long[:, :1], past_key_values=past)
    model.request.wait()  # raises if it was cancelled


def test_cache_without_tensors(fused_model):
    model = fused_model("chatglm3-6b-128k")
    prompt = Golden("chatglm3-6b-128k").inputs("single")["input_ids"]
    past = model(prompt).past_key_values
    for use in (copy.copy, copy.deepcopy, pickle.dumps, list, lambda past: past.batch_repeat_interleave(2)):
        with pytest.raises(NotImplementedError, match="stand for caches inside the model"):
            use(past)
    past.reset()
    assert past.get_seq_length() == 0
    rows = prompt.repeat(3, 1)
    logits = [model(part, past_key_values=past).logits for part in (rows[:, :2], rows[:, 2:])]  # of another batch
    expected = model(prompt).logits.expand(3, -1, -1)
    np.testing.assert_allclose(torch.cat(logits, dim=1).numpy(), expected.numpy(), atol=1e-3)


@pytest.mark.parametrize("attention", ["fused", "sdpa"])
def test_interrupted_before_it_waits(attention, exported, monkeypatch):
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), attention=attention, ov_config=EXACT)
    prompt = torch.tensor([[5, 6, 7]])
    expected = model.generate(prompt, **GREEDY)
    start_async = type(model.request).start_async

    def interrupted(request, *args, **kwargs):
        start_async(request, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model.request), "start_async", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(torch.arange(5, 605)[None])
    monkeypatch.undo()
    np.testing.assert_array_equal(model.generate(prompt, **GREEDY).numpy(), expected.numpy())


def test_first_generations_context_cannot_be_cropped(fused_model):
    model, inputs = fused_model("chatglm-6b-3layer-untied"), Golden("chatglm-6b-3layer-untied").inputs("batch")
    past = model(**inputs).past_key_values
    begins = (inputs["input_ids"] == model.config.bos_token_id).int().argmax(dim=1).max().item()
    past.crop(begins)
    assert past.get_seq_length() == begins
    with pytest.raises(ValueError, match="context of a chatglm-6b prompt"):
        past.crop(begins - 1)


def test_padding_before_a_context_cannot_be_cropped(fused_model):
    """Row 1 sees its context behind the padding, row 0 has tokens after its own there."""
    model = fused_model("chatglm-6b-3layer-untied")
    end = [model.config.gmask_token_id, model.config.bos_token_id]
    ids = torch.tensor([[30, 31, *end, 32, 33, 34, 35], [3, 3, 3, 3, 30, 31, *end]])
    past = model(ids, attention_mask=torch.tensor([[1] * 8, [0] * 4 + [1] * 4])).past_key_values
    past.crop(7)
    with pytest.raises(ValueError, match="the first 7 tokens are the context"):
        past.crop(6)
