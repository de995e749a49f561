# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness scores an exported model as the torch definition of the model scores."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import EXACT, python_path
from reference import TinyChatGLM
from transformers import AutoTokenizer

from optimum_chatglm_ov import export_model
from optimum_chatglm_ov.assets import TINY_CHATGLM3


# The README's command.
COMMAND = "import optimum_chatglm_ov, lm_eval.__main__ as harness; harness.cli_evaluate()"
QUESTIONS = [
    {"question": "你好", "choices": ["你好！", "再见。", "soprano"], "answer": 0},
    {"question": "1+1=", "choices": ["2", "3", "11"], "answer": 0},
    {"question": "天空是什么颜色？", "choices": ["蓝色", "红色的房子", "a  b"], "answer": 0},
]
TASK = """task: tiny_questions
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_scores_are_those_of_the_torch_definition(tmp_path):
    folder = export_model(TINY_CHATGLM3, tmp_path / "model", weight_format="fp32")
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (tmp_path / "ov.json").write_text(json.dumps(EXACT), encoding="utf-8")
    (tmp_path / "task.yaml").write_text(TASK.format(file=tmp_path / "data.json"), encoding="utf-8")
    # else the harness takes the empty text of `</s>` for a prefix that every text has, and adds none
    gmask = AutoTokenizer.from_pretrained(folder).get_command("[gMASK]")
    command = [sys.executable, "-c", COMMAND, "--model", "openvino", "--tasks", str(tmp_path / "task.yaml")]
    command += [
        "--model_args",
        f"pretrained={folder},add_bos_token=True,prefix_token_id={gmask},ov_config={tmp_path / 'ov.json'}",
        "--device",
        "cpu",
    ]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "1"]
    environment = {"PYTHONPATH": ":".join(python_path(tmp_path)), "HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = sorted(map(json.loads, samples.read_text(encoding="utf-8").splitlines()), key=lambda line: line["doc_id"])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), TinyChatGLM.from_folder(TINY_CHATGLM3).eval()
    for line, document in zip(found, QUESTIONS, strict=True):
        scores = [float(response[0][0]) for response in line["resps"]]
        expected = [score(model, tokenizer, document["question"], " " + choice) for choice in document["choices"]]
        assert scores == pytest.approx(expected, abs=2e-3)
        assert line["acc"] == float(expected.index(max(expected)) == document["answer"])


def score(model, tokenizer, context, continuation):
    """Sum of the log-probabilities of the tokens that `continuation` adds to `context`."""
    whole = tokenizer.encode(context + continuation)
    start = len(tokenizer.encode(context))
    with torch.no_grad():
        logits = model(torch.tensor([whole[:-1]]))
    logits = (logits[0] if isinstance(logits, tuple) else logits)[0]
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(whole[1:])[:, None])[:, 0]
    return chosen[start - 1 :].sum().item()
