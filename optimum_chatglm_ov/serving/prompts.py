# SPDX-License-Identifier: Apache-2.0
"""Requests as prompts of the model's generation, and settings of the engine."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field, replace
from typing import Any

import jinja2

from ..tokenization.tool_calls import PARSERS
from .engine import GenerationRequest
from .errors import RequestError
from .model import ServedModel
from .schemas import ChatCompletionRequest, CompletionRequest, NamedTool, TokenizeRequest


_KEYS_OF_MESSAGES = ("role", "content", "tool_calls", "tool_call_id", "function_call")
# What a prompt says after the tool's name when it begins a call, where the name alone does not begin it.
_BEGINNINGS_OF_CALLS = {
    "chatglm3": ("{name}", "```python\ntool_call("),
    "glm4": ("{name}", ""),
    "codegeex4": ("", '```json\n{{"name": "{name}", "arguments": '),
}
_MOST_STOPS = 16
_COLDEST = 1e-4  # below it, sampling takes the likeliest token, too


@dataclass(frozen=True)
class Plan:
    """What is to be computed for a request.

    Args:
        generations: one for each answer.
        tools: that may be called, as JSON schemas.
        forced: the tool whose call the prompt begins.
        stops: texts that end an answer, and are no part of it.
        one_call: an answer ends with its first call.
        is_chat: answers are messages, not bare text.
    """

    generations: list[GenerationRequest]
    tools: list[dict[str, Any]] = field(default_factory=list)
    forced: str | None = None
    stops: tuple[str, ...] = ()
    one_call: bool = False
    is_chat: bool = True


def plan_chat(model: ServedModel, request: ChatCompletionRequest, client: str) -> Plan:
    """Plans what to compute for a conversation.

    Raises:
        RequestError: something in it is unsupported, contradictory or too long.
        UnsupportedError: the engine lacks it.
    """
    _refuse(
        request,
        {
            "functions": 'give `tools` of the form {"type": "function", "function": ...}',
            "function_call": "give `tool_choice`",
            "audio": "the model writes text",
            "logit_bias": "the engine has no such setting",
            "top_logprobs": "only the probability of the chosen token is known; `logprobs` gives it",
        },
    )
    if request.modalities not in (None, [], ["text"]):
        raise _unsupported("modalities", "the model writes text")
    tools, forced = _tools(model, request)
    schema = _json_schema(request)
    if schema is not None and tools:
        raise _unsupported("response_format", "it cannot be kept together with `tools`; leave one out")
    ids = conversation_ids(model, request.messages, tools, forced)
    plan = _plan(model, request, [ids], request.max_completion_tokens or request.max_tokens, schema, client)
    return replace(plan, tools=tools, forced=forced, one_call=request.parallel_tool_calls is False)


def plan_completion(model: ServedModel, request: CompletionRequest, client: str) -> Plan:
    """Plans what to compute for bare texts; raises as [`plan_chat`]."""
    _refuse(
        request,
        {
            "echo": "the prompt is not given back",
            "suffix": "the model writes forward",
            "logit_bias": "the engine has no such setting",
        },
    )
    if (request.best_of or 1) not in (1, request.n or 1):
        raise _unsupported("best_of", "all answers are given; use `n`")
    if (request.logprobs or 0) > 1:
        raise _unsupported("logprobs", "only the probability of the chosen token is known; use 0 or 1")
    prompts = request.prompt
    if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int):
        prompts = [prompts]
    ids = [_text_ids(model, prompt) for prompt in prompts]
    plan = _plan(model, request, ids, request.max_tokens or 16, _json_schema(request), client)
    return replace(plan, is_chat=False)


def tokenize(model: ServedModel, request: TokenizeRequest) -> list[int]:
    """Encodes a text or a conversation."""
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("Give one of `prompt` and `messages`.", parameter="prompt")
    if request.messages is not None:
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
        return conversation_ids(model, request.messages, tools, None, request.add_generation_prompt)
    return model.tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens)


def conversation_ids(
    model: ServedModel,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    forced: str | None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Encodes the prompt of a conversation, by the generation's rules; with `forced`, it begins a call of that tool.

    Raises:
        RequestError: it has no form.
    """
    said = [{key: message[key] for key in _KEYS_OF_MESSAGES if key in message} for message in messages]
    for message in said:
        if message.get("role") == "developer":
            message["role"] = "system"
    try:
        ids = model.tokenizer.apply_chat_template(
            said,
            tools=tools or None,
            add_generation_prompt=add_generation_prompt and forced is None,
            return_dict=True,
        )["input_ids"]
        if forced is not None:
            metadata, content = _BEGINNINGS_OF_CALLS[model.generation]
            content = content.format(name=forced)
            ids = ids + model.tokenizer.build_single_message("assistant", metadata.format(name=forced), content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, jinja2.TemplateError) as error:
        raise RequestError(f"The conversation has no form: {error}", parameter="messages") from error
    return list(ids)


