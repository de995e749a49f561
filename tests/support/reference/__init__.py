# SPDX-License-Identifier: Apache-2.0
"""The torch definition of ChatGLM2 and later, and the tiny model's training, from `examples/`, for tests."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "training"))

import tiny_chatglm_text as text  # noqa: E402, F401
import train_tiny_chatglm as training  # noqa: E402, F401
from chatglm_torch import TinyChatGLM, prefix_key_values, read_state_dict  # noqa: E402, F401
