# SPDX-License-Identifier: Apache-2.0
"""A server with OpenAI's interface: `chatglm-ov serve` starts it, [`app.create_app`] makes it for other servers."""

from __future__ import annotations

from pathlib import Path


def batching_process_path() -> Path:
    """Finds the program that computes for [`engine_batched`]."""
    return Path(__file__).with_name("batching_process.py")
