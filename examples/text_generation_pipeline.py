# SPDX-License-Identifier: Apache-2.0
"""Uses a model through the text-generation pipeline of transformers.

    python examples/text_generation_pipeline.py [MODEL]

MODEL is a Hub id such as THUDM/chatglm3-6b, or a folder; without it, the tiny model of the package answers.
"""

import sys

from transformers import AutoTokenizer, pipeline

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.assets import TINY_CHATGLM3


model_id = sys.argv[1] if len(sys.argv) > 1 else TINY_CHATGLM3
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = OVChatGLMForCausalLM.from_pretrained(model_id)
generator = pipeline("text-generation", model=model, tokenizer=tokenizer)

for query in ("你好", "What is OpenVINO?"):
    conversation = [{"role": "user", "content": query}]
    [result] = generator(conversation, max_new_tokens=128, do_sample=False)
    answer = result["generated_text"][-1]["content"]
    # ChatGLM3 and GLM-4 end an answer with the role that speaks next.
    print(f"{query}\n  {answer.removesuffix('<|user|>').strip()}")
