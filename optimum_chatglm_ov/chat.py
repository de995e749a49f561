# SPDX-License-Identifier: Apache-2.0
"""`chat()` and `stream_chat()` as the original model classes have them, by the rules of each generation."""

from __future__ import annotations

import ast
import copy
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from .architectures.families import Family, family_of_generation
from .errors import ChatGLMError
from .runtime.cache import FusedCache
from .runtime.token_stream import TokenStream
from .tokenization.codegeex4 import defined_functions
from .tokenization.messages import BETWEEN_MESSAGES, PLACEHOLDER, YEAR, as_messages


# One turn is `(query, response)` with ChatGLM and ChatGLM2, `{"role", "content", "metadata"}` afterwards; all read
# both.
History = list[Any]
# A text, or a call: `{"name", "content"}` without tools in the conversation, `{"name", "parameters"}` with them; a
# list of calls where CodeGeeX4 makes several.
Response = str | dict[str, Any] | list[dict[str, Any]]

_PUNCTUATION = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_PUNCTUATION_NEXT_TO_CHINESE = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


class ToolCallError(ChatGLMError, ValueError):
    """The model answered with a call whose arguments cannot be read; nothing was executed."""


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


# What becomes of the generated text --------------------------------------------------------------------------------


def _process_chatglm(text: str) -> str:
    return _PUNCTUATION_NEXT_TO_CHINESE.sub(lambda mark: _PUNCTUATION[mark[0]], _process_chatglm2(text))


def _process_chatglm2(text: str) -> str:
    return text.strip().replace(PLACEHOLDER, YEAR)


# What these may still change when more of an answer is known: ASCII punctuation next to Chinese characters, blanks at
# the end, half a character, and a placeholder.
_UNSETTLED = ",!:;? \n\ufffd"


def settled(response: str) -> str:
    """The part of an unfinished response that later tokens cannot change."""
    for length in range(min(len(PLACEHOLDER) - 1, len(response)), 0, -1):
        if response.endswith(PLACEHOLDER[:length]):
            response = response[:-length]
            break
    return response.rstrip(_UNSETTLED)


def _process_messages(
    text: str, history: History, read_parameters: Callable[[str], dict[str, Any]]
) -> tuple[Response, History]:
    """The last message of `text` (each is metadata, a line break and content), and `history` with all of them."""
    history = copy.deepcopy(history)
    response: Response = ""
    for message in text.split(BETWEEN_MESSAGES):
        metadata, line_break, content = message.partition("\n")
        if not line_break:
            metadata, content = "", message
        name = metadata.strip()
        if not name:
            content = content.strip()
        history.append({"role": "assistant", "metadata": metadata, "content": content})
        if not name:
            response = content.replace(PLACEHOLDER, YEAR)
        elif history[0]["role"] == "system" and history[0].get("tools") is not None:
            response = {"name": name, "parameters": read_parameters(content)}
        else:
            response = {"name": name, "content": content}
    return response, history


def _parameters_of_python(content: str) -> dict[str, Any]:
    """Keyword arguments of `tool_call(city='北京', days=3)` inside a code block; only literals, never evaluated.

    Raises:
        ToolCallError: the block holds anything else.
    """
    code = "\n".join(content.split("\n")[1:-1])
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tool_call"):
            raise ValueError("it is not a call of `tool_call`")
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("an argument has no name")
        parameters = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        if len(parameters) != len(call.keywords):
            raise ValueError("a name occurs twice")
        return parameters
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ToolCallError(
            f"The model's call cannot be read: {error}. Found {content!r}; expected a code block with "
            "`tool_call(name=value, ...)` of literal values. Ask again, or lower `temperature`."
        ) from error


def _parameters_of_json(content: str) -> dict[str, Any]:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unreadable_json(content, error) from error


def _unreadable_json(content: str, error: Exception) -> ToolCallError:
    return ToolCallError(
        f"The model's call cannot be read: {error}. Found {content!r}; expected its arguments as JSON. Ask again, "
        "or lower `temperature`."
    )


def _process_codegeex4(text: str, history: History, incomplete: bool) -> tuple[Response, History]:
    """As `_process_messages`, of messages without metadata, where blocks of JSON are calls if there are functions."""
    can_call = any(defined_functions(message) for message in history)
    history = copy.deepcopy(history)
    content = ""
    for content in map(str.strip, text.split(BETWEEN_MESSAGES)):
        history.append({"role": "assistant", "metadata": "", "content": content})
    calls = _calls_of_blocks(content, incomplete) if can_call else []
    return (calls[0] if len(calls) == 1 else calls or content.replace(PLACEHOLDER, YEAR)), history


