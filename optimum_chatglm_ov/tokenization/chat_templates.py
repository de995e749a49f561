# SPDX-License-Identifier: Apache-2.0
"""Chat templates for checkpoints that bring none.

The first line of each template is a mark by which a saved template is recognised as ours when it is loaded again.
"""

from __future__ import annotations

from typing import Any


TEMPLATE_MARK = "{#- optimum_chatglm_ov -#}\n"

# ChatGLM and ChatGLM2 know rounds of a question and an answer, in plain text. `first`: number of the first round;
# `gap`: what separates the lines; ChatGLM leaves everything but the question out when there is only one.
_ROUNDS = (
    TEMPLATE_MARK
    + """{%- set gap = GAP -%}
{%- set counter = namespace(round=FIRST, spoken=0) -%}
{%- for message in messages if message['role'] != 'system' -%}
{%- set counter.spoken = counter.spoken + 1 -%}
{%- endfor -%}
{%- set bare = BARE_ALLOWED and counter.spoken == 1 and messages[-1]['role'] == 'user' -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] + gap -}}
{%- elif message['role'] == 'user' and bare -%}
{{- message['content'] -}}
{%- elif message['role'] == 'user' -%}
{{- '[Round ' + counter.round|string + ']' + gap + '问：' + message['content'] + gap -}}
{%- if loop.last and add_generation_prompt -%}{{- '答：' -}}{%- endif -%}
{%- set counter.round = counter.round + 1 -%}
{%- elif message['role'] == 'assistant' -%}
{{- '答：' + message['content'] + ('' if loop.last else gap) -}}
{%- else -%}
{{- raise_exception('NAME has no role ' + message['role'] + '; use system, user and assistant.') -}}
{%- endif -%}
{%- endfor -%}"""
)

CHATGLM_TEMPLATE = (
    _ROUNDS.replace("GAP", "'\\n'").replace("FIRST", "0").replace("BARE_ALLOWED", "true").replace("NAME", "ChatGLM")
)
CHATGLM2_TEMPLATE = (
    _ROUNDS.replace("GAP", "'\\n\\n'")
    .replace("FIRST", "1")
    .replace("BARE_ALLOWED", "false")
    .replace("NAME", "ChatGLM2")
)

