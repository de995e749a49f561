# SPDX-License-Identifier: Apache-2.0
"""ChatGLM2, ChatGLM3 and GLM-4 in plain torch, without any other library's modeling code.

It is what `train_tiny_chatglm.py` trains, and what the tests compare an exported model with. Parameters have the
names of the original checkpoints, so `load_state_dict` takes those as they are. Everything runs in float32.

B is the batch size, L the number of new tokens, P of past ones, H and G the number of query and of key/value heads,
D `head_dim`, E `hidden_size` and V `vocab_size`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from optimum_chatglm_ov.configuration import ChatGLMConfig


KeyValue = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, x [..., E]."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class RotaryEmbedding(nn.Module):
    """Rotates the interleaved pairs (2j, 2j + 1) of the first half of each head; the second half has no position."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.base, self.position_scale = config.rope_theta, config.rope_position_scale
        self.rotary_dim = config.head_dim // 2
        exponents = torch.arange(0, self.rotary_dim, 2) / self.rotary_dim
        # The originals store this buffer, rounded and without `rope_ratio`, and never use its values.
        self.register_buffer("inv_freq", (1.0 / 10000.0**exponents).half())

    def angles(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [B, 1, L, D / 4]"""
        exponents = torch.arange(0, self.rotary_dim, 2, device=position_ids.device) / self.rotary_dim
        return (position_ids / self.position_scale)[:, None, :, None] / self.base**exponents

    def forward(self, x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        """[B, heads, L, D] -> [B, heads, L, D]"""
        rotated, passed = x.split(self.rotary_dim, dim=-1)
        even, odd = rotated[..., 0::2], rotated[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        return torch.cat((rotated, passed), dim=-1)


class SelfAttention(nn.Module):
    """Attention with G key/value heads for H query heads; query head h uses key/value head h // (H / G)."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.grouped = config.multi_query_attention
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.query_log_scaling = config.query_log_scaling
        width = self.heads * self.head_dim
        qkv_bias = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, width + 2 * self.groups * self.head_dim, bias=qkv_bias)
        self.dense = nn.Linear(width, config.hidden_size, bias=config.add_bias_linear)

    def forward(
        self,
        x: torch.Tensor,
        rotary: RotaryEmbedding,
        angles: torch.Tensor,
        visible: torch.Tensor,
        past: KeyValue | None,
    ) -> torch.Tensor:
        """x [B, L, E], visible [B, 1, L, P + L] bool, past keys and values [B, G, P, D] -> [B, L, E]"""
        query, key, value = self._split_heads(self.query_key_value(x))
        query, key = rotary(query, angles), rotary(key, angles)
        if past is not None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        if self.query_log_scaling:
            index = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=x.device)
            query = query * (torch.log(index + 65.0) / math.log(2048)).clamp(min=1)[:, None]
        key, value = (states.repeat_interleave(self.heads // self.groups, dim=1) for states in (key, value))
        # A finite minimum, so that a row that sees nothing (left padding) is an average and not NaN.
        bias = torch.zeros(visible.shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~visible, torch.finfo(x.dtype).min)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.dense(context.transpose(1, 2).flatten(2))

    def _split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, L, (H + 2G) D] -> query [B, H, L, D], key and value [B, G, L, D]"""
        if self.grouped:  # all queries, then all keys, then all values
            heads = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            return heads.split((self.heads, self.groups, self.groups), dim=1)
        heads = qkv.unflatten(-1, (self.heads, 3, self.head_dim))  # query, key and value of each head
        return tuple(part.transpose(1, 2) for part in heads.unbind(3))


class MLP(nn.Module):
    """SwiGLU: the first half of `dense_h_to_4h` is the gate. [..., E] -> [..., E]"""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        size, bias = config.ffn_hidden_size, config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * size, bias=bias)
        self.dense_4h_to_h = nn.Linear(size, config.hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.input_layernorm = _norm(config)
        self.self_attention = SelfAttention(config)
        self.post_attention_layernorm = _norm(config)
        self.mlp = MLP(config)
        self.residual_after_norm = config.apply_residual_connection_post_layernorm

    def forward(self, x: torch.Tensor, *attention_inputs) -> torch.Tensor:
        normed = self.input_layernorm(x)
        x = (normed if self.residual_after_norm else x) + self.self_attention(normed, *attention_inputs)
        normed = self.post_attention_layernorm(x)
        return (normed if self.residual_after_norm else x) + self.mlp(normed)


class TinyChatGLM(nn.Module):
    """A ChatGLM2, ChatGLM3 or GLM-4 of any size.

    Args:
        config: `architecture` must be `"chatglm2"` (ChatGLM-6B is another architecture).

    Raises:
        ValueError: the configuration is that of ChatGLM-6B.
    """

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        if config.architecture != "chatglm2":
            raise ValueError(f"`architecture` is {config.architecture!r}; this definition is of 'chatglm2' only.")
        self.config = config
        self.transformer = nn.Module()
        self.transformer.embedding = nn.Module()
        self.transformer.embedding.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer.rotary_pos_emb = RotaryEmbedding(config)
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        if config.post_layer_norm:
            self.transformer.encoder.final_layernorm = _norm(config)
        self.transformer.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def from_folder(cls, folder: str | Path) -> TinyChatGLM:
        """The checkpoint in `folder` (safetensors or .bin, not quantised), in float32 and evaluation mode."""
        model = cls(ChatGLMConfig.from_pretrained(folder))
        weights = read_state_dict(folder)
        weights = {name: weight.float() for name, weight in weights.items() if "prefix_encoder" not in name}
        # Some checkpoints leave the unused buffer out.
        buffer = "transformer.rotary_pos_emb.inv_freq"
        weights.setdefault(buffer, model.state_dict()[buffer])
        model.load_state_dict(weights)
        return model.eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
    ) -> torch.Tensor:
        """Logits of all new tokens.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L] or [B, P + L], 0 = hidden. The past is visible where the mask does not cover it.
            position_ids: int64 [B, L]; 0, 1, 2, ... when not given, whatever P is (as P-Tuning wants it).
            past_key_values: one pair of keys (rotated) and values [B, G, P, D] per layer.

        Returns:
            float32 [B, L, V].
        """
        batch, length = input_ids.shape
        past_length = past_key_values[0][0].shape[2] if past_key_values else 0
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device).expand(batch, length)
        total = past_length + length
        visible = torch.ones(length, total, dtype=torch.bool, device=input_ids.device).tril(past_length)
        visible = visible.expand(batch, 1, length, total)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (total - attention_mask.shape[1], 0), value=1)
            visible = visible & (attention_mask != 0)[:, None, None]

        rotary = self.transformer.rotary_pos_emb
        angles = rotary.angles(position_ids)
        hidden_states = self.transformer.embedding.word_embeddings(input_ids)
        for i, layer in enumerate(self.transformer.encoder.layers):
            past = past_key_values[i] if past_key_values else None
            hidden_states = layer(hidden_states, rotary, angles, visible, past)
        if self.config.post_layer_norm:
            hidden_states = self.transformer.encoder.final_layernorm(hidden_states)
        return self.transformer.output_layer(hidden_states)

    @torch.no_grad()
    def greedy(self, input_ids: Sequence[int], stop_ids: Sequence[int], max_new_tokens: int = 128) -> list[int]:
        """The new ids after `input_ids`, most probable one each time, up to and with the first of `stop_ids`."""
        ids = list(input_ids)
        for _ in range(max_new_tokens):
            ids.append(int(self(torch.tensor([ids]))[0, -1].argmax()))
            if ids[-1] in stop_ids:
                break
        return ids[len(input_ids) :]


def prefix_key_values(config: ChatGLMConfig, embedding: torch.Tensor, batch_size: int = 1) -> list[KeyValue]:
    """`past_key_values` of a P-Tuning v2 checkpoint without projection.

    Args:
        embedding: `transformer.prefix_encoder.embedding.weight`, [P, layers * 2 * G * D].
        batch_size: B.
    """
    shape = (-1, config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim)
    layers = embedding.float().view(shape).permute(1, 2, 3, 0, 4)  # [layers, 2, G, P, D]
    return [tuple(part.expand(batch_size, -1, -1, -1) for part in layer) for layer in layers]


def read_state_dict(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder by their original names."""
    folder = Path(folder)
    for name, read in (
        ("model.safetensors", load_file),
        ("pytorch_model.bin", lambda file: torch.load(file, map_location="cpu", weights_only=True)),
    ):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (folder / name).is_file():
            shards = [name]
        else:
            continue
        return {key: tensor for shard in shards for key, tensor in read(folder / shard).items()}
    raise FileNotFoundError(f"{folder}: found neither model.safetensors nor pytorch_model.bin, whole or sharded.")


def _norm(config: ChatGLMConfig) -> nn.Module:
    norm = RMSNorm if config.rmsnorm else nn.LayerNorm
    return norm(config.hidden_size, eps=config.layernorm_epsilon)
