# SPDX-License-Identifier: Apache-2.0
"""A tiny tokenizer of transformers' fast kind, with the special tokens and the chat template of GLM-4-0414."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from optimum_chatglm_ov.tokenization.glm4 import PATTERN


SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|user|>",
    "<|observation|>",
    "<|assistant|>",
    "<|system|>",
    "[gMASK]",
    "<sop>",
)
# Of words with a blank before them, and of Chinese characters, in the letters of byte-level tokenizers.
MERGES = (("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("ä", "½"), ("ä½", "ł"))
# Of GLM-4-0414: an answer begins with a line break, or with the name of a function.
CHAT_TEMPLATE = """[gMASK]<sop>
{%- if tools -%}
<|system|>
{%- for tool in tools %}
## {{ tool.function.name }}

{{ tool.function | tojson(indent=4) }}
{%- endfor -%}
{%- endif -%}
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.get('metadata', '') }}
{{ message.content }}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens, one a byte, behind the special tokens, and a few that are merged of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = map("".join, MERGES)
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet, *merged))}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    begin = [(token, vocabulary[token]) for token in ("[gMASK]", "<sop>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B:1", special_tokens=begin
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(folder: Path) -> None:
    """Writes the tokenizer beside the weights of a checkpoint."""
    make_tokenizer().save_pretrained(folder)
