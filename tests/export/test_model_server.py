# SPDX-License-Identifier: Apache-2.0
"""The files for OpenVINO Model Server are what its schemas let them be.

The tables below are facts of openvinotoolkit/model_server (`src/llm/llm_calculator.proto`, `src/schema.cpp`) and, for
the graph around the options, of google/mediapipe (`calculator.proto`, `stream_handler.proto`).
"""

import json

import jsonschema
import pytest
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, message_factory, text_format

from optimum_chatglm_ov import export_model
from optimum_chatglm_ov.configuration import ChatGLMConfig
from optimum_chatglm_ov.export.model_server import save_model_server_files


Field = descriptor_pb2.FieldDescriptorProto
PIPELINE_TYPES = ("LM", "VLM", "LM_CB", "VLM_CB", "AUTO")
# Message -> name of each field -> its label and type.
MESSAGES = {
    "LLMCalculatorOptions": {
        "models_path": "required string",
        "max_num_batched_tokens": "optional uint64",
        "cache_size": "optional uint64",
        "max_num_seqs": "optional uint64",
        "dynamic_split_fuse": "optional bool",
        "device": "optional string",
        "plugin_config": "optional string",
        "best_of_limit": "optional uint32",
        "max_tokens_limit": "optional uint32",
        "enable_prefix_caching": "optional bool",
        "pipeline_type": "optional .mediapipe.LLMCalculatorOptions.PipelineType",
        "tool_parser": "optional string",
        "reasoning_parser": "optional string",
    },
    "SyncSet": {"tag_index": "repeated string"},
    "SyncSetInputStreamHandlerOptions": {"sync_set": "repeated .mediapipe.SyncSet"},
    "MediaPipeOptions": {},
    "InputStreamHandlerConfig": {
        "input_stream_handler": "optional string",
        "options": "optional .mediapipe.MediaPipeOptions",
    },
    "InputStreamInfo": {"tag_index": "optional string", "back_edge": "optional bool"},
    "Node": {
        "name": "optional string",
        "calculator": "optional string",
        "input_stream": "repeated string",
        "output_stream": "repeated string",
        "input_side_packet": "repeated string",
        "node_options": "repeated .google.protobuf.Any",
        "input_stream_info": "repeated .mediapipe.InputStreamInfo",
        "input_stream_handler": "optional .mediapipe.InputStreamHandlerConfig",
    },
    "CalculatorGraphConfig": {
        "node": "repeated .mediapipe.Node",
        "input_stream": "repeated string",
        "output_stream": "repeated string",
    },
}
# Of config.json: what an entry of a model or a graph may have.
CONFIG_SCHEMA = {
    "type": "object",
    "required": ["model_config_list"],
    "additionalProperties": False,
    "properties": {
        "model_config_list": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["config"],
                "maxProperties": 1,
                "properties": {
                    "config": {
                        "type": "object",
                        "required": ["name"],
                        "additionalProperties": False,
                        "properties": {
                            **dict.fromkeys(("name", "base_path", "graph_path", "subconfig"), {"type": "string"}),
                            "target_device": {"type": "string"},
                            "plugin_config": {"type": "object"},
                        },
                    }
                },
            },
        }
    },
}


def add_field(fields, number, name, kind):
    label, type_name = kind.split()
    field = fields.add(name=name, number=number, label=getattr(Field, f"LABEL_{label.upper()}"))
    if not type_name.startswith("."):
        field.type = getattr(Field, f"TYPE_{type_name.upper()}")
    else:
        field.type = Field.TYPE_ENUM if type_name.endswith("PipelineType") else Field.TYPE_MESSAGE
        field.type_name = type_name
    return field


@pytest.fixture(scope="module")
def pool():
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="mediapipe", syntax="proto2")
    file.dependency.append("google/protobuf/any.proto")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            add_field(message.field, number, field, kind)
        if name == "LLMCalculatorOptions":
            values = message.enum_type.add(name="PipelineType").value
            for number, value in enumerate(PIPELINE_TYPES):
                values.add(name=value, number=number)
        if name == "SyncSetInputStreamHandlerOptions":
            extension = add_field(message.extension, 1000, "ext", f"optional .mediapipe.{name}")
            extension.extendee = ".mediapipe.MediaPipeOptions"
        if name == "MediaPipeOptions":
            message.extension_range.add(start=1000, end=1001)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return pool


