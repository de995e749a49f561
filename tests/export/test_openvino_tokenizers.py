# SPDX-License-Identifier: Apache-2.0
"""openvino-genai runs an exported folder from text, with the text that this package's class gives."""

import json
import re

import numpy as np
import openvino as ov
import openvino_genai
import pytest
from conftest import DATA, EXACT
from conversations import conversations
from text_corpus import texts
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from optimum_chatglm_ov import CodeGeeX4Tokenizer, OVChatGLMForCausalLM, export_model, extension_path
from optimum_chatglm_ov.assets import TINY_CHATGLM3
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.ir import OPENVINO_TOKENIZER_FILES
from optimum_chatglm_ov.tokenization.fast import TOKENIZER_FILES
from optimum_chatglm_ov.tokenization.fast.templates import TEMPLATES
from optimum_chatglm_ov.tokenization.vocabulary import whole_characters


ONE_OF_EACH = ("chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat")
PROMPT = "hello 你好 soprano"


def genai_settings(max_new_tokens=20, **settings):
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.apply_chat_template = max_new_tokens, False, False
    for name, value in settings.items():
        setattr(config, name, value)
    return config


def exact_text(folder, prompt, max_new_tokens=20):
    """What this package's class answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = OVChatGLMForCausalLM.from_pretrained(folder, attention="sdpa", ov_config=EXACT)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def same_characters(text):
    """Without what stands for broken UTF-8, of which libraries write different numbers."""
    return re.sub("\ufffd+", "\ufffd", text)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_ids_and_texts(name, exported):
    exact, found = AutoTokenizer.from_pretrained(exported(name)), openvino_genai.Tokenizer(str(exported(name)))
    assert {"openvino_tokenizer.xml", "openvino_detokenizer.xml", TOKENIZER_FILES[0]} <= {
        file.name for file in exported(name).iterdir()
    }
    assert found.get_eos_token_id() == exact.eos_token_id and found.get_pad_token_id() == exact.pad_token_id
    for text in [*texts(120, seed=7), PROMPT, "", "a\nb\t  c", "<|user|> soprano sop </s>"]:
        text = whole_characters(text).replace("\0", "")
        if "<0x" in text or re.search(r"[\u0300-\u036f\u05b0-\u05c7\u064b-\u065f\u093c\u094d\u3099]{2}|´", text):
            continue  # README.md, "Limits"
        for special in (True, False):
            ids = exact.encode(text, add_special_tokens=special)
            assert found.encode(text, add_special_tokens=special).input_ids.data[0].tolist() == ids, text
        if ids and "<|blank_81|>" not in text:
            assert found.decode(ids) == exact.decode(ids, skip_special_tokens=True), text
    ids = [exact.encode(text, add_special_tokens=False) for text in ("好", "a  b")]
    batch = found.encode(["好", "a  b"], add_special_tokens=False)
    width = max(map(len, ids))
    assert batch.input_ids.data.tolist() == [[exact.pad_token_id] * (width - len(row)) + row for row in ids]
    assert batch.attention_mask.data.tolist() == [[0] * (width - len(row)) + [1] * len(row) for row in ids]


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "codegeex4"])
def test_minja_makes_the_same_prompts(name, exported):
    folder = exported("glm-4-9b-chat" if name == "codegeex4" else name)
    exact, found = AutoTokenizer.from_pretrained(folder), openvino_genai.Tokenizer(str(folder))
    if name == "codegeex4":
        exact = CodeGeeX4Tokenizer.from_pretrained(folder, chatglm_generation=name)
        found.chat_template = TEMPLATES[name]
    for messages, tools in conversations(exact):
        expected = exact.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        text = found.apply_chat_template(messages, True, tools=tools or [])
        assert found.encode(text, add_special_tokens=False).input_ids.data[0].tolist() == expected, messages


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "chatglm2-6b-ptuning-v2"])
@pytest.mark.parametrize("backend", ["default", "SDPA"])
def test_pipeline_answers_text(name, backend, exported):
    arguments = {} if backend == "default" else {"ATTENTION_BACKEND": backend}
    pipeline = openvino_genai.LLMPipeline(str(exported(name)), "CPU", **arguments, **EXACT)
    found = pipeline.generate(PROMPT, genai_settings())
    assert same_characters(found) == same_characters(exact_text(exported(name), PROMPT))
    pieces = []
    pipeline.generate(PROMPT, genai_settings(), lambda piece: pieces.append(piece) and None)
    assert "".join(pieces) == found


def scheduler():
    config = openvino_genai.SchedulerConfig()
    config.cache_size, config.enable_prefix_caching = 1, True
    return config


@pytest.mark.parametrize("name", ONE_OF_EACH[1:])
def test_continuous_batching(name, exported):
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(exported(name)), scheduler(), "CPU", EXACT)
    prompts = [PROMPT, "你好", PROMPT + " and more"]
    expected = [same_characters(exact_text(exported(name), prompt)) for prompt in prompts]
    for _ in range(2):  # the second time from the cache of prefixes
        results = pipeline.generate(prompts, [genai_settings()] * 3)
        assert [same_characters(result.m_generation_ids[0]) for result in results] == expected


def test_drafts(exported):
    folder = str(exported("chatglm3-6b"))
    expected = exact_text(folder, PROMPT)
    lookup = openvino_genai.LLMPipeline(folder, "CPU", prompt_lookup=True, **EXACT)
    found = lookup.generate(PROMPT, genai_settings(num_assistant_tokens=3, max_ngram_size=2))
    assert same_characters(found) == same_characters(expected)
    draft = openvino_genai.draft_model(folder, "CPU", **EXACT)
    drafted = openvino_genai.LLMPipeline(folder, "CPU", draft_model=draft, **EXACT)
    found = drafted.generate(PROMPT, genai_settings(num_assistant_tokens=3))
    assert same_characters(found) == same_characters(expected)


@pytest.mark.parametrize("name", ONE_OF_EACH[1:])
def test_structured_output(name, exported):
    pipeline = openvino_genai.LLMPipeline(str(exported(name)), "CPU", **EXACT)
    structured = openvino_genai.StructuredOutputConfig(regex=r'\{"城市": "[a-z]{2}", "x": (true|false)\}')
    found = json.loads(pipeline.generate(PROMPT, genai_settings(60, structured_output_config=structured)))
    assert len(found["城市"]) == 2 and isinstance(found["x"], bool)
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}
    structured = openvino_genai.StructuredOutputConfig(json_schema=json.dumps(schema))
    text = pipeline.generate(PROMPT, genai_settings(60, structured_output_config=structured))
    # a model of random weights may never end the blanks that JSON allows
    assert re.fullmatch(r'\s*\[(\s*"[ab]"\s*(,\s*("([ab]("\s*\]?)?)?)?)?|\s*("[ab]?)?)?\s*', text), text


def test_chat_history(exported):
    folder = exported("glm-4-9b-chat")
    exact = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "你好"}]
    pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **EXACT)
    found = pipeline.generate(openvino_genai.ChatHistory(messages), genai_settings(apply_chat_template=True))
    ids = exact.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    inputs = openvino_genai.TokenizedInputs(ov.Tensor(np.array([ids])), ov.Tensor(np.ones((1, len(ids)), np.int64)))
    expected = pipeline.generate(inputs, genai_settings()).tokens[0]
    assert found.texts[0] == pipeline.get_tokenizer().decode(expected)


def test_command_writes_every_form(tmp_path):
    name = "tokenizers.chatglm3-6b"
    assert main(["tokenizer", str(DATA / "tokenizers" / name), str(tmp_path / "out")]) == 0
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files >= {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", *OPENVINO_TOKENIZER_FILES}
    ids = AutoTokenizer.from_pretrained(DATA / "tokenizers" / name)("a  b 好")["input_ids"]
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a  b 好").ids == ids
    assert main(["tokenizer", str(tmp_path / "out"), str(tmp_path / "out")]) == 0  # in place, and again the same
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("a  b 好").ids == ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a  b 好")["input_ids"] == ids


# Native linear layers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("native") / "chatglm3"
    return export_model(TINY_CHATGLM3, output, weight_format="int8", linear="native", ovms=True)


def test_native_linear_layers_in_genai(native_folder):
    """With one request and with eight; the output layer stays OpenVINO's, of which GenAI computes one position."""
    xml = (native_folder / "openvino_model.xml").read_text(encoding="utf-8")
    assert 'type="ChatGLMMLP"' in xml and xml.count('type="MatMul"') == 1
    card = (native_folder / "README.md").read_text(encoding="utf-8")
    assert "extension_path()" in card and "--cpu_extension" in card
    model = OVChatGLMForCausalLM.from_pretrained(native_folder, attention="sdpa", ov_config=EXACT)
    tokenizer = AutoTokenizer.from_pretrained(native_folder)
    prompts = [PROMPT + " 好" * count for count in range(8)]
    expected = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(same_characters(tokenizer.decode(ids, skip_special_tokens=True)))
    properties = {"extensions": [str(extension_path())], **EXACT}
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(native_folder), scheduler(), "CPU", properties)
    for asked in (prompts[:1], prompts):
        results = pipeline.generate(asked, [genai_settings(12)] * len(asked))
        assert [same_characters(result.m_generation_ids[0]) for result in results] == expected[: len(asked)]


