# SPDX-License-Identifier: Apache-2.0
"""A page to talk to the model, made of Gradio's chat; it asks the engine as the API does."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError

from ..tokenization.tool_calls import CallArguments, CallBegin, CallBroken, Text
from .answers import all_answers
from .errors import as_request_error
from .extras import require
from .metrics import Metrics
from .model import ServedModel
from .prompts import plan_chat
from .schemas import ChatCompletionRequest


_WORDS = {
    "title": ("Talk to the model", "与模型对话"),
    "settings": ("Settings", "设置"),
    "system": ("System prompt", "系统提示词"),
    "temperature": ("Temperature (0: the likeliest token)", "温度（0：取概率最大的词元）"),
    "top_p": ("Top p", "Top p"),
    "max_tokens": ("Longest answer, in tokens", "回答的最大词元数"),
    "tools": ("Tools, as JSON in OpenAI's form", "工具（OpenAI 格式的 JSON）"),
    "ask": ("Ask something", "说点什么吧"),
}
_TOOL = "🛠 "
_FONT = ["system-ui", "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", "sans-serif"]


def add_page(app: FastAPI, model: ServedModel, metrics: Metrics) -> None:
    """Shows the page at `/`; where the API has a key, it is asked for as a password.

    Raises:
        MissingExtraError: Gradio is not installed.
    """
    require("web")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    words = gradio.I18n(
        en={key: english for key, (english, _) in _WORDS.items()},
        zh={key: chinese for key, (_, chinese) in _WORDS.items()},
        **{"zh-CN": {key: chinese for key, (_, chinese) in _WORDS.items()}},
    )
    key = model.options.api_key
    gradio.mount_gradio_app(
        app,
        _page(gradio, words, model, metrics),
        path="/",
        i18n=words,
        theme=gradio.themes.Default(font=_FONT, font_mono=["ui-monospace", "monospace"]),
        auth=None if key is None else lambda _, password: hmac.compare_digest(password.encode(), key.encode()),
        show_error=True,
        ssr_mode=False,
        footer_links=["settings"],
    )


def _page(gradio: Any, words: Any, model: ServedModel, metrics: Metrics) -> Any:
    speed = gradio.Markdown(elem_id="speed", render=False)

    async def say(message: str, history: list[dict[str, Any]], *settings: Any) -> AsyncIterator[tuple[list, str]]:
        shown = _Shown(time.perf_counter())
        try:
            request = _request(model, message, history, *settings)
            plan = await asyncio.to_thread(plan_chat, model, request, "page")
            async with aclosing(all_answers(model, plan, metrics)) as pieces:
                async for _, piece in pieces:
                    shown.add(piece)
                    yield [dict(message) for message in shown.messages], shown.speed()
        except Exception as error:
            # raised, it would leave Gradio's box for the next question locked
            gradio.Warning(_reason(error))
            yield shown.messages, ""

    with gradio.Blocks(title=model.name, analytics_enabled=False, fill_height=True) as page:
        gradio.ChatInterface(
            say,
            title=f"{model.name}",
            chatbot=gradio.Chatbot(elem_id="chat", label=words("title"), scale=1, buttons=["copy", "copy_all"]),
            textbox=gradio.Textbox(
                placeholder=words("ask"),
                show_label=False,
                elem_id="ask",
                scale=7,
                autofocus=True,
                submit_btn=True,
                stop_btn=True,
            ),
            editable=True,
            additional_inputs_accordion=gradio.Accordion(
                words("settings"), open=False, elem_id="settings", render=False
            ),
            additional_inputs=_settings(gradio, words, model),
            additional_outputs=[speed],
            concurrency_limit=None,
            api_visibility="private",
        )
        speed.render()
    return page


def _reason(error: Exception) -> str:
    """Says what the page shows of `error`."""
    return str(error if isinstance(error, (json.JSONDecodeError, ValidationError)) else as_request_error(error))


def _settings(gradio: Any, words: Any, model: ServedModel) -> list[Any]:
    """Makes the parts of the page for what `_request` takes after the history, in its order."""
    family = model.rules.family
    return [
        gradio.Textbox(label=words("system"), lines=2, elem_id="system", render=False),
        gradio.Slider(
            0,
            2,
            0 if model.options.greedy else family.temperature,
            step=0.05,
            label=words("temperature"),
            elem_id="temperature",
            render=False,
        ),
        gradio.Slider(0.05, 1, family.top_p, step=0.05, label=words("top_p"), elem_id="top_p", render=False),
        gradio.Slider(
            1,
            model.engine.prompt_and_answer,
            min(1024, model.engine.prompt_and_answer),
            step=1,
            label=words("max_tokens"),
            elem_id="max_tokens",
            render=False,
        ),
        gradio.Textbox(label=words("tools"), lines=3, elem_id="tools", render=False),
    ]


def _request(
    model: ServedModel,
    message: str,
    history: list[dict[str, Any]],
    system: str | None,
    temperature: float,
    top_p: float,
    max_tokens: int,
    tools: str | None,
) -> ChatCompletionRequest:
    messages = [{"role": "system", "content": system}] if (system or "").strip() else []
    for item in history:
        title = (item.get("metadata") or {}).get("title") or ""
        text = _text(item["content"])
        if title.startswith(_TOOL):
            call = {"name": title.removeprefix(_TOOL), "arguments": text.strip("`\n").removeprefix("json")}
            messages.append({"role": "assistant", "tool_calls": [{"type": "function", "function": call}]})
        else:
            messages.append({"role": item["role"], "content": text})
    return ChatCompletionRequest.model_validate(
        {
            "model": model.name,
            "messages": [*messages, {"role": "user", "content": message}],
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": None if max_tokens >= model.engine.prompt_and_answer else int(max_tokens),
            "tools": json.loads(tools) if (tools or "").strip() else None,
        }
    )


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)


class _Shown:
    """The messages of an answer on the page, and its speed."""

    def __init__(self, start: float):
        self._start, self._first, self._tokens = start, 0.0, 0
        self.messages: list[dict[str, Any]] = []

    def add(self, piece: Any) -> None:
        """Adds what the answer goes on with."""
        self._tokens += piece.tokens
        self._first = self._first or time.perf_counter()
        for event in piece.events:
            if isinstance(event, CallBegin):
                self.messages.append({"role": "assistant", "content": "", "metadata": {"title": _TOOL + event.name}})
            elif isinstance(event, CallArguments):
                arguments = self.messages[-1]["content"].removeprefix("```json\n").removesuffix("\n```")
                self.messages[-1]["content"] = f"```json\n{arguments}{event.text}\n```"
            elif isinstance(event, CallBroken):
                self.messages[-1] = {"role": "assistant", "content": event.source}
            elif isinstance(event, Text):
                if not self.messages or "metadata" in self.messages[-1]:
                    self.messages.append({"role": "assistant", "content": ""})
                self.messages[-1]["content"] += event.text

    def speed(self) -> str:
        """Says how fast, for example "24 tokens · first after 0.31 s · 18.2 tokens/s"."""
        text = f"{self._tokens} tokens · {self._first - self._start:.2f} s"
        if self._tokens > 1:
            text += f" · {(self._tokens - 1) / (time.perf_counter() - self._first):.1f} tokens/s"
        return text
