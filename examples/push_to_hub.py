# SPDX-License-Identifier: Apache-2.0
"""Exports a model, uploads it to the Hugging Face Hub, and loads it again from there.

    python examples/push_to_hub.py USER/NAME [--model MODEL] [--private] [--endpoint URL]

It needs an access token with the right to write: `hf auth login`, or the environment variable HF_TOKEN.
"""

import argparse
import os
import sys


parser = argparse.ArgumentParser(description="Exports a model, uploads it, and loads it again.")
parser.add_argument("repo_id", metavar="USER/NAME", help="repository on the Hub; created when it does not exist")
parser.add_argument("--model", help="Hub id or folder to export (default: the tiny model of the package)")
parser.add_argument("--private", action="store_true", help="create a private repository")
parser.add_argument("--endpoint", metavar="URL", help="another Hub than huggingface.co")
args = parser.parse_args()
if args.endpoint:
    os.environ["HF_ENDPOINT"] = args.endpoint  # huggingface_hub reads it when it is imported

from huggingface_hub import get_token  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from optimum_chatglm_ov import OVChatGLMForCausalLM  # noqa: E402
from optimum_chatglm_ov.assets import TINY_CHATGLM3  # noqa: E402


if get_token() is None:
    sys.exit("No access token: run `hf auth login`, or set HF_TOKEN to a token that may write.")

model = OVChatGLMForCausalLM.from_pretrained(args.model or TINY_CHATGLM3)
commit = model.push_to_hub(args.repo_id, private=args.private or None, commit_message="Upload the exported model")
print(f"Uploaded: {commit.commit_url}")

tokenizer = AutoTokenizer.from_pretrained(args.repo_id)
model = OVChatGLMForCausalLM.from_pretrained(args.repo_id)
response, history = model.chat(tokenizer, "你好", do_sample=False)
print(f"你好\n  {response}")
