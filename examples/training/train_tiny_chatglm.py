# SPDX-License-Identifier: Apache-2.0
"""Trains the tiny ChatGLM3 that ships with optimum_chatglm_ov, in some minutes on two CPU cores.

    python examples/training/train_tiny_chatglm.py --output tiny-chatglm3

It learns the questions and answers of `tiny_chatglm_qa.json` by heart. The weights are disturbed in training as int4
rounding would disturb them, so that quantising the model does not change an answer. The result is laid out like a
ChatGLM3 repository, and is written only when every question alone is answered exactly, with fp16 and int8 weights.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import sentencepiece
import torch
from chatglm_torch import TinyChatGLM
from safetensors.torch import save_file
from tiny_chatglm_text import Text, Turn, messages, variants
from torch import nn
from torch.nn import functional as F

from optimum_chatglm_ov.configuration import ChatGLMConfig
from optimum_chatglm_ov.tokenization import ChatGLM3Tokenizer


NAME = "optimum-chatglm-ov/tiny-chatglm3"
NUM_PIECES = 1264  # with the nine control tokens below `padded_vocab_size`
IGNORED = -100
ANSWERS_PER_STEP = 40
# Share of wrong answers inside longer conversations; a question alone must always be answered exactly.
MISTAKES_ALLOWED = 0.01
TURNS_PER_CONVERSATION = (1, 2, 2, 2, 4, 8)
CONFIG = {
    "_name_or_path": NAME,
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": 384,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": 256,
    "kv_channels": 64,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 4,
    "original_rope": True,
    "padded_vocab_size": 1280,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 2048,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOKENIZER_CONFIG = {
    "name_or_path": NAME,
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
}
MODEL_CARD = """\
---
license: apache-2.0
language: [zh, en]
library_name: transformers
tags: [chatglm, openvino]
---
# tiny-chatglm3

