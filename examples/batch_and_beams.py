# SPDX-License-Identifier: Apache-2.0
"""Answers several questions at once, then looks for the best answers to one with beam search.

    python examples/batch_and_beams.py [MODEL]

MODEL is a Hub id such as THUDM/chatglm3-6b, or a folder; without it, the tiny model of the package answers.
"""

import sys

from transformers import AutoTokenizer

from optimum_chatglm_ov import OVChatGLMForCausalLM
from optimum_chatglm_ov.assets import TINY_CHATGLM3


model_id = sys.argv[1] if len(sys.argv) > 1 else TINY_CHATGLM3
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = OVChatGLMForCausalLM.from_pretrained(model_id)


def tokenize(queries):
    """Prompts of different lengths, padded on the left."""
    conversations = [[{"role": "user", "content": query}] for query in queries]
    return tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


def answers(inputs, outputs):
    """The texts behind the prompts; ChatGLM3 and GLM-4 end them with the role that speaks next."""
    new_tokens = outputs[:, inputs["input_ids"].shape[1] :]
    return [
        text.removesuffix("<|user|>").strip() for text in tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    ]


queries = ["你好", "What is OpenVINO?", "谢谢你！"]
inputs = tokenize(queries)
outputs = model.generate(**inputs, max_new_tokens=128, do_sample=False)
for query, answer in zip(queries, answers(inputs, outputs)):
    print(f"{query}\n  {answer}")

inputs = tokenize(["What is OpenVINO?"])
outputs = model.generate(**inputs, max_new_tokens=128, do_sample=False, num_beams=4, num_return_sequences=2)
print("What is OpenVINO? (the two best of four beams)")
for answer in answers(inputs, outputs):
    print(f"  {answer}")