def _tools(model: ServedModel, request: ChatCompletionRequest) -> tuple[list[dict[str, Any]], str | None]:
    choice = request.tool_choice
    if choice == "required":
        raise _unsupported("tool_choice", "the model decides which function it calls; name one, or use auto")
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names):
        raise RequestError("`tools`: a name occurs twice; give each function a name of its own.", parameter="tools")
    forced = choice.function.name if isinstance(choice, NamedTool) else None
    if forced is not None and forced not in names:
        raise RequestError(
            f"`tool_choice` names {forced!r}, which is not among `tools` ({', '.join(names) or 'none'}).",
            parameter="tool_choice",
        )
    if choice == "none":
        return [], None
    if tools and model.generation not in PARSERS:
        raise _unsupported("tools", f"{model.generation} was not trained to call; use one of {', '.join(PARSERS)}")
    return tools, forced


def _json_schema(request: ChatCompletionRequest | CompletionRequest) -> str | None:
    response_format = request.response_format
    if response_format is None or response_format.type == "text":
        return None
    if response_format.type == "json_object":
        return '{"type": "object"}'
    if response_format.json_schema is None:
        raise RequestError(
            "`response_format`: `json_schema` with `schema` is missing.", parameter="response_format.json_schema"
        )
    return json.dumps(response_format.json_schema.json_schema)


def _text_ids(model: ServedModel, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        try:
            ids = model.tokenizer(prompt)["input_ids"]
        except (ValueError, KeyError) as error:
            raise RequestError(f"The prompt has no tokens: {error}", parameter="prompt") from error
    else:
        ids = prompt
    limit = getattr(model.config, "vocab_size", None) or model.config.padded_vocab_size
    wrong = next((token_id for token_id in ids if not 0 <= token_id < limit), None)
    if wrong is not None:
        raise RequestError(f"{wrong} is not a token id; expected 0 to {limit - 1}.", parameter="prompt")
    if not ids:
        raise RequestError("The prompt is empty.", parameter="prompt")
    return list(ids)


def _plan(
    model: ServedModel,
    request: ChatCompletionRequest | CompletionRequest,
    prompts: list[list[int]],
    max_tokens: int | None,
    schema: str | None,
    client: str,
) -> Plan:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > _MOST_STOPS or not all(stops):
        raise RequestError(f"`stop`: give up to {_MOST_STOPS} texts that are not empty.", parameter="stop")
    family = model.rules.family
    temperature = request.temperature
    if temperature is None:
        temperature = 0.0 if model.options.greedy else family.temperature
    seed = secrets.randbits(31) if request.seed is None else request.seed & (2**63 - 1)
    first = GenerationRequest(
        input_ids=[],
        max_new_tokens=1,
        stop_ids=tuple(model.tokenizer.turn_end_ids),
        do_sample=temperature >= _COLDEST,
        temperature=temperature if temperature >= _COLDEST else 1.0,
        top_p=family.top_p if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        repetition_penalty=request.repetition_penalty or 1.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logprobs=request.logprobs is not None and request.logprobs is not False,
        json_schema=schema,
        client=client,
    )
    model.engine.check(first)
    generations = [
        replace(first, input_ids=ids, max_new_tokens=_room(model, len(ids), max_tokens), seed=seed + index)
        for ids in prompts
        for index in range(request.n or 1)
    ]
    return Plan(generations, stops=tuple(stops))


def _room(model: ServedModel, prompt_tokens: int, max_tokens: int | None) -> int:
    limit = model.engine.prompt_and_answer
    room = limit - prompt_tokens
    if room < 1 or (max_tokens or 0) > room:
        asked = f"{prompt_tokens} tokens of the prompt" + (f" and {max_tokens} of the answer" if max_tokens else "")
        raise RequestError(
            f"{asked} are more than the {limit} that this server takes. Shorten the conversation, or lower "
            "`max_tokens`.",
            parameter="messages",
            code="context_length_exceeded",
        )
    return max_tokens or room


def _refuse(request: Any, reasons: dict[str, str]) -> None:
    for name, reason in reasons.items():
        if getattr(request, name, None):
            raise _unsupported(name, reason)


def _unsupported(name: str, reason: str) -> RequestError:
    return RequestError(f"`{name}` is not supported: {reason}.", parameter=name, code="unsupported_parameter")
