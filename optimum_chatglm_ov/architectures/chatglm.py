# SPDX-License-Identifier: Apache-2.0
"""ChatGLM-6B, the first generation (`ChatGLMForConditionalGeneration` of chatglm-6b)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import openvino as ov
import torch
from openvino import Node, Type
from openvino import opset13 as ops

from ..checkpoint.weights import Weight
from . import blocks
from .architecture import Architecture
from .decoder import Decoder
from .modules import Module, prefix_encoder


# The original block takes its layer count from a default argument: the residual scale is that of 28 layers, always.
_RESIDUAL_SCALE = math.sqrt(2 * 28)
# Position of a token that has not been seen yet; larger than any context, and exact in f32.
_UNSEEN = 1 << 24


class ChatGLM(Architecture):
    """The architecture of `ChatGLMConfig(architecture="chatglm")`."""

    has_gated_mlp = False
    has_two_positions = True

    def modules(self) -> tuple[Module, ...]:
        hidden, inner, vocab = self.config.hidden_size, self.config.intermediate_size, self.config.vocab_size
        layer = "transformer.layers.{i}"
        modules: tuple[Module, ...] = (
            Module("embed_tokens", "transformer.word_embeddings", (vocab, hidden)),
            Module("layers.{i}.input_layernorm", f"{layer}.input_layernorm", (hidden,), bias=True),
            Module(
                "layers.{i}.self_attn.qkv_proj", f"{layer}.attention.query_key_value", (3 * hidden, hidden), bias=True
            ),
            Module("layers.{i}.self_attn.o_proj", f"{layer}.attention.dense", (hidden, hidden), bias=True),
            Module("layers.{i}.post_attention_layernorm", f"{layer}.post_attention_layernorm", (hidden,), bias=True),
            Module("layers.{i}.mlp.up_proj", f"{layer}.mlp.dense_h_to_4h", (inner, hidden), bias=True),
            Module("layers.{i}.mlp.down_proj", f"{layer}.mlp.dense_4h_to_h", (hidden, inner), bias=True),
            Module("norm", "transformer.final_layernorm", (hidden,), bias=True),
        )
        if not self.config.tie_word_embeddings:
            modules += (Module("lm_head", "lm_head", (vocab, hidden)),)
        return modules

    def prefix_modules(self) -> tuple[Module, ...]:
        return prefix_encoder(self.config, "transformer.prefix_encoder", self.config.hidden_size)

    def key_channels(self) -> np.ndarray:
        """Makes one half-split rotation 1a 2a 1b 2b of the two half-head ones, quarters (1a 1b) and (2a 2b)."""
        return np.arange(self.config.head_dim).reshape(4, -1)[[0, 2, 1, 3]].ravel()

    def build(self, weights: Mapping[str, Weight], prefix: np.ndarray | None = None) -> ov.Model:
        return _Decoder(self, weights, prefix).model("chatglm")

    def prompt_error(self, input_ids: torch.LongTensor) -> str | None:
        """Asks for a `<sop>`, which ends the context, and for a mask token, which says where the answer belongs."""
        config = self.config
        masks = (input_ids == config.gmask_token_id) | (input_ids == config.mask_token_id)
        if ((input_ids == config.bos_token_id).any(dim=1) & masks.any(dim=1)).all():
            return None
        return (
            f"A chatglm-6b prompt must hold [gMASK] ({config.gmask_token_id}) or [MASK] ({config.mask_token_id}) and "
            f"<sop> ({config.bos_token_id}); the tokenizer adds them unless `add_special_tokens=False`."
        )

    def example_prompt(self, length: int, seed: int = 0) -> torch.LongTensor:
        """Ends ordinary tokens with the two that every prompt ends with."""
        prompt = super().example_prompt(length, seed)
        prompt[0, -2:] = torch.tensor([self.config.gmask_token_id, self.config.bos_token_id])
        return prompt

    def context_of(self, input_ids: np.ndarray) -> np.ndarray | None:
        """Context length and position of the mask token, as the graph finds them; it needs both to be there."""
        config = self.config
        ids = config.bos_token_id, config.gmask_token_id, config.mask_token_id
        first = {token_id: np.argmax(input_ids == token_id) for token_id in ids if token_id in input_ids}
        mask = first.get(config.gmask_token_id, first.get(config.mask_token_id))
        return np.array([first[config.bos_token_id], mask], np.int32)

    def prompt_layout(self, position_ids: torch.LongTensor, attention_mask: torch.LongTensor) -> np.ndarray:
        """Reads context length and position of the mask token, i32 `[B, 2]`."""
        first, second = position_ids[:, 0], position_ids[:, 1]
        context_length = ((second == 0) & (attention_mask != 0)).sum(dim=1)
        return torch.stack((context_length, first[:, -1]), dim=1).int().numpy()


class _Decoder(Decoder):
    def __init__(self, architecture: Architecture, weights: Mapping[str, Weight], prefix: np.ndarray | None):
        super().__init__(architecture, weights, prefix)
        context_length, mask_position = self.prompt_layout()
        self.rotary = self.rotary_2d(context_length, mask_position)
        self.mask = blocks.causal_mask(
            self.graph,
            0 if prefix is None else prefix.shape[3],
            visible_to_all=ops.less(self.key_positions(), context_length),
        )

    def prompt_layout(self) -> tuple[Node, Node]:
        """Finds the positions of the first `<sop>` (the context length) and of the mask token, i64 `[B, 1]`.

        Found in `input_ids` when the prompt comes and kept in a state for the calls that follow. `[gMASK]` is
        preferred over `[MASK]`. Until a `<sop>` came, everything belongs to the context.
        """
        ids = self.config.bos_token_id, self.config.gmask_token_id, self.config.mask_token_id
        sop, gmask, mask = (self.first_position(token_id) for token_id in ids)
        unseen = ops.constant(np.int64(_UNSEEN))
        found = ops.concat([sop, ops.select(ops.less(gmask, unseen), gmask, mask)], axis=1)
        batch = ops.gather(ops.shape_of(self.graph.input_ids), blocks.i64(0), blocks.i64(0))
        unseen = ops.constant(np.int32(_UNSEEN))
        start = ops.broadcast(unseen, ops.concat([batch, blocks.i64(2)], axis=0))
        # i32: the CPU plugin has no i64 state, and computes with an f32 one in bf16
        kept, variable_id = blocks.state(self.graph, start, "prompt_layout", Type.i32, [-1, 2])
        layout = ops.select(ops.less(kept, unseen), kept, ops.convert(found, "i32"))
        self.graph.assignments.append(ops.assign(layout, variable_id))
        layout = ops.convert(layout, "i64")
        return ops.gather(layout, blocks.i64(0), blocks.i64(1)), ops.gather(layout, blocks.i64(1), blocks.i64(1))

    def first_position(self, token_id: int) -> Node:
        """Finds the smallest position of `token_id` in each row of this call, i64 `[B, 1]`; else `_UNSEEN`."""
        unseen = ops.constant(np.int64(_UNSEEN))
        here = ops.equal(self.graph.input_ids, ops.constant(np.int64(token_id)))
        return ops.reduce_min(ops.select(here, self.graph.position_ids, unseen), blocks.i64(1), keep_dims=True)

    def key_positions(self) -> Node:
        """Counts the position of every cached and new token, i64 `[B, S]`: its index without the padding before it."""
        return ops.subtract(
            ops.cum_sum(self.graph.attention_mask, ops.constant(np.int64(1))), ops.constant(np.int64(1))
        )

    def rotary_2d(self, context_length: Node, mask_position: Node) -> tuple[Node, Node]:
        """Computes the cosine and sine of the two positions, `[B, 1, L, D]`.

        In the context the first position counts tokens and the second is 0; after it the first stays at the mask token
        and the second counts from 1 (Du et al. 2022, GLM). Each turns its own half of the head.
        """
        position = self.graph.position_ids
        in_context = ops.less(position, context_length)
        zero, one = (ops.constant(np.int64(number)) for number in (0, 1))
        first = ops.select(in_context, position, mask_position)
        second = ops.select(in_context, zero, ops.add(ops.subtract(position, context_length), one))
        half = self.config.head_dim // 2
        # the original computes the frequencies in fp16 and keeps them so
        inv_freq = (1.0 / 10000 ** (np.arange(0, half, 2, dtype=np.float32) / half)).astype(np.float16)
        angles = ops.concat([blocks.rotary_angles(positions, inv_freq) for positions in (first, second)], axis=-1)
        return blocks.cos_and_sin(ops.concat([angles, angles], axis=-1))

    def layer(self, hidden_states: Node, i: int) -> Node:
        normed = self.norm(hidden_states, f"layers.{i}.input_layernorm")
        hidden_states = ops.add(ops.multiply(normed, blocks.f32(_RESIDUAL_SCALE)), self.attention(normed, i))
        normed = self.norm(hidden_states, f"layers.{i}.post_attention_layernorm")
        return ops.add(ops.multiply(normed, blocks.f32(_RESIDUAL_SCALE)), self.mlp(normed, i))

    def attention(self, hidden_states: Node, i: int) -> Node:
        name, heads, head_dim = f"layers.{i}.self_attn", self.config.num_attention_heads, self.config.head_dim
        query, key, value = (
            blocks.split_heads(
                self.linear(hidden_states, f"{name}.qkv_proj", rows, f"{name}.{part}_proj"), heads, head_dim
            )
            for part, rows in zip("qkv", self.qkv_rows())
        )
        query, key = (blocks.apply_rotary(states, *self.rotary, head_dim, head_dim) for states in (query, key))
        return self.linear(self.cached_attention(query, key, value, self.mask, i), f"{name}.o_proj")

    def qkv_rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the rows of the fused projection (per head query, key, value) that are query, key and value."""
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        first = np.arange(heads)[:, None] * 3 * head_dim
        return (
            (first + self.key_channels).ravel(),
            (first + head_dim + self.key_channels).ravel(),
            (first + 2 * head_dim + np.arange(head_dim)).ravel(),
        )

    def mlp(self, hidden_states: Node, i: int) -> Node:
        name = f"layers.{i}.mlp"
        up = self.linear(hidden_states, f"{name}.up_proj")
        return self.linear(ops.gelu(up, approximation_mode="tanh"), f"{name}.down_proj")

    def norm(self, hidden_states: Node, module: str) -> Node:
        return self.layer_norm(hidden_states, module)


ARCHITECTURE = ChatGLM
