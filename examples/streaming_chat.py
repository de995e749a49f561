# SPDX-License-Identifier: Apache-2.0
"""Shows answers while they are generated, in the two ways there are.

    python examples/streaming_chat.py [MODEL]

MODEL is a Hub id such as THUDM/chatglm3-6b, or a folder; without it, the tiny model of the package answers.
"""

import sys

from transformers import AutoTokenizer

from optimum_chatglm_ov import ChatGLMTextStreamer, OVChatGLMForCausalLM
from optimum_chatglm_ov.assets import TINY_CHATGLM3


model_id = sys.argv[1] if len(sys.argv) > 1 else TINY_CHATGLM3
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = OVChatGLMForCausalLM.from_pretrained(model_id)

# 1. stream_chat() gives the whole response so far, and the conversation for the next question.
history = []
for query in ("你好", "谢谢"):
    print(query, end="\n  ")
    shown = 0
    for response, new_history in model.stream_chat(tokenizer, query, history=history, do_sample=False):
        print(response[shown:], end="", flush=True)
        shown, history = len(response), new_history
    print()

# 2. generate() takes a streamer; this one never shows half a Chinese character. It shows all that is generated:
# ChatGLM3 and GLM-4 begin with a line break and end with <|user|>, the role that speaks next.
query = "What is OpenVINO?"
print(query, end="\n  ")
inputs = tokenizer.build_chat_input(query)
streamer = ChatGLMTextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
model.generate(**inputs, streamer=streamer, max_new_tokens=128, do_sample=False)
