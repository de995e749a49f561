# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint and asks it two questions.

    python examples/quickstart.py [MODEL]

MODEL is a Hub id such as THUDM/chatglm3-6b, or a folder; without it, the tiny model of the package answers.
"""

import sys

from transformers import AutoTokenizer

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.assets import TINY_CHATGLM3


model_id = sys.argv[1] if len(sys.argv) > 1 else TINY_CHATGLM3
tokenizer = AutoTokenizer.from_pretrained(model_id)
# An original checkpoint is exported, an exported folder is loaded.
model = OVChatGLMForCausalLM.from_pretrained(model_id)

history = []
for query in ("你好", "What is OpenVINO?"):
    response, history = model.chat(tokenizer, query, history=history, do_sample=False)
    print(f"{query}\n  {response}")
