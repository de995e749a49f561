# SPDX-License-Identifier: Apache-2.0
"""P-Tuning v2 prefixes against the original implementation and against P-Tuning written down in torch."""

import json
import os
import shutil

import numpy as np
import peft
import pytest
import torch
from conftest import DATA, EXACT, Golden
from reference import TinyChatGLM, prefix_key_values
from safetensors.torch import save_file

from optimum_chatglm_ov import ChatGLMConfig, CheckpointError, OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.architectures.registry import architecture_of
from optimum_chatglm_ov.checkpoint.prefix import load_prefix


NAMES = ("chatglm-6b-ptuning-v2", "chatglm2-6b-ptuning-v2")
EMBEDDING = "transformer.prefix_encoder.embedding.weight"
# A projected prefix that fits chatglm2-6b.
PROJECTED = {
    f"prefix_encoder.{name}": torch.ones(shape)
    for name, shape in {
        "embedding.weight": (5, 128),
        "trans.0.weight": (64, 128),
        "trans.0.bias": (64,),
        "trans.2.weight": (128, 64),
        "trans.2.bias": (128,),
    }.items()
}


def tensors_of(name):
    return torch.load(DATA / "models" / name / "pytorch_model.bin", weights_only=True)


def logits(folder, ids):
    return OVChatGLMForCausalLM.from_pretrained(folder, ov_config=EXACT)(torch.from_numpy(ids)).logits.numpy()


