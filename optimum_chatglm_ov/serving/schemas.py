# SPDX-License-Identifier: Apache-2.0
"""Requests in OpenAI's form; fields that are not here are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


_LONGEST_NAME = 128
_LEAST = 1e-4  # what is positive for a client is so for an engine that computes in 32 bits
Name = Annotated[str, Field(min_length=1, max_length=_LONGEST_NAME, pattern=r"^[^\s\"'`<>|{}\\]+$")]
Number = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=False)


class StreamOptions(_Request):
    """What a stream holds besides the answer."""

    include_usage: bool = False


class Function(_Request):
    """A function that may be called."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Request):
    """A tool; there are functions alone."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(_Request):
    """The name of a function."""

    name: Name


class NamedTool(_Request):
    """The function that is to be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(_Request):
    """A JSON schema by which the answer is written."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    name: str = "answer"
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Request):
    """What the answer is: text, a JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class _Sampling(_Request):
    model: Annotated[str, Field(max_length=512)]
    max_tokens: Count | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=_LEAST, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=_LEAST, le=100)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    logit_bias: dict[str, Number] | None = None


class ChatCompletionRequest(_Sampling):
    """A conversation to be gone on with."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None


class CompletionRequest(_Sampling):
    """A text to be gone on with, as text or token ids; several are as many answers."""

    prompt: (
        str | Annotated[list[str], Field(min_length=1)] | list[int] | Annotated[list[list[int]], Field(min_length=1)]
    )
    response_format: ResponseFormat | None = None
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None


class TokenizeRequest(_Request):
    """A text, or a conversation as a prompt, whose token ids are asked for."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