def test_other_packing_is_refused(native_folder, tmp_path):
    xml = (native_folder / "openvino_model.xml").read_text(encoding="utf-8")
    assert 'packing="1"' in xml
    (tmp_path / "openvino_model.xml").write_text(xml.replace('packing="1"', 'packing="7"'), encoding="utf-8")
    (tmp_path / "openvino_model.bin").hardlink_to(native_folder / "openvino_model.bin")
    core = ov.Core()
    core.add_extension(str(extension_path()))
    with pytest.raises(RuntimeError, match="packed in form 7, and this library of optimum-chatglm-ov reads form 1"):
        core.read_model(tmp_path / "openvino_model.xml")


def test_native_linear_layers_need_integers(tmp_path):
    with pytest.raises(ValueError, match="leave `attention` out"):
        export_model(DATA / "models" / "chatglm3-6b", tmp_path / "a", linear="native", attention="fused")
    with pytest.raises(Exception, match="no int8 or int4 linear layers that the native operations take"):
        export_model(DATA / "models" / "chatglm3-6b", tmp_path / "b", linear="native", weight_format="fp16")
    assert not (tmp_path / "b").exists()


# Model Server --------------------------------------------------------------------------------------------------------

# Fields of mediapipe.LLMCalculatorOptions (src/llm/llm_calculator.proto of openvinotoolkit/model_server).
SERVER_OPTIONS = {
    "models_path": str,
    "device": str,
    "plugin_config": str,
    "pipeline_type": ("LM", "VLM", "LM_CB", "VLM_CB", "AUTO"),
    "enable_prefix_caching": bool,
    "max_num_seqs": int,
}


def test_model_server_files(native_folder):
    server = json.loads((native_folder / "model_server.json").read_text(encoding="utf-8"))
    (entry,) = server["model_config_list"]
    assert server.keys() == {"model_config_list"} and entry.keys() == {"config"}
    assert entry["config"] == {"name": "chatglm3", "base_path": "."}
    graph = (native_folder / "graph.pbtxt").read_text(encoding="utf-8")
    assert graph.count("{") == graph.count("}")
    options = re.search(r"LLMCalculatorOptions\]: \{\n(.*?)\n    \}", graph, re.S)[1]
    for line in options.splitlines():
        name, value = line.strip().split(": ", 1)
        kind = SERVER_OPTIONS[name]
        read = value if isinstance(kind, tuple) else json.loads(value)
        assert read in kind if isinstance(kind, tuple) else isinstance(read, kind), line
    assert "pipeline_type: LM_CB" in options
