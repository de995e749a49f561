# SPDX-License-Identifier: Apache-2.0
"""Both engines by their interface alone, on a small model."""

import numpy as np
import pytest
import torch
from conftest import Golden


@pytest.fixture(params=["chatglm-6b", "chatglm2-6b-ptuning-v2", "chatglm3-6b"])
def engine_and_ids(request, either_model):
    model = either_model(request.param)
    ids = Golden(request.param).inputs("single")["input_ids"]
    model(ids)
    return model.engine, ids.numpy()


def step(engine, ids):
    """Logits of the last of `ids` [B, L], which follow what the engine holds."""
    past, (batch, length) = engine.past_length, ids.shape
    inputs = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, past + length), np.int64),
        "position_ids": np.arange(past, past + length)[None].repeat(batch, axis=0),
        "logits_to_keep": np.array(1),
    }
    return engine.run(inputs)[:, -1]


def test_rows_go_on_from_the_rows_that_were_chosen(engine_and_ids):
    engine, ids = engine_and_ids
    length = ids.shape[1]
    assert (engine.past_length, engine.batch_size) == (length, 1)
    with pytest.raises((IndexError, ValueError)):
        engine.reorder([0, 1])
    engine.reorder([0, 0])
    first = step(engine, np.array([[7], [9]]))
    engine.reorder([1, 0])
    engine.reorder([1, 0, 1])  # before a call, choices of choices
    assert (engine.past_length, engine.batch_size) == (length + 1, 3)
    found = step(engine, np.array([[11], [11], [12]]))
    for row, (second, third) in enumerate(((7, 11), (9, 11), (7, 12))):
        engine.reset()
        assert engine.past_length == 0
        step(engine, ids)
        alone = step(engine, np.array([[second]]))
        np.testing.assert_allclose(first[0 if second == 7 else 1], alone[0], atol=1e-4)
        np.testing.assert_allclose(found[row], step(engine, np.array([[third]]))[0], atol=1e-4)


def test_a_fork_goes_its_own_way(engine_and_ids):
    engine, ids = engine_and_ids
    engine.reorder([0, 0])
    both = np.array([[7], [9]])
    step(engine, both)
    engine.reorder([1, 0])
    other = engine.fork()
    assert (other.past_length, other.batch_size) == (engine.past_length, 2)
    theirs = step(other, np.array([[20], [21]]))
    expected = step(engine, np.array([[20], [21]]))
    np.testing.assert_array_equal(theirs, expected)
    other.reset()
    assert engine.past_length == ids.shape[1] + 2 and other.past_length == 0
    other.release()
    assert step(engine, both).shape == expected.shape


def test_tokens_are_taken_back_where_they_can_be(engine_and_ids):
    engine, ids = engine_and_ids
    length = ids.shape[1]
    expected = step(engine, np.array([[7]]))
    if not engine.can_crop:
        with pytest.raises(ValueError, match="cannot be taken back one by one"):
            engine.crop(length)
        engine.crop(length + 1)  # all that there is
        engine.crop(0)
        step(engine, ids)
    engine.crop(length)
    np.testing.assert_allclose(step(engine, np.array([[7]])), expected, atol=1e-4)


def test_equal_rows_are_computed_once(either_model):
    model = either_model("chatglm3-6b")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10], [5, 6, 7]])
    computed = []
    model.compile()
    run = model.engine.run
    try:
        model.engine.run = lambda inputs: computed.append(inputs["input_ids"].tolist()) or run(inputs)
        output = model(ids)
        assert computed == [[[5, 6, 7], [8, 9, 10]]] and model.engine.batch_size == 3
        torch.testing.assert_close(output.logits[0], output.logits[2], rtol=0, atol=0)
        more = model(torch.tensor([[11], [11], [12]]), past_key_values=output.past_key_values).logits
    finally:
        del model.engine.run
    for row, last in enumerate((11, 11, 12)):
        alone = model(torch.tensor([[*ids[row].tolist(), last]])).logits[0, -1]
        torch.testing.assert_close(more[row, -1], alone, rtol=0, atol=1e-4)