def message_class(pool, name):
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mediapipe.{name}"))


def read_graph(pool, folder):
    """The node of the graph, and the options of its calculator."""
    text = (folder / "graph.pbtxt").read_text(encoding="utf-8")
    graph = text_format.Parse(text, message_class(pool, "CalculatorGraphConfig")(), descriptor_pool=pool)
    assert graph.input_stream == ["HTTP_REQUEST_PAYLOAD:input"]
    assert graph.output_stream == ["HTTP_RESPONSE_PAYLOAD:output"]
    (node,) = graph.node
    (packed,) = node.node_options
    options = message_class(pool, "LLMCalculatorOptions")()
    assert packed.Unpack(options) and options.IsInitialized()
    return node, options


@pytest.mark.parametrize(
    "name, pipeline_type, plugin_config",
    [
        ("chatglm3-6b", "LM_CB", None),
        ("glm4", "LM_CB", None),
        ("chatglm-6b-3layer-untied", "LM", {"ATTENTION_BACKEND": "SDPA"}),
        ("chatglm2-6b-ptuning-v2", "LM", {"ATTENTION_BACKEND": "SDPA"}),
    ],
)
def test_files_follow_the_schemas(name, pipeline_type, plugin_config, pool, checkpoint, tmp_path):
    folder = export_model(checkpoint(name), tmp_path / name, ovms=True)
    node, options = read_graph(pool, folder)
    assert node.calculator == "HttpLLMCalculator" and node.input_side_packet == ["LLM_NODE_RESOURCES:llm"]
    assert {*node.input_stream} == {"LOOPBACK:loopback", "HTTP_REQUEST_PAYLOAD:input"}
    assert {*node.output_stream} == {"LOOPBACK:loopback", "HTTP_RESPONSE_PAYLOAD:output"}
    assert node.input_stream_info[0].tag_index == "LOOPBACK:0" and node.input_stream_info[0].back_edge
    handler = node.input_stream_handler
    extension = pool.FindExtensionByName("mediapipe.SyncSetInputStreamHandlerOptions.ext")
    assert handler.input_stream_handler == "SyncSetInputStreamHandler"
    assert handler.options.Extensions[extension].sync_set[0].tag_index == ["LOOPBACK:0"]
    assert (options.models_path, options.device) == ("./", "CPU")
    assert PIPELINE_TYPES[options.pipeline_type] == pipeline_type
    assert (json.loads(options.plugin_config) if options.plugin_config else None) == plugin_config
    assert options.enable_prefix_caching == (pipeline_type == "LM_CB")
    server = json.loads((folder / "model_server.json").read_text(encoding="utf-8"))
    jsonschema.validate(server, CONFIG_SCHEMA)
    assert server["model_config_list"] == [{"config": {"name": name, "base_path": "."}}]


@pytest.mark.parametrize("name", ['a "b" {c}\\', "好"])
def test_names_are_written_as_json(name, tmp_path):
    save_model_server_files(tmp_path, name, ChatGLMConfig(seq_length=128))
    server = json.loads((tmp_path / "model_server.json").read_text(encoding="utf-8"))
    assert server["model_config_list"][0]["config"]["name"] == name


@pytest.mark.parametrize(
    "right, wrong, message",
    [
        ("max_num_seqs: 256", "max_num_seqs: -1", "out of range|Couldn't parse"),
        ("pipeline_type: LM_CB", "pipeline_type: CB", "no value named CB"),
        ("enable_prefix_caching: true", "prefix_caching: true", 'no field named "prefix_caching"'),
    ],
)
def test_the_schema_refuses_other_graphs(right, wrong, message, pool, tmp_path):
    save_model_server_files(tmp_path, "model", ChatGLMConfig(seq_length=128))
    text = (tmp_path / "graph.pbtxt").read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "graph.pbtxt").write_text(text.replace(right, wrong), encoding="utf-8")
    with pytest.raises(text_format.ParseError, match=message):
        read_graph(pool, tmp_path)