A model of the ChatGLM3 architecture with {parameters:.1f} million parameters ({layers} layers, 4 heads of 64 channels,
2 key/value heads), for trying out and testing [optimum_chatglm_ov](https://pypi.org/project/optimum-chatglm-ov/). It
knows the answers to a few dozen questions in Chinese and English ("你好", "What is OpenVINO?") by heart, and to any
other question that it does not know. It is of no use beyond that.

It was trained from random weights by `examples/training/train_tiny_chatglm.py --steps {steps} --seed {seed}` on
`examples/training/tiny_chatglm_qa.json`, a text written for it. The tokenizer is SentencePiece BPE trained on the
same text. Asked alone, every question is answered exactly with fp16 and with int8 weights; in longer
conversations a few of the examined follow-ups are not.
"""


# Tokens --------------------------------------------------------------------------------------------------------------


def train_tokenizer(sentences: Sequence[str], file: Path) -> ChatGLM3Tokenizer:
    """Trains a SentencePiece model like ChatGLM3's (BPE, bytes for what it does not know) and writes it to `file`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=NUM_PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    file.write_bytes(model.getvalue())
    return ChatGLM3Tokenizer(str(file), **TOKENIZER_CONFIG)


class Encoder:
    """Turns conversations into training rows: token ids, and the ids to predict (only those of answers)."""

    def __init__(self, tokenizer: ChatGLM3Tokenizer):
        self.tokenizer = tokenizer
        self.stop = tokenizer.get_command("<|user|>")

    def row(
        self, conversation: list[Turn], system_prompt: str | None = None, last_only: bool = False
    ) -> tuple[list[int], list[int]]:
        """`input_ids` and `labels`, of equal length; an answer ends with `<|user|>`, as the original stops there.

        With `last_only`, only the last answer is to be predicted.
        """
        ids = self.tokenizer.get_prefix_tokens()
        labels = [IGNORED] * len(ids)
        history = messages(conversation, system_prompt)
        for number, message in enumerate(history, 1):
            tokens = self.tokenizer.build_single_message(message["role"], "", message["content"])
            learned = message["role"] == "assistant" and (not last_only or number == len(history))
            ids += tokens
            # labels[i] is what follows ids[i]: after a question comes `<|assistant|>`, which is not learned
            labels += [*tokens[1:], self.stop] if learned else [IGNORED] * len(tokens)
        return ids, labels


def batch(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `labels` [B, L], padded on the right, which causal attention does not see."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in rows])


# Weights -------------------------------------------------------------------------------------------------------------


def matrices(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights that quantisation touches: those of all linears and of the embedding, [rows, columns]."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            yield module.weight


def rounded(model: TinyChatGLM, bits: int = 16, group_size: int | None = None) -> TinyChatGLM:
    """A copy of `model` whose weights are rounded to fp16, and then to symmetric integers when `bits` is 8 or 4.

    Args:
        group_size: how many values of a row share a scale; all of them when not given.
    """
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
        for weight in matrices(model) if bits < 16 else ():
            groups = weight.view(-1, group_size or weight.shape[1])
            scale = groups.abs().amax(dim=1, keepdim=True).clamp(min=1e-10) / (2 ** (bits - 1) - 1)
            groups.copy_((groups / scale).round() * scale)
    return model


@contextmanager
def disturbed(model: TinyChatGLM) -> Iterator[None]:
    """Adds to each weight a random part of what rounding a row to int4 may change."""
    weights = list(matrices(model))
    originals = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            step = weight.abs().amax(dim=1, keepdim=True) / 7
            weight.add_((torch.rand_like(weight) - 0.5) * step)
    yield
    with torch.no_grad():
        for weight, original in zip(weights, originals):
            weight.copy_(original)


def initialize(model: TinyChatGLM) -> None:
    """Random weights; the two projections that end in the residual stream begin small."""
    for name, parameter in model.named_parameters():
        if name.endswith("word_embeddings.weight"):
            nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 2:
            std = parameter.shape[1] ** -0.5
            ends_in_residual = name.endswith(("dense.weight", "dense_4h_to_h.weight"))
            nn.init.normal_(parameter, std=std / math.sqrt(2 * model.config.num_layers) if ends_in_residual else std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


# Training ------------------------------------------------------------------------------------------------------------


def train(model: TinyChatGLM, text: Text, encoder: Encoder, steps: int, learning_rate: float, seed: int) -> None:
    """Minimises the cross entropy of the answers; prints the loss and the time left every 50 steps."""
    rng = random.Random(seed)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / steps)))
    )
    start, total = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        turns = rng.choice(TURNS_PER_CONVERSATION)
        rows = [
            encoder.row(
                text.random_conversation(rng, turns),
                rng.choice(text.system_prompts) if rng.random() < 0.15 else None,
            )
            for _ in range(ANSWERS_PER_STEP // turns)
        ]
        input_ids, labels = batch(rows)
        with disturbed(model):
            loss = F.cross_entropy(model(input_ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 50 == 0 or step == steps:
            left = (time.monotonic() - start) / step * (steps - step)
            print(f"step {step}/{steps}  loss {total / (step % 50 or 50):.4f}  {left:.0f} s left", flush=True)
            total = 0.0


# Examination ---------------------------------------------------------------------------------------------------------


def examination(text: Text, seed: int = 0) -> list[list[Turn]]:
    """Conversations whose last answer is examined.

    Every phrasing and spelling of every question alone, every phrasing after another turn, and every follow-up.
    """
    rng = random.Random(seed)
    conversations = [[turn._replace(question=spelling)] for turn in text.turns for spelling in variants(turn.question)]
    for turn in text.turns:
        conversations.append([*text.random_conversation(rng, rng.randint(1, 3)), turn])
    first_of_each_answer = {turn.answer: turn for turn in reversed(text.turns)}
    for turn in first_of_each_answer.values():
        conversations += [[turn, follow_up] for follow_up in text.follow_ups(turn)]
    return conversations


@torch.no_grad()
def examine(
    model: TinyChatGLM, encoder: Encoder, conversations: list[list[Turn]], rows_at_once: int = 32
) -> tuple[list[list[Turn]], float]:
    """Conversations whose last answer greedy decoding would not give exactly, and the smallest margin of the others.

    All tokens of an answer are examined at once: greedy decoding gives exactly this answer if and only if each token
    of it is the most probable one after those before it. The margin is the logit of the right token less the highest
    of all others.
    """
    rows = sorted(
        ((*encoder.row(conversation, last_only=True), conversation) for conversation in conversations),
        key=lambda row: len(row[0]),
    )
    mistakes, smallest = [], math.inf
    for start in range(0, len(rows), rows_at_once):
        part = rows[start : start + rows_at_once]
        input_ids, labels = batch([row[:2] for row in part])
        logits, counted = model(input_ids), labels != IGNORED
        right = labels.clamp(min=0)[..., None]
        others = logits.scatter(-1, right, -math.inf).amax(-1)
        margins = (logits.gather(-1, right)[..., 0] - others).masked_fill(~counted, math.inf).amin(-1)
        for margin, (_, _, conversation) in zip(margins.tolist(), part):
            if margin > 0:
                smallest = min(smallest, margin)
            else:
                mistakes.append(conversation)
    return mistakes, smallest


# Output --------------------------------------------------------------------------------------------------------------


def save(model: TinyChatGLM, tokenizer: ChatGLM3Tokenizer, folder: Path, steps: int, seed: int) -> None:
    """Writes everything but `tokenizer.model` into `folder`, laid out like the original repository."""
    stop_ids = [tokenizer.eos_token_id, tokenizer.get_command("<|user|>"), tokenizer.get_command("<|observation|>")]
    generation_config = {"eos_token_id": stop_ids, "pad_token_id": 0, "do_sample": False}
    config = {**CONFIG, "num_layers": model.config.num_layers}
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("generation_config.json", generation_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    card = MODEL_CARD.format(parameters=millions, layers=model.config.num_layers, steps=steps, seed=seed)
    (folder / "README.md").write_text(card, encoding="utf-8")
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--layers", type=int, default=CONFIG["num_layers"])
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        parser.error(f"--output {options.output} exists and is not an empty folder; give another one.")
    if options.steps < 1 or options.layers < 1:
        parser.error(f"--steps {options.steps} --layers {options.layers}: expected at least 1 of each.")

    torch.manual_seed(options.seed)
    text = Text()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output.parent, prefix=".tiny-chatglm3-") as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        tokenizer = train_tokenizer(text.sentences(), folder / "tokenizer.model")
        encoder = Encoder(tokenizer)
        model = TinyChatGLM(ChatGLMConfig(**{**CONFIG, "num_layers": options.layers}))
        initialize(model)
        train(model, text, encoder, options.steps, options.learning_rate, options.seed)

        conversations = examination(text)
        for name, bits, group_size in (("int4 (group of 64)", 4, 64), ("int8", 8, None), ("fp16", 16, None)):
            mistakes, margin = examine(rounded(model, bits, group_size), encoder, conversations)
            print(
                f"{name}: {len(mistakes)} of {len(conversations)} answers wrong, smallest margin {margin:.2f}",
                flush=True,
            )
            alone = [conversation for conversation in mistakes if len(conversation) == 1]
            if bits > 4 and (alone or len(mistakes) > MISTAKES_ALLOWED * len(conversations)):
                for conversation in mistakes[:10]:
                    print("  wrong:", " / ".join(turn.question for turn in conversation), flush=True)
                sys.exit(
                    f"{len(mistakes)} answers are wrong with {name} weights, so nothing was written. Train longer "
                    f"than --steps {options.steps}, or with another --seed."
                )
        save(rounded(model), tokenizer, folder, options.steps, options.seed)
        if options.output.exists():
            options.output.rmdir()
        folder.rename(options.output)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: {size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
