# SPDX-License-Identifier: Apache-2.0
"""generation_config.json as people have it: what has no effect does not end an export; what is wrong does, at once."""

import json
import logging
import shutil

import pytest
import torch
from conftest import DATA

from optimum_chatglm_ov import CheckpointError, OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.checkpoint import checkpoint


SOURCE = DATA / "models" / "chatglm2-6b"
# One value that its mode would honour, for every setting of one mode alone.
OF_SAMPLING = {
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.1,
    "top_h": 0.4,
    "typical_p": 0.9,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
}
OF_BEAMS = {"early_stopping": True, "length_penalty": 2.0, "num_beam_groups": 2, "diversity_penalty": 0.5}
OF_OTHERS = {
    "num_return_sequences": 2,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "cache_implementation": "static",
    "cache_config": {"max_cache_len": 8},
    "pad_token_id": -1,
    "bad_words_ids": [],
}
EVERYTHING = OF_SAMPLING | OF_BEAMS | OF_OTHERS


@pytest.fixture
def source(tmp_path):
    """Writes a checkpoint with these generation settings."""

    def write(settings, **config):
        folder = shutil.copytree(SOURCE, tmp_path / "source", copy_function=shutil.copyfile)
        text = settings if isinstance(settings, str) else json.dumps(settings)
        (folder / "generation_config.json").write_text(text)
        if config:
            (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
        return folder

    return write


def exported(folder, tmp_path):
    return json.loads((export_model(folder, tmp_path / "ir") / "generation_config.json").read_text())


@pytest.mark.parametrize("others", [{}, {"do_sample": False, "num_beams": 1}, {"do_sample": None, "num_beams": None}])
def test_settings_without_their_mode_are_left_out(others, source, tmp_path, caplog):
    folder = source({"eos_token_id": 2, "repetition_penalty": 1.1, **EVERYTHING, **others})
    with caplog.at_level(logging.INFO, "optimum_chatglm_ov"):
        settings = exported(folder, tmp_path)
    assert settings["eos_token_id"] == 2 and settings["repetition_penalty"] == 1.1
    assert not settings.keys() & EVERYTHING.keys()
    (record,) = [record for record in caplog.records if "without effect" in record.getMessage()]
    assert all(name in record.getMessage() for name in EVERYTHING)


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_setting_alone_does_not_end_an_export(name, source, tmp_path):
    assert name not in exported(source({"eos_token_id": 2, name: EVERYTHING[name]}), tmp_path)


def test_an_end_that_is_none_gives_way_to_the_tokenizers(source, tmp_path):
    assert exported(source({"eos_token_id": -1}), tmp_path)["eos_token_id"] == 2


def test_settings_of_the_mode_that_is_chosen_stay(source, tmp_path):
    sampling = {name: value for name, value in OF_SAMPLING.items() if name != "top_h"}  # not in all versions
    chosen = {"do_sample": True, "num_return_sequences": 3, **sampling}
    assert exported(source(chosen), tmp_path).items() >= chosen.items()
    shutil.rmtree(tmp_path / "source")
    chosen = {"num_beams": 3, "num_return_sequences": 2, "early_stopping": True, "length_penalty": 2.0}
    assert exported(source(chosen), tmp_path).items() >= chosen.items()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences"),
        ({"num_beams": 2, "early_stopping": "perhaps"}, "early_stopping"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"streamer": "mine"}, "streamer"),
        ({"pad_token_id": [0]}, r"`pad_token_id` is \[0\]"),
        ({"max_new_tokens": "12"}, "'str' and 'int'"),
        ({"eos_token_id": "2"}, "`eos_token_id` is '2'"),
        ({"eos_token_id": [2, None]}, r"`eos_token_id` is \[2, None\]"),
        ({"do_sample": True, "temperature": 0}, "`temperature` is 0"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "`penalty_alpha` is 0.6"),
        ({"guidance_scale": 1.5}, "`guidance_scale` is 1.5"),
        ({"dola_layers": "low"}, "`dola_layers` is 'low'"),
        ({"prefill_chunk_size": 64}, "`prefill_chunk_size` is 64"),
        ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5}, "num_beam_groups"),
        ("{", "not a JSON object"),
        ("[]", "not a JSON object"),
    ],
)
def test_what_is_refused_is_refused_before_any_work(settings, message, source, tmp_path, monkeypatch):
    folder, read = source(settings), []
    original = checkpoint.Checkpoint._read
    monkeypatch.setattr(checkpoint.Checkpoint, "_read", lambda *arguments: read.append(1) or original(*arguments))
    with pytest.raises(CheckpointError, match=f"generation_config.json: .*{message}"):
        export_model(folder, tmp_path / "ir")
    assert not read and not (tmp_path / "ir").exists()
    (folder / "generation_config.json").unlink()
    export_model(folder, tmp_path / "ir")
    assert read  # so the line above would have seen it


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_a_cache_switched_off_for_training_is_used(place, source, tmp_path, caplog):
    off = {"use_cache": False}
    folder = source(off, use_cache=True) if place == "generation_config.json" else source({}, **off)
    model = OVChatGLMForCausalLM.from_pretrained(folder, load_in_8bit=False)
    (record,) = [record for record in caplog.records if "use_cache" in record.getMessage()]
    assert record.getMessage().startswith(f'{folder / place}: "use_cache": false')
    assert new_tokens_of_calls(model) == [5, 1, 1]
    model.save_pretrained(tmp_path / "saved")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "saved" / name).read_text()).get("use_cache") is not False
    model = OVChatGLMForCausalLM.from_pretrained(folder, load_in_8bit=False, use_cache=False)
    assert new_tokens_of_calls(model) == [5, 6, 7]


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_an_export_of_before_with_its_cache_switched_off_uses_it(place, source, tmp_path, caplog):
    folder = export_model(source({}), tmp_path / "ir")
    if place == "config.json":
        (folder / "generation_config.json").unlink()
    settings = json.loads((folder / place).read_text())
    (folder / place).write_text(json.dumps(settings | {"use_cache": False}))
    model = OVChatGLMForCausalLM.from_pretrained(folder)
    assert f'{folder / place}: "use_cache": false' in caplog.text
    assert new_tokens_of_calls(model) == [5, 1, 1] and model.config.use_cache
    model = OVChatGLMForCausalLM.from_pretrained(folder, use_cache=False)
    assert new_tokens_of_calls(model) == [5, 6, 7]


def new_tokens_of_calls(model):
    """How many tokens each call of a generation computes."""
    lengths, forward = [], model.forward

    def watch(input_ids, *arguments, **settings):
        lengths.append(input_ids.shape[1])
        return forward(input_ids, *arguments, **settings)

    model.forward = watch
    model.generate(torch.tensor([[64, 65, 66, 67, 68]]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return lengths
