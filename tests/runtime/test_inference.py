# SPDX-License-Identifier: Apache-2.0
"""What a call refuses before anything is run, and what the calls around it compute all the same."""

import copy
import functools
import threading

import numpy as np
import pytest
import torch
from conftest import EXACT, Golden
from optimum.intel.openvino import OVModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

from optimum_chatglm_ov import ContextLengthError, OVChatGLMForCausalLM


GREEDY = {"max_new_tokens": 12, "do_sample": False}
ONE_OF_EACH = ("chatglm-6b-3layer-untied", "chatglm3-6b", "chatglm-6b-ptuning-v2", "glm4")
ONES = torch.ones(3, 12, dtype=torch.long)


def prompts(model, seed=0):
    """Two rows of ten tokens; chatglm-6b's have what its prompts need."""
    ids = torch.randint(20, 300, (2, 10), generator=torch.Generator().manual_seed(seed))
    if getattr(model.config, "architecture", None) == "chatglm":
        ids[:, -2:] = torch.tensor([model.config.gmask_token_id, model.config.bos_token_id])
    return ids


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"attention_mask": ONES[:1, :10]}, r"`attention_mask` is int64 \[1, 10\]; expected a tensor \[2, 10\]"),
        ({"attention_mask": ONES[:, :10]}, r"`attention_mask` is int64 \[3, 10\]; expected a tensor \[2, 10\]"),
        ({"attention_mask": ONES[:2, :11]}, r"`attention_mask` is int64 \[2, 11\]"),
        ({"attention_mask": ONES[0, :10]}, r"`attention_mask` is int64 \[10\]"),
        ({"attention_mask": [[1] * 10] * 2}, "`attention_mask` is a list"),
        ({"position_ids": ONES[:2, :5]}, r"`position_ids` is int64 \[2, 5\]; expected a tensor \[2, 10\]"),
        ({"position_ids": ONES[:2, :11]}, r"`position_ids` is int64 \[2, 11\]"),
        ({"position_ids": ONES[:, :10]}, r"`position_ids` is int64 \[3, 10\]"),
        ({"position_ids": ONES[:, None, :10].expand(-1, 3, -1)}, r"`position_ids` is int64 \[3, 3, 10\]"),
        ({"position_ids": ONES[:2, None, :4].expand(-1, 2, -1)}, r"`position_ids` is int64 \[2, 2, 4\]"),
        ({"logits_to_keep": -3}, "`logits_to_keep` is -3"),
    ],
)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_tensors_that_do_not_fit(name, arguments, message, either_model):
    """Nothing is run, so that the next calls do not suffer."""
    model = either_model(name)
    ids = prompts(model)
    first = model(ids)
    next_ids = ids[:, :1]
    expected = model(next_ids, past_key_values=first.past_key_values).logits
    with pytest.raises(ValueError, match=message):
        model(ids, **arguments)
    if "logits_to_keep" not in arguments:
        with pytest.raises(ValueError, match=message):
            model.generate(ids, **GREEDY, **arguments)
    again = model(ids)
    np.testing.assert_array_equal(again.logits.numpy(), first.logits.numpy())
    with pytest.raises(ValueError, match="`attention_mask` is"):
        model(next_ids, past_key_values=again.past_key_values, attention_mask=ONES[:, :11])
    with pytest.raises(ValueError, match="`past_key_values` hold 2 sequences, but `input_ids` has 1 rows"):
        model(next_ids[:1], past_key_values=again.past_key_values)
    found = model(next_ids, past_key_values=again.past_key_values).logits
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