# The blank after each line break is the `▁` with which every encoded part of a ChatGLM3 message begins.
CHATGLM3_TEMPLATE = (
    TEMPLATE_MARK
    + """{{- '[gMASK]sop' -}}
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' + (message['metadata'] or '') + '\\n ' + message['content'] -}}
{%- if message['tools'] is defined -%}
{{- '\\n' + message['tools']|tojson(indent=4) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
)

# What GLM-4 was trained to read when it may call tools.
GLM4_INTRODUCTION = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\\n\\n# 可用工具"
)
GLM4_CALL_FORMAT = "\\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
GLM4_TOOLS = {
    "python": (
        "当你向 `python` 发送包含 Python 代码的消息时，该代码将会在一个有状态的 Jupyter notebook 环境中执行。\\n"
        "`python` 返回代码执行的输出，或在执行 60 秒后返回超时。\\n"
        "`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。"
        "不要使用 `python` 进行任何网络请求或者在线 API 调用，这些在线内容的访问将不会成功。"
    ),
    "simple_browser": (
        "你可以使用 `simple_browser` 工具。该工具支持以下函数：\\n"
        "`search(query: str, recency_days: int)`：使用搜索引擎进行查询并显示结果，"
        "可以使用 `recency_days` 参数控制搜索内容的时效性。\\n"
        "`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。每次调用时，须选择3-10个页面。"
        "选择多个角度的页面，同时尽可能选择可信任的信息来源。"
        "考虑到部分页面是无法加载的，你也可以多打开一些可能有用的页面而不用担心内容过多。\\n"
        "`open_url(url: str)`：打开指定的 URL。\\n\\n使用 `【{引用 id}†{引用文本}】` 来引用内容。\\n\\n"
        "操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用 `mclick` 来获取指定 ID 页面的内容; "
        "3. 根据获得的内容进行回复。在回复中应当引用信息来源。\\n "
        "如果用户提供了 URL，也可以用 `open_url` 直接打开页面。\\n"
        "如果初次搜索结果没有找到合适的信息，也可以再次使用 `search` 进行搜索。"
    ),
    "cogview": (
        "如果用户的请求中包含了对图像的描述，你可以使用 `cogview` 来生成图像并展示给用户。"
        "你需要向 `cogview` 发送图像描述，规则：\\n"
        "- 发送给 `cogview` 的消息必须使用英语。用户的中文描述必须完全翻译为英语。\\n"
        "- 应当尽可能详细地描述图像生成的需求，需求描述约 100 英文单词。\\n"
        "- 保持用户原始描述的意图。不要虚构内容或者没见过的人物。\\n"
        "- 如无特殊说明，所在地为中国，持有中国立场并遵循中国社会主义价值观。"
    ),
}
GLM4_TEMPLATE = TEMPLATE_MARK + (
    """{%- set built_in = BUILT_IN_TOOLS -%}
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{%- if message['tools'] is defined -%}
{{- '<|system|>\\nINTRODUCTION' -}}
{%- for tool in message['tools'] -%}
{%- if tool['type'] == 'function' -%}
{{- '\\n## ' + tool['function']['name'] + '\\n\\n' + tool['function']|tojson(indent=4) + 'CALL_FORMAT' -}}
{%- elif tool['type'] in built_in -%}
{{- '\\n## ' + tool['type'] + '\\n\\n' + built_in[tool['type']] -}}
{%- else -%}
{{- raise_exception('GLM-4 has no tool of type ' + tool['type'] + '; use function, ' + built_in|join(', ') + '.') -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['content'] -%}
{{- '<|' + message['role'] + '|>' + (message['metadata'] or '') + '\\n' + message['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}""".replace("INTRODUCTION", GLM4_INTRODUCTION)
    .replace("CALL_FORMAT", GLM4_CALL_FORMAT)
    .replace("BUILT_IN_TOOLS", "{" + ", ".join(f"'{name}': '{text}'" for name, text in GLM4_TOOLS.items()) + "}")
)


# How CodeGeeX4 introduces itself; the prose between the headings of its tools says what its authors' says.
CODEGEEX4_TOOLS = (
    "\\n\\n# Note\\n"
    "- 下面列出可以调用的函数工具：名字、用途和参数。\\n"
    "- 请根据用户的指令选择最合适的函数，并给出调用时的参数。\\n"
    "- 每次调用写成一个 json 代码块，其中包含函数名 name 和参数字典 arguments。\\n"
    "- 需要调用函数时只输出调用，不要解释，也不要直接回答；函数工具不足以完成任务时，请告知用户并说明原因。\\n\\n"
    "# Functions\\n以下是可以调用的函数。\\n"
)
CODEGEEX4_INTRODUCTION = (
    "你是一位智能编程助手，你叫CodeGeeX。你会为用户回答关于编程、代码、计算机方面的任何问题，"
    "并提供格式规范、可以执行、准确安全的代码，并在必要时提供详细的解释。"
)
CODEGEEX4_TEMPLATE = (
    TEMPLATE_MARK
    + """{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}
{%- if message['content'] or message['tools'] -%}
{{- '<|' + message['role'] + '|>' + (message['metadata'] or '') + '\\n' + message['content'] -}}
{%- endif -%}
{%- if message['tools'] -%}
{{- 'TOOLS' -}}
{%- for tool in message['tools'] -%}
{%- set function = tool['function'] if tool['function'] is mapping else tool -%}
{{- '\\n## Function ' + loop.index|string + '\\n\\n### Name\\n' + function['name'] + '\\n' -}}
{{- '\\n### Description\\n' + function['description']|default('') + '\\n' -}}
{{- '\\n### Parameters\\n```json\\n' + function['parameters']|default({})|tojson + '\\n```\\n' -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}""".replace("TOOLS", CODEGEEX4_TOOLS)
)


def is_own_template(chat_template: Any) -> bool:
    """Tells whether a chat template is one of this module's, of this or another version of the package."""
    return isinstance(chat_template, str) and chat_template.startswith(TEMPLATE_MARK.strip())
