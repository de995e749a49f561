# SPDX-License-Identifier: Apache-2.0
"""`chat()` and `stream_chat()` as the original model classes have them, by the rules of each generation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from .runtime.token_stream import TokenStream
from .tokenization.chat_rules import RULES, ChatRules, History, Response, chat_rules
from .tokenization.messages import as_messages
from .tokenization.template_chat import chat_tokenizer


class InvalidScoreLogitsProcessor(LogitsProcessor):
    """Chooses `token_id` for sure when a score [batch, vocab_size] is NaN or infinite."""

    def __init__(self, token_id: int):
        self.token_id = token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if torch.isfinite(scores).all():
            return scores
        scores = torch.zeros_like(scores)
        scores[..., self.token_id] = 5e4
        return scores


@dataclass(frozen=True)
class StreamedTokens:
    """What `stream_chat(return_past_key_values=True)` gives as `past_key_values`.

    Args:
        input_ids: int64 [1, L], the tokens of the conversation. The cache itself belongs to the inference request:
            what it does not hold when they come back is computed again, without native attention all of them.
    """

    input_ids: torch.LongTensor


def _original_positions(takes_past: bool = False) -> Callable[[Callable], Callable]:
    """Lets arguments after `history` stand where the originals of ChatGLM and ChatGLM2 had them.

    Those have no `role`, and ChatGLM no `past_key_values`, which comes after it where the method `takes_past`.
    """

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapped(
            self: Any, tokenizer: Any, query: str, history: History | None = None, *args: Any, **kwargs: Any
        ) -> Any:
            tokenizer = chat_tokenizer(tokenizer, self)
            rules = chat_rules(tokenizer, self.config)
            if args and not isinstance(args[0], str) and not rules.has_messages:
                absent = () if rules.has_past_key_values or not takes_past else (None,)
                args = ("user", *absent, *args)
            return method(self, tokenizer, query, history, *args, **kwargs)

        return wrapped

    return decorate


# The model's part --------------------------------------------------------------------------------------------------


class ChatMixin:
    """Conversations for an `EngineForCausalLM`; rules are those of the tokenizer's generation.

    With native attention the caches keep a conversation between its turns. Only what comes after the longest start
    that they hold is computed of the next prompt; chatglm-6b computes all of it, since its prompts see themselves from
    both sides. The history may be edited, and other calls may come between.
    """

    @torch.no_grad()
    @_original_positions()
    def chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        role: str = "user",
        max_length: int | None = None,
        num_beams: int = 1,
        do_sample: bool = True,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        **kwargs: Any,
    ) -> tuple[Response, History]:
        """Answers `query`.

        Args:
            tokenizer: the model's tokenizer, from `AutoTokenizer`.
            query: what is said now.
            history: earlier turns, as `(query, response)` pairs or as messages (`{"role", "content", "metadata"}`, a
                leading system message may have `"tools"`). ChatGLM3 and GLM-4 append the query to this very list,
                unless it has pairs.
            role: who says it, `"user"` or (ChatGLM3, GLM-4) `"observation"`.
            max_length: tokens of prompt and answer together; unset: the generation's default. Given by position, it
                comes right after `history` with ChatGLM and ChatGLM2, as in their originals.
            num_beams, do_sample, top_p, temperature, logits_processor, kwargs: as in `generate`; unset `top_p` and
                `temperature` are the generation's defaults, and have no effect with `do_sample=False`.

        Returns:
            The response (a text; from ChatGLM3 on also a call as a dict, from CodeGeeX4 also a list of them) and the
            conversation with this turn: pairs for ChatGLM and ChatGLM2, unless messages were given, else messages.

        Raises:
            ToolCallError: the response is a call whose arguments cannot be read; `history` has the query by then.
            ValueError: `tokenizer` is not a ChatGLM tokenizer, or its generation has no such `role`.
        """
        history = [] if history is None else history
        rules = chat_rules(tokenizer, self.config)
        prompt = tokenizer.build_chat_input(query, history=history, role=role)["input_ids"]
        settings = self._chat_settings(
            rules, tokenizer, max_length, do_sample, top_p, temperature, logits_processor, kwargs
        )
        output = self.generate_turn(prompt=prompt, num_beams=num_beams, **settings)
        # The last token of ChatGLM3 and GLM-4 is taken for a stop token, whatever it is.
        generated = output.tolist()[0][prompt.shape[1] : -1 if rules.has_messages else None]
        earlier = list(history)
        if rules.has_messages and not _has_pairs(history):
            history.append({"role": role, "content": query})
        return rules.process_response(tokenizer.decode(generated), query, earlier, role)

    @_original_positions(takes_past=True)
    def stream_chat(
        self,
        tokenizer: Any,
        query: str,
        history: History | None = None,
        role: str = "user",
        past_key_values: StreamedTokens | None = None,
        max_length: int | None = None,
        do_sample: bool = True,
        top_p: float | None = None,
        temperature: float | None = None,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[Response, History] | tuple[Response, History, StreamedTokens]]:
        """Answers `query` piece by piece; closing the iterator ends the answer.

        Args:
            past_key_values: what an earlier call gave with `return_past_key_values=True`; the prompt is then what was
                said and answered before, token by token, and `query`. Not for ChatGLM.
            return_past_key_values: also give a third item, which goes on from this answer.
            tokenizer, query, history, role, max_length, do_sample, top_p, temperature, logits_processor, kwargs: see
                [`chat`].

        Yields:
            The whole response so far, and the conversation with it. A call that is not complete is
            `{"name", "content"}` (by CodeGeeX4, a text). Texts that end inside a character are left out.

        Raises:
            ValueError: see [`chat`]; ChatGLM was given `past_key_values`; or more than one sequence was asked for.
        """
        history = [] if history is None else history
        rules = chat_rules(tokenizer, self.config)
        for name in ("num_beams", "num_return_sequences"):
            if (kwargs.pop(name, None) or 1) != 1:
                raise ValueError(
                    f"`stream_chat` shows one sequence while it grows, so `{name}` is 1; use `chat` for more."
                )
        if kwargs.get("streamer") is not None:
            raise ValueError("`stream_chat` is a stream itself; leave `streamer` out, or use `chat`.")
        if not rules.has_past_key_values and (past_key_values is not None or return_past_key_values):
            raise ValueError("ChatGLM-6B streams without `past_key_values`; pass `history` alone.")
        if past_key_values is None:
            prompt = tokenizer.build_chat_input(query, history=history, role=role)["input_ids"]
        else:
            continuation = _continuation(tokenizer, query, history, role)
            prompt = torch.cat((past_key_values.input_ids, continuation), dim=1)
        settings = self._chat_settings(
            rules, tokenizer, max_length, do_sample, top_p, temperature, logits_processor, kwargs
        )
        earlier, generated = list(history), []
        with TokenStream(self.generate_turn, prompt=prompt, num_beams=1, num_return_sequences=1, **settings) as tokens:
            for token in tokens:
                if rules.has_messages and not generated and not _has_pairs(earlier):
                    history.append({"role": role, "content": query})
                generated.append(token)
                shown = generated[:-1] if rules.stream_withholds_last_token else generated
                text = tokenizer.decode(shown) if shown else ""
                if not shown or text.endswith("\ufffd") or not text and not rules.stream_shows_empty_texts:
                    continue
                turn = rules.process_response(text, query, earlier, role, incomplete=True)
                if return_past_key_values:
                    cached = torch.tensor([prompt[0].tolist() + generated[:-1]])
                    yield *turn, StreamedTokens(cached)
                else:
                    yield turn

    def _chat_settings(
        self,
        rules: ChatRules,
        tokenizer: Any,
        max_length: int | None,
        do_sample: bool,
        top_p: float | None,
        temperature: float | None,
        logits_processor: Sequence[LogitsProcessor] | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """Makes the arguments of `generate` beside the prompt."""
        settings: dict[str, Any] = {
            "do_sample": do_sample,
            # Without sampling: the values that change nothing, as transformers warns of any other.
            "top_p": (rules.family.top_p if top_p is None else top_p) if do_sample else 1.0,
            "temperature": (rules.family.temperature if temperature is None else temperature) if do_sample else 1.0,
            "logits_processor": LogitsProcessorList(
                [*(logits_processor or ()), InvalidScoreLogitsProcessor(rules.invalid_score_token_id)]
            ),
        }
        if max_length is not None or kwargs.get("max_new_tokens") is None:
            limit = min(rules.family.max_length, self.config.max_position_embeddings)
            settings["max_length"] = limit if max_length is None else max_length
        if rules.has_messages:
            settings["eos_token_id"] = tokenizer.turn_end_ids
        if self.generation_config.pad_token_id is None:
            settings["pad_token_id"] = tokenizer.pad_token_id
        return {**settings, **kwargs}


def _has_pairs(history: History) -> bool:
    return not all(isinstance(item, Mapping) for item in history)


def _continuation(tokenizer: Any, query: str, history: History, role: str) -> torch.LongTensor:
    """Encodes what follows the tokens of the conversation before, by the original's rules: int64 [1, L]."""
    if not RULES[tokenizer.chatglm_generation].continues_text or not history:
        return tokenizer.build_chat_input(query, role=role)["input_ids"]
    rounds = sum(message["role"] == "user" for message in as_messages(history))
    this_round = f"[Round {rounds + 1}]" + tokenizer.build_prompt(query).removeprefix("[Round 1]")
    return torch.tensor([tokenizer.encode("\n\n" + this_round, add_special_tokens=False)[1:]])
