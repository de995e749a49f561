# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint with random weights and the dimensions of a real model, to measure exports with.

    python tests/benchmarks/make_random_checkpoint.py chatglm3-6b /data/random-chatglm3-6b --layers 8

The layout is that of the real repository: sharded safetensors with an index. One shard is in memory at a time. There
is no tokenizer, because the tiny ones of the tests do not have its vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from optimum_chatglm_ov import ChatGLMConfig
from optimum_chatglm_ov.architectures.registry import architecture_of


MODELS = {
    "chatglm-6b": {
        "_name_or_path": "THUDM/chatglm-6b",
        "vocab_size": 130528,
        "hidden_size": 4096,
        "inner_hidden_size": 16384,
        "num_layers": 28,
        "num_attention_heads": 32,
        "max_sequence_length": 2048,
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "mask_token_id": 130000,
        "gmask_token_id": 130001,
        "pad_token_id": 3,
        "position_encoding_2d": True,
        "torch_dtype": "float16",
    },
    "chatglm3-6b": {
        "_name_or_path": "THUDM/chatglm3-6b",
        "padded_vocab_size": 65024,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "kv_channels": 128,
        "num_layers": 28,
        "num_attention_heads": 32,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
        "seq_length": 8192,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float16",
    },
    "glm-4-9b-chat": {
        "_name_or_path": "THUDM/glm-4-9b-chat",
        "padded_vocab_size": 151552,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "kv_channels": 128,
        "num_layers": 40,
        "num_attention_heads": 32,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "add_qkv_bias": True,
        "layernorm_epsilon": 1.5625e-07,
        "rope_ratio": 500,
        "seq_length": 131072,
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
        "torch_dtype": "bfloat16",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, help="number of layers instead of the real one")
    parser.add_argument("--shard-size", type=float, default=1.8, help="GB a shard (default: %(default)s)")
    args = parser.parse_args()

    settings = {"model_type": "chatglm"} | MODELS[args.model]
    settings["num_layers"] = args.layers or settings["num_layers"]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "config.json").write_text(json.dumps(settings, indent=2))
    write_weights(ChatGLMConfig(**settings), args.output, getattr(torch, settings["torch_dtype"]), args.shard_size)


def write_weights(config: ChatGLMConfig, folder: Path, dtype: torch.dtype, shard_size: float) -> None:
    """Shards of about `shard_size` GB, and their index."""
    shapes = {tensor.original: tensor.shape for tensor in architecture_of(config).tensors().values()}
    shards = list(split(shapes, shard_size * 1e9 / dtype.itemsize))
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: random_tensor(name, shape, dtype, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shapes, file)
        print(f"{file}: {len(shapes)} tensors", flush=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def split(shapes: dict[str, tuple[int, ...]], numbers: float) -> Iterator[dict[str, tuple[int, ...]]]:
    """`shapes` in order, in parts of up to `numbers` numbers."""
    part: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if part and sum(map(math.prod, part.values())) + math.prod(shape) > numbers:
            yield part
            part = {}
        part[name] = shape
    yield part


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Norm scales near 1; all else normal, with the deviation 0.02 that such models start from."""
    tensor = torch.empty(shape, dtype=dtype).normal_(0, 0.02, generator=generator)
    return tensor + 1 if "norm" in name and name.endswith(".weight") else tensor


if __name__ == "__main__":
    main()