@pytest.mark.parametrize(
    "input_ids, message",
    [
        (torch.tensor([5, 6, 7]), r"`input_ids` is int64 \[3\]; expected an integer tensor \[batch, tokens\]"),
        ([[5, 6, 7]], "`input_ids` is a list"),
        (np.array([[5, 6, 7]]), "`input_ids` is a ndarray"),
        (torch.tensor([[5.0]]), r"`input_ids` is float32 \[1, 1\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"`input_ids` is int64 \[1, 0\]; expected at least one token"),
        (torch.tensor([[5, 100000]]), r"`input_ids` holds 100000, but the vocabulary of this model ends at \d+"),
        (torch.tensor([[5, -1]]), "`input_ids` holds -1"),
    ],
)
def test_input_ids_that_are_none(input_ids, message, either_model):
    model = either_model("chatglm3-6b")
    for use in (model, lambda ids: model.generate(ids, **GREEDY)):
        with pytest.raises(ValueError, match=message):
            use(input_ids)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_row_of_positions_is_for_all(name, either_model):
    model = either_model(name)
    ids, positions = prompts(model), torch.arange(10)[None]
    found = model(ids, position_ids=positions).logits
    np.testing.assert_array_equal(found.numpy(), model(ids, position_ids=positions.expand(2, -1)).logits.numpy())


@pytest.mark.parametrize("differ", ["attention_mask", "position_ids"])
def test_beams_of_rows_with_equal_ids(differ, either_model):
    model = either_model("chatglm3-6b")
    row = torch.tensor([[0, 0, 30, 31, 32]])
    values = {
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4], [7, 9, 20, 30, 40]]),
    }[differ]
    settings = {**GREEDY, "num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
    alone = [model.generate(row, **settings, **{differ: values[i : i + 1]}) for i in (0, 1)]
    together = model.generate(row.repeat(2, 1), **settings, **{differ: values})
    scores = [output.sequences_scores.item() for output in alone]
    assert abs(scores[0] - scores[1]) > 1e-3  # what differs matters
    np.testing.assert_allclose(together.sequences_scores.numpy(), scores, atol=1e-4)
    for i, output in enumerate(alone):
        length = output.sequences.shape[1]
        assert together.sequences[i, :length].tolist() == output.sequences[0].tolist()


@pytest.mark.parametrize(
    "name, value",
    [
        ("guidance_scale", 1.5),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("assistant_early_exit", 1),
        ("prefill_chunk_size", 4),
        ("output_attentions", True),
        ("output_hidden_states", True),
    ],
)
def test_ways_of_generation_that_are_not_for_this_model(name, value, either_model):
    model = either_model("chatglm2-6b")
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}: .*Leave it out"):
        model.generate(torch.tensor([[5, 6, 7]]), **GREEDY, **{name: value})


def test_a_refused_prompt_says_nothing_of_the_next(either_model):
    """Its 2-D positions, which tell where a context ends."""
    model = either_model("chatglm-6b-3layer-untied")
    ids = prompts(model)
    expected = model(ids).logits
    with pytest.raises(ContextLengthError):
        model.generate(ids, position_ids=ONES[:2, None, :10].expand(-1, 2, -1), max_new_tokens=100000)
    np.testing.assert_array_equal(model(ids).logits.numpy(), expected.numpy())


@pytest.mark.parametrize(
    "name, value",
    [
        ("labels", torch.tensor([[5, 6, 7]])),
        ("inputs_embeds", torch.zeros(1, 3, 64)),
        ("output_hidden_states", True),
        ("output_attentions", True),
        ("token_type_ids", torch.zeros(1, 3, dtype=torch.long)),
        ("atention_mask", None),
        ("num_logits_to_keep", 1),
    ],
)
def test_forward_refuses_by_name_what_it_does_not_know(name, value, either_model):
    model, ids = either_model("chatglm2-6b"), torch.tensor([[5, 6, 7]])
    expected = model(ids, use_cache=True, return_dict=True, cache_position=torch.arange(3)).logits
    calls = []
    model._forward, original = lambda *arguments: calls.append(arguments) or original(*arguments), model._forward
    try:
        with pytest.raises(TypeError, match=rf"forward\(\) does not know the argument\(s\) \['{name}'\]"):
            model(ids, **{name: value})
        assert not calls
        found = model(ids, labels=None, inputs_embeds=None, output_hidden_states=False, output_attentions=None).logits
        assert calls
    finally:
        del model._forward
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_forward_gives_a_tuple_where_it_is_asked_for(either_model):
    model, ids = either_model("chatglm2-6b"), torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    logits, past = model(ids, return_dict=False)
    np.testing.assert_array_equal(logits.numpy(), expected.numpy())
    assert model(ids[:, :1], past_key_values=past).logits.shape[1] == 1


def test_settings_that_mean_nothing(either_model):
    model, ids = either_model("chatglm2-6b"), torch.tensor([[5, 6, 7]])
    found = model.generate(ids, **GREEDY, guidance_scale=1.0, penalty_alpha=0.0)
    np.testing.assert_array_equal(found.numpy(), model.generate(ids, **GREEDY).numpy())


def test_several_answers_to_each_prompt_with_positions(either_model):
    """Of a batch whose contexts are of different lengths, as chatglm-6b's own positions say."""
    name = "chatglm-6b-3layer-untied"
    model, inputs = either_model(name), Golden(name).inputs("batch")
    assert inputs["position_ids"].dim() == 3
    expected = model.generate(**inputs, **GREEDY).repeat_interleave(2, dim=0)
    found = model.generate(**inputs, max_new_tokens=12, do_sample=True, top_k=1, num_return_sequences=2)
    np.testing.assert_array_equal(found.numpy(), expected.numpy())


# Lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")
@pytest.mark.parametrize("arguments", [{}, {"generation_config": GenerationConfig(do_sample=False)}])
def test_without_a_length_twenty_tokens_are_generated(arguments, either_model):
    """As by any model of transformers."""
    model = either_model("chatglm2-6b")
    for length in (5, 30):
        ids = model.generate(torch.arange(5, 5 + length)[None], eos_token_id=-1, **arguments)
        assert ids.shape == (1, length + 20)


