# SPDX-License-Identifier: Apache-2.0
"""What makes an exported folder a repository of OpenVINO Model Server."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PretrainedConfig

from ..architectures.registry import architecture_of
from ..ir import GRAPH_FILE, SERVER_CONFIG_FILE


# The graph of the server's chat and completion endpoints, as its documentation and `ovms --pull` write it.
_GRAPH = """input_stream: "HTTP_REQUEST_PAYLOAD:input"
output_stream: "HTTP_RESPONSE_PAYLOAD:output"

node: {
  name: "LLMExecutor"
  calculator: "HttpLLMCalculator"
  input_stream: "LOOPBACK:loopback"
  input_stream: "HTTP_REQUEST_PAYLOAD:input"
  input_side_packet: "LLM_NODE_RESOURCES:llm"
  output_stream: "LOOPBACK:loopback"
  output_stream: "HTTP_RESPONSE_PAYLOAD:output"
  input_stream_info: {
    tag_index: "LOOPBACK:0"
    back_edge: true
  }
  node_options: {
    [type.googleapis.com / mediapipe.LLMCalculatorOptions]: {
OPTIONS
    }
  }
  input_stream_handler {
    input_stream_handler: "SyncSetInputStreamHandler"
    options {
      [mediapipe.SyncSetInputStreamHandlerOptions.ext] {
        sync_set {
          tag_index: "LOOPBACK:0"
        }
      }
    }
  }
}
"""


def save_model_server_files(folder: str | Path, name: str, config: PretrainedConfig) -> None:
    """Writes `graph.pbtxt` and `model_server.json` into `folder`, for `ovms --config_path model_server.json`.

    Args:
        folder: of the exported model.
        name: of the model in requests.
        config: of the model. ChatGLM-6B and P-Tuning have no continuous batching, which the others get.
    """
    has_batching = architecture_of(config).paged_attention_error() is None
    options = {"models_path": '"./"', "device": '"CPU"'}
    if has_batching:
        options |= {"pipeline_type": "LM_CB", "enable_prefix_caching": "true", "max_num_seqs": "256"}
    else:
        options |= {"pipeline_type": "LM", "plugin_config": '\'{"ATTENTION_BACKEND": "SDPA"}\''}
    lines = "\n".join(f"      {option}: {value}" for option, value in options.items())
    (Path(folder) / GRAPH_FILE).write_text(_GRAPH.replace("OPTIONS", lines), encoding="utf-8")
    server = {"model_config_list": [{"config": {"name": name, "base_path": "."}}]}
    (Path(folder) / SERVER_CONFIG_FILE).write_text(
        json.dumps(server, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