def key_values(cache):
    """The pairs in a cache of any version of transformers."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache)) if hasattr(cache, "key_cache") else [tuple(c) for c in cache]


def peft_model(name, **settings):
    """A model of PEFT with a random prefix, as the fine-tuning demos of ChatGLM3 and GLM-4 make it."""
    torch.manual_seed(1)
    reference = TinyChatGLM.from_folder(DATA / "models" / name)
    reference.device = torch.device("cpu")  # PEFT asks for it
    config = reference.config
    prefix = peft.PrefixTuningConfig(
        num_virtual_tokens=6,
        num_attention_heads=config.num_key_value_heads,
        token_dim=config.num_key_value_heads * config.head_dim,
        num_layers=config.num_hidden_layers,
        num_transformer_submodules=1,
        **settings,
    )
    return peft.PeftModel(reference, prefix).eval()


@pytest.mark.parametrize("whole_state", [False, True])
@pytest.mark.parametrize("settings", [{}, {"prefix_projection": True, "encoder_hidden_size": 48}], ids=str)
@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_prefix_tuning_of_peft(name, settings, whole_state, tmp_path, either_attention):
    model = peft_model(name, **settings)
    model.save_pretrained(tmp_path / "prefix")
    if whole_state:  # as a training state has it, before PEFT computes the projection
        state = {key: value for key, value in model.state_dict().items() if "prompt_encoder" in key}
        save_file(state, tmp_path / "prefix" / "adapter_model.safetensors")
    ids = torch.from_numpy(Golden(name)["single_input_ids"])
    with torch.no_grad():
        prefix = key_values(model.get_prompt(1))
        expected, plain = model.base_model(ids, past_key_values=prefix), model.base_model(ids)
    folder = export_model(
        DATA / "models" / name, tmp_path / "ir", weight_format="fp32", prefix_encoder=tmp_path / "prefix"
    )
    assert json.loads((folder / "config.json").read_text())["pre_seq_len"] == 6
    loaded = OVChatGLMForCausalLM.from_pretrained(folder, attention=either_attention, ov_config=EXACT)
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-3, rtol=0)
    assert (expected - plain).abs().max() > 0.1


@pytest.fixture(params=["sdpa", "fused"])
def either_attention(request):
    return request.param


@pytest.mark.parametrize(
    "peft_type, message",
    [
        ("LORA", "peft_type is 'LORA'; expected 'PREFIX_TUNING'. Give its folder in `adapters`"),
        ("PROMPT_TUNING", "peft_type is 'PROMPT_TUNING'; expected 'PREFIX_TUNING'"),
        (None, "not the JSON of a PEFT adapter"),
    ],
)
def test_another_adapter_is_no_prefix(peft_type, message, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type} if peft_type else []))
    with pytest.raises(CheckpointError, match=message):
        load_prefix({}, tmp_path, ChatGLMConfig.from_pretrained(DATA / "models" / "chatglm2-6b"), np.arange(8))


def test_a_prefix_is_no_lora_adapter(tmp_path):
    peft_model("chatglm2-6b").save_pretrained(tmp_path / "prefix")
    (tmp_path / "prefix" / "adapter_model.safetensors").rename(tmp_path / "prefix" / "elsewhere")
    source = DATA / "models" / "chatglm2-6b"
    with pytest.raises(CheckpointError, match="no adapter weights found; expected adapter_model.safetensors or"):
        export_model(source, tmp_path / "ir", prefix_encoder=tmp_path / "prefix")
    with pytest.raises(CheckpointError, match="peft_type is 'PREFIX_TUNING'.*Give its folder as `prefix_encoder`"):
        export_model(source, tmp_path / "ir", adapters=[tmp_path / "prefix"])


@pytest.mark.parametrize("name", NAMES)
def test_golden(name, either_model):
    golden, model = Golden(name), either_model(name)
    for case in golden.cases("_logits"):
        inputs = golden.inputs(case)
        if case == "both_masks_model":  # the ids alone: the model finds the positions itself
            inputs = {"input_ids": inputs["input_ids"]}
        found, expected = model(**inputs).logits.numpy(), golden[f"{case}_logits"]
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        rows = (mask if mask.dim() == 2 else ~mask[:, 0].all(dim=1)).bool().numpy()
        np.testing.assert_allclose(found[rows], expected[rows], atol=1e-3, rtol=0, err_msg=case)
    for case in golden.cases("", prefix="greedy_"):
        ids = model.generate(**golden.inputs(case), max_new_tokens=24, do_sample=False).numpy()
        np.testing.assert_array_equal(ids, golden[f"greedy_{case}"], err_msg=case)
    for case in golden.cases("", prefix="beam_"):
        ids = model.generate(**golden.inputs(case), max_new_tokens=16, num_beams=3, do_sample=False).numpy()
        np.testing.assert_array_equal(ids, golden[f"beam_{case}"], err_msg=case)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("saved_as", ["transformer.prefix_encoder.", "prefix_encoder.", ""])
def test_separate_file(name, saved_as, tmp_path):
    """A base checkpoint and the folder of its training equal one checkpoint with both."""
    tensors = tensors_of(name)
    base = shutil.copytree(DATA / "models" / name, tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    length = settings.pop("pre_seq_len")
    (base / "config.json").write_text(json.dumps(settings))
    prefix = tmp_path / "training"
    prefix.mkdir()
    torch.save({f"{saved_as}embedding.weight": tensors.pop(EMBEDDING)}, prefix / "pytorch_model.bin")
    torch.save(tensors, base / "pytorch_model.bin")

    folder = export_model(base, tmp_path / "ir", prefix_encoder=prefix)
    golden = Golden(name)
    np.testing.assert_allclose(logits(folder, golden["single_input_ids"]), golden["single_logits"], atol=1e-3, rtol=0)
    assert ChatGLMConfig.from_pretrained(folder).pre_seq_len == length


def random_encoder(config, length=7):
    """A projected prefix encoder for `config`: embedding, Linear, tanh, Linear."""
    size = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    embedded = config.hidden_size if config.architecture == "chatglm" else size
    layers = torch.nn.Linear(embedded, config.hidden_size), torch.nn.Tanh(), torch.nn.Linear(config.hidden_size, size)
    encoder = {"embedding": torch.nn.Embedding(length, embedded), "trans": torch.nn.Sequential(*layers)}
    return torch.nn.ModuleDict(encoder).requires_grad_(False)


@pytest.mark.parametrize("name", NAMES)
def test_projection(name, tmp_path):
    """A projected prefix equals the one that it computes, given directly."""
    torch.manual_seed(0)
    encoder = random_encoder(ChatGLMConfig.from_pretrained(DATA / "models" / name))
    computed = encoder["trans"](encoder["embedding"].weight)
    direct = shutil.copytree(DATA / "models" / name, tmp_path / "direct")
    projected = shutil.copytree(DATA / "models" / name, tmp_path / "projected")
    settings = json.loads((direct / "config.json").read_text()) | {"pre_seq_len": 7}
    (direct / "config.json").write_text(json.dumps(settings))
    (projected / "config.json").write_text(json.dumps(settings | {"prefix_projection": True}))
    base = {name: tensor for name, tensor in tensors_of(name).items() if name != EMBEDDING}
    torch.save(base | {EMBEDDING: computed}, direct / "pytorch_model.bin")
    parts = {f"transformer.prefix_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    torch.save(base | parts, projected / "pytorch_model.bin")

    ids = Golden(name)["single_input_ids"]
    found, expected = (
        logits(export_model(folder, tmp_path / f"{folder.name}-ir"), ids) for folder in (projected, direct)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat"])
def test_projection_equals_past_key_values_in_torch(name, tmp_path):
    """The plain definition in torch, with what the encoder computes as its past keys and values."""
    torch.manual_seed(1)
    source = DATA / "models" / name
    config = ChatGLMConfig.from_pretrained(source)
    encoder = random_encoder(config)
    torch.save(
        {f"prefix_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}, tmp_path / "prefix.bin"
    )
    past = prefix_key_values(config, encoder["trans"](encoder["embedding"].weight))
    ids = torch.from_numpy(Golden(name)["single_input_ids"])
    with torch.no_grad():
        expected = TinyChatGLM.from_folder(source)(ids, past_key_values=past).numpy()
        without = TinyChatGLM.from_folder(source)(ids).numpy()
    found = logits(export_model(source, tmp_path / "ir", prefix_encoder=tmp_path / "prefix.bin"), ids.numpy())
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=0)
    assert np.abs(without - expected).max() > 0.1


def test_keys_are_reordered_and_values_are_not(tmp_path):
    config = ChatGLMConfig.from_pretrained(DATA / "models" / "chatglm2-6b-ptuning-v2")
    torch.save({EMBEDDING: tensors_of("chatglm2-6b-ptuning-v2")[EMBEDDING]}, tmp_path / "prefix.bin")
    channels = architecture_of(config).key_channels()
    prefix = load_prefix({}, tmp_path / "prefix.bin", config, channels)
    stored = tensors_of("chatglm2-6b-ptuning-v2")[EMBEDDING].float().numpy()
    stored = stored.reshape(5, 2, 2, 2, 16).transpose(1, 2, 3, 0, 4)
    np.testing.assert_array_equal(prefix[:, 1], stored[:, 1])
    np.testing.assert_array_equal(prefix[:, 0], stored[:, 0][..., channels])


def test_prefix_projection_that_is_a_tuple_by_accident_means_false(tmp_path):
    name = "chatglm2-6b-ptuning-v2"
    source = shutil.copytree(DATA / "models" / name, tmp_path / "source")
    settings = json.loads((source / "config.json").read_text()) | {"prefix_projection": [False]}
    (source / "config.json").write_text(json.dumps(settings))
    ids = Golden(name)["single_input_ids"]
    found = logits(export_model(source, tmp_path / "ir"), ids)
    np.testing.assert_allclose(found, Golden(name)["single_logits"], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"other": torch.zeros(2)}, "no tensor 'prefix_encoder.embedding.weight'"),
        ({EMBEDDING: torch.zeros(5, 130)}, "130 numbers a token, expected 128 .*another model"),
        (
            {EMBEDDING: torch.zeros(5, 128), "transformer.prefix_encoder.trans.0.weight": torch.zeros(64, 128)},
            "lacks prefix_encoder.trans.0.bias",
        ),
        ({EMBEDDING: torch.full((5, 128), torch.nan)}, "NaN"),
        ({EMBEDDING: torch.full((5, 128), 1e300, dtype=torch.float64)}, "values beyond the range of float32"),
        ({EMBEDDING: torch.zeros(128)}, r"embedding.weight is \[128\]; expected two dimensions"),
        ({EMBEDDING: torch.zeros(5, 1, 128)}, r"embedding.weight is \[5, 1, 128\]; expected two dimensions"),
        ({EMBEDDING: torch.zeros(0, 128)}, r"embedding.weight is \[0, 128\].*at least one"),
        ({EMBEDDING: torch.zeros(5, 128, dtype=torch.int32)}, "embedding.weight is torch.int32; expected float32"),
        (PROJECTED | {"prefix_encoder.trans.2.bias": torch.zeros(1)}, "do not fit together: .*trans.2.bias .1."),
        (PROJECTED | {"prefix_encoder.trans.0.weight": torch.zeros(128)}, "do not fit together: .*trans.0.weight"),
        (PROJECTED | {"prefix_encoder.trans.0.bias": torch.zeros(64, 1)}, "do not fit together: .*trans.0.bias"),
        (PROJECTED | {"prefix_encoder.trans.2.weight": torch.full((128, 64), 3e38)}, "values beyond the range"),
    ],
)
def test_unusable_prefixes(tensors, message, tmp_path):
    torch.save(tensors, tmp_path / "prefix.bin")
    with pytest.raises(CheckpointError, match=message):
        export_model(DATA / "models" / "chatglm2-6b", tmp_path / "ir", prefix_encoder=tmp_path / "prefix.bin")
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.bin"]


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_file_cut_short(suffix, tmp_path):
    file = tmp_path / f"prefix{suffix}"
    torch.save(PROJECTED, file) if suffix == ".bin" else save_file(PROJECTED, file)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"prefix{suffix}: not a readable weight file .*truncated"):
        export_model(DATA / "models" / "chatglm2-6b", tmp_path / "ir", prefix_encoder=file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="not found"):
        export_model(DATA / "models" / "chatglm2-6b", tmp_path / "ir", prefix_encoder=tmp_path / "none")


def test_prefix_in_a_checkpoint_without_pre_seq_len_is_not_dropped(tmp_path):
    source = shutil.copytree(DATA / "models" / "chatglm2-6b-ptuning-v2", tmp_path / "source")
    settings = json.loads((source / "config.json").read_text())
    del settings["pre_seq_len"]
    (source / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="surplus: transformer.prefix_encoder.embedding.weight"):
        export_model(source, tmp_path / "ir")