def _calls_of_blocks(content: str, incomplete: bool) -> list[dict[str, Any]]:
    """The calls in blocks of JSON with `name` and `arguments`; none where a block is something else.

    Raises:
        ToolCallError: a block that looks like a call is no JSON, and it is complete.
    """
    calls = []
    for block in re.findall(r"```json(.*?)```", content, re.DOTALL):
        try:
            call = json.loads(block)
        except (ValueError, RecursionError) as error:
            if incomplete or '"name"' not in block:
                return []
            raise _unreadable_json(content, error) from error
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            return []
        calls.append({"name": call["name"], "parameters": call["arguments"]})
    return calls


# The generations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatRules:
    """What one generation does in its own way.

    Args:
        family: whose defaults of sampling it has; see [`chat_rules`].
        invalid_score_token_id: see [`InvalidScoreLogitsProcessor`].
        process_text: text of an answer -> response, where a conversation is pairs; else `None`.
        read_parameters: content of a call -> its arguments, where a conversation is messages; else `None`.
        calls_in_blocks: an answer has no metadata, and calls are blocks of JSON in it.
        stream_withholds_last_token: each streamed text leaves out the newest token, which may be a stop token.
        stream_shows_empty_texts: as long as an answer has no text, that is yielded, too.
        has_past_key_values: `stream_chat()` can go on from `past_key_values`.
    """

    family: Family | None = None
    invalid_score_token_id: int = 5
    process_text: Callable[[str], str] | None = None
    read_parameters: Callable[[str], dict[str, Any]] | None = None
    calls_in_blocks: bool = False
    stream_withholds_last_token: bool = False
    stream_shows_empty_texts: bool = False
    has_past_key_values: bool = True

    @property
    def has_messages(self) -> bool:
        """Whether a conversation is a list of messages rather than of `(query, response)` pairs."""
        return self.read_parameters is not None

    def process_response(
        self, text: str, query: str, history: History, role: str = "user", incomplete: bool = False
    ) -> tuple[Response, History]:
        """The response in `text`, and the conversation with this turn.

        Args:
            text: what the model generated.
            query, role: what it answers, and who said that.
            history: the conversation before; it is left as it is. The one after it has its form, except that pairs
                become messages where an answer can be more than a text.
            incomplete: more text may follow; a call that cannot be read yet is given as `{"name", "content"}`.

        Raises:
            ToolCallError: the arguments of a call cannot be read.
        """
        if not self.has_messages:
            response = self.process_text(text)
            if not any(isinstance(item, Mapping) for item in history):
                return response, [*history, (query, response)]
            return response, as_messages([*history, (query, response)])
        return self.read_answer(text, [*as_messages(history), {"role": role, "content": query}], incomplete)

    def read_answer(self, text: str, history: History, incomplete: bool = False) -> tuple[Response, History]:
        """As `process_response`, of messages that end with what is answered."""
        if self.calls_in_blocks:
            return _process_codegeex4(text, history, incomplete)
        try:
            return _process_messages(text, history, self.read_parameters)
        except ToolCallError:
            if not incomplete:
                raise
        response, new_history = _process_messages(text, history, lambda content: {})
        if isinstance(response, dict):
            response = {"name": response["name"], "content": new_history[-1]["content"]}
        return response, new_history


RULES = {
    "chatglm": ChatRules(
        process_text=_process_chatglm,
        stream_withholds_last_token=True,
        stream_shows_empty_texts=True,
        has_past_key_values=False,
    ),
    "chatglm2": ChatRules(process_text=_process_chatglm2),
    "chatglm3": ChatRules(
        read_parameters=_parameters_of_python,
        stream_withholds_last_token=True,
    ),
    "glm4": ChatRules(
        invalid_score_token_id=198,
        read_parameters=_parameters_of_json,
        stream_withholds_last_token=True,
    ),
}
RULES["codegeex4"] = replace(RULES["glm4"], calls_in_blocks=True)


def chat_rules(tokenizer: Any, config: Any) -> ChatRules:
    """Rules for the tokenizer's generation, and the family that the model's configuration makes it.

    Raises:
        ValueError: `tokenizer` is not one of this package's.
    """
    generation = getattr(tokenizer, "chatglm_generation", None)
    if generation not in RULES:
        raise ValueError(
            f"`tokenizer` is a {type(tokenizer).__name__}; expected a ChatGLM tokenizer. Load it with "
            "`AutoTokenizer.from_pretrained(...)` after `import optimum_chatglm_ov`."
        )
    rope_ratio = getattr(config, "rope_ratio", None)
    family = family_of_generation(generation, rope_ratio, config.max_position_embeddings)
    return replace(RULES[generation], family=family)