def test_default_length_of_a_checkpoint(either_model):
    model = either_model("chatglm-6b-3layer-untied")
    context, ids = model.config.max_position_embeddings, prompts(model)[:1]
    own = model.generation_config
    try:
        model.generation_config = copy.deepcopy(own)
        model.generation_config.max_length = 15
        assert model.generate(ids, eos_token_id=-1).shape == (1, 15)
        model.generation_config.max_length = 100 * context
        long = torch.cat((torch.full((1, context - 12), 30), ids), dim=1)
        assert model.generate(long, eos_token_id=-1).shape == (1, context)
        assert model.generate(long, GenerationConfig(do_sample=False, eos_token_id=-1)).shape == (1, context)
        for asked in ({"max_length": context + 3}, {"generation_config": GenerationConfig(max_length=context + 3)}):
            with pytest.raises(ContextLengthError, match=f"{context + 3} tokens"):
                model.generate(ids, **asked)
    finally:
        model.generation_config = own


# One instance, several callers -------------------------------------------------------------------------------------


def in_threads(*tasks):
    """Runs the tasks at once and returns what they return, or raise."""
    results = [None] * len(tasks)

    def run(i):
        try:
            results[i] = tasks[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    return results


def repeated(task, times=20):
    return lambda: [task() for _ in range(times)]


def test_threads_take_turns(either_model):
    model = either_model("chatglm3-6b")
    questions = [prompts(model, seed)[:1] for seed in range(4)]
    tasks = [functools.partial(lambda ids: model.generate(ids, **GREEDY).tolist(), ids) for ids in questions[:2]]
    tasks += [functools.partial(lambda ids: model(ids).logits.tolist(), ids) for ids in questions[2:]]
    expected = [[task()] * 20 for task in tasks]
    assert in_threads(*map(repeated, tasks)) == expected


def test_conversations_of_threads_take_turns(exported, either_model):
    model, tok = either_model("chatglm3-6b"), AutoTokenizer.from_pretrained(exported("chatglm3-6b"))

    def talk(query):
        answer, history = model.chat(tok, query, do_sample=False, max_new_tokens=8)
        return answer, model.chat(tok, "and then", history=history, do_sample=False, max_new_tokens=8)[0]

    tasks = [functools.partial(talk, query) for query in ("one", "two two")]
    expected = [[task()] * 20 for task in tasks]
    assert in_threads(*map(repeated, tasks)) == expected


def test_assistants_take_turns(exported, exact_model):
    """Also two models that draft for each other."""
    first = exact_model("chatglm3-6b", "fused")
    second = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), attention="fused", ov_config=EXACT)
    second.generation_config.do_sample = False
    ids = prompts(first)[:1]
    expected = [first.generate(ids, **GREEDY).tolist()] * 20
    tasks = [
        lambda: first.generate(ids, **GREEDY, assistant_model=second).tolist(),
        lambda: second.generate(ids, **GREEDY, assistant_model=first).tolist(),
        lambda: second.generate(ids, **GREEDY).tolist(),
    ]
    assert in_threads(*map(repeated, tasks)) == [expected] * 3


@pytest.mark.parametrize("attention", ["fused", "sdpa"])
def test_cleared_requests_wait_for_their_turn(attention, exported):
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), attention=attention, ov_config=EXACT)
    ids = prompts(model)[:1]

    def ask():
        return model.generate(ids, **GREEDY).tolist()

    expected = ask()
    found, _ = in_threads(repeated(ask), repeated(model.clear_requests, 5))
    assert found == [expected] * 20


@pytest.mark.parametrize("give_back", [OVChatGLMForCausalLM.clear_requests, OVModelForCausalLM.half])
def test_a_model_that_is_compiled_again_gives_the_caches_back(give_back, exported):
    model = OVChatGLMForCausalLM.from_pretrained(exported("chatglm3-6b"), attention="fused", ov_config=EXACT)
    ids = Golden("chatglm3-6b").inputs("single")["input_ids"]
    output = model(ids)
    caches = model.engine.state
    assert caches.caches
    give_back(model)
    again = model(ids)
    assert not caches.caches and output.past_key_values.is_outdated
    np.testing.assert_allclose(again.logits.numpy(), output.logits.numpy(), atol=0.05)


@pytest.mark.parametrize("past", [(), ((torch.zeros(1, 2, 3, 4),) * 2,), ((),)])
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_foreign_caches(name, past, exact_model):
    """Neither are they taken for what the model holds, nor do they disturb it."""
    model = exact_model(name)
    ids = prompts(model)
    expected = model(ids).logits
    if past == ((),):
        model.clear_requests()  # the marker of nothing
    with pytest.raises(ValueError, match="`past_key_values` is a tuple that this model has not returned"):
        model(ids[:, :1], past_key_values=past)
    np.testing.assert_array_equal(model(ids).logits.numpy(), expected.numpy())
