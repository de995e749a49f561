# SPDX-License-Identifier: Apache-2.0
"""Data that comes with the package."""

from pathlib import Path


TINY_CHATGLM3 = Path(__file__).parent / "tiny-chatglm3"
"""Checkpoint of a tiny bilingual model of the chatglm3 architecture, laid out like an original repository."""