@dataclass(frozen=True)
class StreamedTokens:
    """What `stream_chat(return_past_key_values=True)` gives as `past_key_values`.

    Args:
        input_ids: int64 [1, L], the tokens of the conversation. The cache itself belongs to the inference request:
            what it does not hold when they come back is computed again, without fused attention all of them.
    """

    input_ids: torch.LongTensor


def _original_positions(chatglm_lacks: int = 0) -> Callable[[Callable], Callable]:
    """Lets arguments after `history` stand where the originals of ChatGLM and ChatGLM2 had them.

    Those have no `role`, and ChatGLM none of the `chatglm_lacks` arguments after it.
    """

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def wrapped(
            self: Any, tokenizer: Any, query: str, history: History | None = None, *args: Any, **kwargs: Any
        ) -> Any:
            if args and not isinstance(args[0], str) and not chat_rules(tokenizer, self.config).has_messages:
                lacking = chatglm_lacks if tokenizer.chatglm_generation == "chatglm" else 0
                args = ("user", *[None] * lacking, *args)
            return method(self, tokenizer, query, history, *args, **kwargs)

        return wrapped

    return decorate


# The model's part --------------------------------------------------------------------------------------------------


class ChatMixin:
    """Conversations for an `InferenceMixin`; rules are those of the tokenizer's generation.

    With fused attention the caches keep a conversation between its turns: of the next prompt, only what comes after
    the longest start that they hold is computed (by chatglm-6b all of it, whose prompts see themselves from both
    sides). The history may be edited, and other calls may come between.
    """

    _conversation: tuple[torch.LongTensor, FusedCache] | None = None  # ids [L] of what the cache holds

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
        output = self._generate_turn(prompt=prompt, num_beams=num_beams, **settings)
        # The last token of ChatGLM3 and GLM-4 is taken for a stop token, whatever it is.
        generated = output.tolist()[0][prompt.shape[1] : -1 if rules.has_messages else None]
        earlier = list(history)
        if rules.has_messages and not _has_pairs(history):
            history.append({"role": role, "content": query})
        return rules.process_response(tokenizer.decode(generated), query, earlier, role)

    @_original_positions(chatglm_lacks=1)  # `past_key_values`
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
        """Answers `query` piece by piece; closing the iterator stops the generation.

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
        with TokenStream(self._generate_turn, prompt=prompt, num_beams=1, **settings) as tokens:
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
        """Arguments of `generate` beside the prompt."""
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

    def _generate_turn(self, prompt: torch.LongTensor, **settings: Any) -> torch.LongTensor:
        """`generate` of one prompt [1, L], which goes on from what the caches hold of it, and keeps them."""
        with self._turns(settings.get("assistant_model")):
            self.compile()
            prompt = prompt.to(self.device)
            settings["return_dict_in_generate"] = True
            # several rows would go on from several caches
            one_row = all((settings.get(name) or 1) == 1 for name in ("num_beams", "num_return_sequences"))
            keeps = one_row and False not in (settings.get("use_cache"), self.generation_config.use_cache)
            conversation, self._conversation = self._conversation, None
            if keeps and conversation is not None and (cache := self._cache_of_start(prompt[0], *conversation)):
                settings["past_key_values"] = cache
            # A prompt has no padding, whatever its ids; positions follow from the mask.
            output = self.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
            cache = output.past_key_values
            if keeps and isinstance(cache, FusedCache):
                self._conversation = output.sequences[0, : cache.get_seq_length()], cache
            return output.sequences

    @staticmethod
    def _cache_of_start(prompt: torch.LongTensor, cached: torch.LongTensor, cache: FusedCache) -> FusedCache | None:
        """`cache` of `cached` [M], cut to what `prompt` [L] starts with; `None` if nothing of it serves."""
        longest = min(len(cached), len(prompt) - 1)  # at least one token is computed: its logits are needed
        same = (cached[:longest] == prompt[:longest]).int().cumprod(0).sum().item()
        if not same or cache.is_outdated or same < cache.uncroppable:
            return None
        cache.crop(same)
        return cache


def _has_pairs(history: History) -> bool:
    return not all(isinstance(item, Mapping) for item in history)


def _continuation(tokenizer: Any, query: str, history: History, role: str) -> torch.LongTensor:
    """int64 [1, L]: what follows the tokens of the conversation before, by the original's rules."""
    if tokenizer.chatglm_generation != "chatglm2" or not history:
        return tokenizer.build_chat_input(query, role=role)["input_ids"]
    # The rounds before are cached; this one goes on in the same text, so without the `▁` that a text begins with.
    rounds = sum(message["role"] == "user" for message in as_messages(history))
    this_round = f"[Round {rounds + 1}]" + tokenizer.build_prompt(query).removeprefix("[Round 1]")
    return torch.tensor([tokenizer.encode("\n\n" + this_round, add_special_tokens=False)[1:]])
