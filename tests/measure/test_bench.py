# SPDX-License-Identifier: Apache-2.0
"""`chatglm-ov bench` measures every way and says so in a table, JSON and a plot; its figures are not tested."""

import functools
import importlib.util
import json
import re

import openvino as ov
import openvino_genai
import pytest
from conftest import DATA, openvino_layers

from optimum_chatglm_ov import OVChatGLMForCausalLM, export_model
from optimum_chatglm_ov.architectures.registry import architecture_of
from optimum_chatglm_ov.assets import TINY_CHATGLM3
from optimum_chatglm_ov.cli.main import main
from optimum_chatglm_ov.ir import load_config
from optimum_chatglm_ov.measure import linear as bench_linear
from optimum_chatglm_ov.measure import speed, turns
from optimum_chatglm_ov.measure.speed import WAYS, measure


SMALL = ["--prompt-tokens", "8", "40", "--new-tokens", "3", "--repetitions", "1"]


@pytest.fixture(scope="module", autouse=True)
def peaks_measured_once():
    """Every run of the command measures the machine, which is the same in all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "machine_peaks", functools.cache(speed.machine_peaks))
        patch.setattr(speed, "stream_bandwidth", functools.cache(speed.stream_bandwidth))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_model(TINY_CHATGLM3, tmp_path_factory.mktemp("ir") / "tiny", weight_format="int8")


def test_every_way_is_measured(folder):
    found = list(measure([folder], WAYS, (8, 40), new_tokens=3, repetitions=1))
    assert [(m.way, m.prompt_tokens) for m in found] == [(way, length) for way in WAYS for length in (8, 40)]
    assert {m.weights for m in found} == {"i8"}
    for m in found:
        assert m.first_token_seconds > 0 and m.token_seconds > 0
        assert m.bandwidth == pytest.approx(m.token_gigabytes / m.token_seconds)
        assert m.bandwidth_share > 0
        assert m.cycles_per_instruction is None or m.cycles_per_instruction > 0
    # a token reads all weights but the embedding, and a cache that 8 bits make half as large, but for the scales
    config = load_config(folder)
    layers = 4 * (256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 384)
    by_way = {m.way: m.token_gigabytes * 1e9 for m in found if m.prompt_tokens == 40}
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * 41.5
    assert by_way["native"] - by_way["native-int8"] == pytest.approx(cache * (128 - 68))
    weights = by_way["native"] - cache * 128
    assert layers + 1280 * 256 < weights < 1.02 * (layers + 1280 * 256)


def test_an_ir_that_holds_the_operation_has_one_way(tmp_path):
    fused = export_model(TINY_CHATGLM3, tmp_path / "ir", attention="native", kv_cache_precision="u8")
    (found,) = measure([fused], ("native-int8",), (8,), new_tokens=2, repetitions=1)
    assert (found.model, found.way, found.prompt_tokens) == (str(fused), "native-int8", 8)
    for ways, message in (
        (("native",), "this IR"),
        (("native-int8", "openvino"), "ways only .* found native-int8, openvino"),
    ):
        with pytest.raises(ValueError, match=message):
            next(measure([fused], ways, (8,), new_tokens=2, repetitions=1))


def test_prompts_differ_and_end_as_the_model_needs(exported):
    config = load_config(exported("chatglm-6b"))
    first, second = (architecture_of(config).example_prompt(12, seed) for seed in (0, 1))
    assert first.shape == (1, 12) and (first != second).any()
    assert first[0, -2:].tolist() == [config.gmask_token_id, config.bos_token_id]
    found = measure([exported("chatglm-6b")], ("openvino", "native"), (12,), new_tokens=2, repetitions=1)
    assert [(m.way, m.prompt_tokens) for m in found] == [("openvino", 12), ("native", 12)]


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b-ptuning-v2"])
def test_a_graph_that_paged_attention_does_not_take(name, exported):
    """openvino-genai runs it, but with its stateful back end."""
    with pytest.raises(ValueError, match=f"{name}: .* the way 'paged'. Leave 'paged' out"):
        next(measure([exported(name)], ("paged",), (12,), new_tokens=2, repetitions=1))


def test_who_computes_linear_layers(exported, folder, monkeypatch):
    layers, from_pretrained = [], OVChatGLMForCausalLM.from_pretrained

    def watch(*arguments, **settings):
        model = from_pretrained(*arguments, **settings)
        layers.append(openvino_layers(model))
        return model

    monkeypatch.setattr(OVChatGLMForCausalLM, "from_pretrained", watch)
    once = {"prompt_lengths": (12,), "new_tokens": 2, "repetitions": 1}
    assert [m.way for m in measure([folder], ("openvino", "native"), linear="native", **once)] == [
        "openvino",
        "native",
    ]
    assert layers == [7 * load_config(folder).num_hidden_layers + 1, 0]
    (found,) = measure([exported("chatglm3-6b")], ("openvino",), linear="native", **once)  # OpenVINO alone
    assert found.way == "openvino" and layers[2:] == [3 * 7 + 1]
    with pytest.raises(ValueError, match="no int8 or int4 linear layers"):
        list(measure([exported("chatglm3-6b")], ("native",), linear="native", **once))


def test_table_json_and_plot(folder, tmp_path, capsys):
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert main(["bench", str(folder), *SMALL, "--attention", "openvino", "native", *files]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "OpenVINO" in printed[0] and re.search(r", stream [\d.]+ GB/s, .*f32 [\d.]+ TFLOP/s", printed[0])
    table = [line for line in printed if line.startswith("|")]
    assert len(table) == 2 + 4 and len({line.count("|") for line in table}) == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert [(m["way"], m["prompt_tokens"]) for m in written["measurements"]] == [
        ("openvino", 8),
        ("openvino", 40),
        ("native", 8),
        ("native", 40),
    ]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_properties_of_every_way(folder, tmp_path, monkeypatch, capsys):
    compiled = []

    class Watched(openvino_genai.LLMPipeline):
        def __init__(self, folder, device, **properties):
            compiled.append(properties)
            super().__init__(folder, device, **properties)

    def watch(*arguments, **settings):
        model = from_pretrained(*arguments, **settings)
        names = ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        compiled.append({name: model.request.get_compiled_model().get_property(name) for name in names})
        return model

    from_pretrained = OVChatGLMForCausalLM.from_pretrained
    monkeypatch.setattr(OVChatGLMForCausalLM, "from_pretrained", watch)
    monkeypatch.setattr(openvino_genai, "LLMPipeline", Watched)
    options = ["--inference-precision", "f32", "--dynamic-quantization-group-size", "0"]
    arguments = [str(folder), "--prompt-tokens", "8", "--new-tokens", "2", "--repetitions", "1", *options]
    assert main(["bench", *arguments, "--attention", *WAYS, "--json", str(tmp_path / "out.json")]) == 0
    given = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    found = {"INFERENCE_PRECISION_HINT": ov.Type.f32, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    assert compiled == [found] * 3 + [{**given, "ATTENTION_BACKEND": "PA"}]
    assert json.loads((tmp_path / "out.json").read_text())["properties"] == given
    header = capsys.readouterr().out.splitlines()[0]
    assert header.endswith(", INFERENCE_PRECISION_HINT=f32, DYNAMIC_QUANTIZATION_GROUP_SIZE=0")


@pytest.mark.parametrize(
    "name, argument",
    [("KV_CACHE_PRECISION", "ways"), ("ATTENTION_BACKEND", "ways"), ("INFERENCE_NUM_THREADS", "threads")],
)
def test_properties_that_other_arguments_decide(name, argument, folder):
    with pytest.raises(ValueError, match=f"`ov_config` has {name}, which `{argument}` decides"):
        next(measure([folder], ov_config={name: "1"}))


def test_without_a_model_the_tiny_one_is_measured(capsys):
    assert main(["bench", *SMALL, "--attention", "openvino"]) == 0
    assert "The tiny model of the package" in capsys.readouterr().out


def test_attention_alone(tmp_path, capsys):
    arguments = ["--prompt-tokens", "40", "--repetitions", "1", "--json", str(tmp_path / "out.json")]
    assert main(["bench", "--attention-only", "chatglm3", *arguments]) == 0
    assert re.search(r"^\| native +\| 1 +\| 40 +\|", capsys.readouterr().out, re.MULTILINE)
    written = json.loads((tmp_path / "out.json").read_text())["measurements"]
    assert {(m["new_tokens"], m["past_tokens"]) for m in written} == {(40, 0), (1, 40)}
    assert {"native", "native-int8", "openvino", "paged", "torch-bf16", "torch-f32"} == {m["way"] for m in written}


def test_linear_layers_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_linear, "CHATGLM3", bench_linear.LinearShape(128, 160, 192, 320))
    arguments = ["--rows", "1", "40", "--repetitions", "1", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(bench_linear, "_STACK_BYTES", 1 << 16)
    monkeypatch.setattr(turns, "PAUSE_SECONDS", 0)
    assert main(["bench", "--linear-only", "chatglm3", *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert re.search(r", stream [\d.]+ GB/s, .*f32 [\d.]+ TFLOP/s$", printed[0])
    table = [line for line in printed if line.startswith("|")]
    assert len(table) == 2 + 4 * 2 * 2 * 2 and re.match(r"\| qkv +\| int8 +\| 1 +\| native +\|", table[2])
    written = json.loads((tmp_path / "out.json").read_text())
    assert {(m["layer"], m["weights"], m["rows"], m["way"]) for m in written["measurements"]} == {
        (layer, weights, rows, way)
        for layer in bench_linear.LAYERS
        for weights in ("int8", "int4")
        for rows in (1, 40)
        for way in ("native", "openvino")
    }
    assert written["peaks"]["stream"] > 0 and written["peaks"]["f32"] > 0


def test_unknown_dimensions_are_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["bench", "--linear-only", "chatglm5"])
    assert exit.value.code == 2
    assert "argument --linear-only: invalid choice: 'chatglm5'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--attention-only", "chatglm3", "some/folder"], 2, "takes no models"),
        (["--attention-only", "chatglm3", "--attention", "native"], 2, "measures every --attention"),
        (["--attention-only", "chatglm3", "--inference-precision", "f32"], 2, "at their default precisions"),
        (["--attention-only", "chatglm3", "--linear", "native"], 2, "measures no linear layers"),
        (["--attention-only", "chatglm3", "--new-tokens", "7"], 2, "and one new token"),
        (["--linear-only", "chatglm3", "some/folder"], 2, "takes no models"),
        (["--linear-only", "chatglm3", "--attention-only", "chatglm3"], 2, "measures no attention"),
        (["--linear-only", "chatglm3", "--inference-precision", "f32"], 2, "at their default precisions"),
        (["--linear-only", "chatglm3", "--linear", "native"], 2, "measures every --linear"),
        (["--rows", "1"], 2, "--rows goes with --linear-only"),
        (["--plot", "out.doc"], 2, "out.doc: the name must end in one of"),
        (["no/such/folder"], 1, "no/such/folder"),
        (["{folder}", "--prompt-tokens", "5000"], 1, "5000 tokens and 32 new ones do not fit the context"),
        (["{folder}", "--new-tokens", "1"], 1, "`new_tokens` is 1; expected at least 2"),
        (
            ["{folder}", *SMALL, "--attention", "openvino", "--json", "no/such/out.json"],
            2,
            "no/such/out.json: cannot be",
        ),
        (
            [str(DATA / "models" / "chatglm3-6b")],
            1,
            "openvino_model.xml: not found; expected the folder of an exported model",
        ),
    ],
)
def test_errors(arguments, code, message, folder, capsys):
    assert main(["bench", *(argument.format(folder=folder) for argument in arguments)]) == code
    assert message in capsys.readouterr().err


def test_paged_without_openvino_genai(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "optimum-chatglm-ov\[bench\]"'):
        next(measure([folder], ("openvino", "paged")))  # before anything is measured


def test_an_unknown_way_is_refused(folder):
    with pytest.raises(ValueError, match="way 'magic' is unknown; expected one of openvino, native"):
        next(measure([folder], ("magic",)))
