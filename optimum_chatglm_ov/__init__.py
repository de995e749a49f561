# SPDX-License-Identifier: Apache-2.0
"""ChatGLM, every generation, on OpenVINO: a plugin of optimum-intel."""

from .configuration import ChatGLMConfig
