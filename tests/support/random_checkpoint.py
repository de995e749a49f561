# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with random weights of any size, laid out like the originals."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from optimum_chatglm_ov import ChatGLMConfig
from optimum_chatglm_ov.architectures.registry import architecture_of


SMALL = {
    "chatglm": {
        "model_type": "chatglm",
        "_name_or_path": "THUDM/chatglm-6b",
        "position_encoding_2d": True,
        "hidden_size": 256,
        "inner_hidden_size": 512,
        "num_attention_heads": 2,
        "num_layers": 2,
        "max_sequence_length": 256,
        "vocab_size": 320,
        "bos_token_id": 310,
        "eos_token_id": 311,
        "gmask_token_id": 309,
        "mask_token_id": 308,
        "pad_token_id": 3,
    },
    "chatglm2": {
        "model_type": "chatglm",
        "_name_or_path": "THUDM/chatglm3-6b",
        "hidden_size": 512,
        "ffn_hidden_size": 768,
        "kv_channels": 128,
        "num_attention_heads": 4,
        "num_layers": 2,
        "seq_length": 512,
        "padded_vocab_size": 320,
        "add_qkv_bias": True,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}


def make(folder: Path, architecture: str, dtype: torch.dtype = torch.float16, **changes) -> Path:
    """Writes a checkpoint of `architecture` with head_dim 128; `changes` go to its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {**SMALL[architecture], **changes}
    (folder / "config.json").write_text(json.dumps(values))
    declared = architecture_of(ChatGLMConfig(**values)).tensors()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, stored in declared.items():
        shape = stored.shape
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.1
        tensor = torch.randn(shape, generator=generator) * scale
        tensors[stored.original] = (tensor + ("norm" in name and name.endswith("weight"))).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder
