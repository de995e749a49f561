# SPDX-License-Identifier: Apache-2.0
"""Chat templates for tokenizer.json, whose text alone makes the prompt: for Jinja and for minja, GenAI's engine.

What this package's classes do in Python stands in the template here: tools, lists of text parts, the roles `tool` and
`function`. minja has no filter `replace`. Control tokens that tokenizer.json does not recognise in text bear `MARK`,
and messages lose it.
"""

from __future__ import annotations

from ..chat_templates import (
    CODEGEEX4_INTRODUCTION,
    CODEGEEX4_TOOLS,
    GLM4_CALL_FORMAT,
    GLM4_INTRODUCTION,
    GLM4_TOOLS,
    TEMPLATE_MARK,
)
from ..chatglm3 import INTRODUCTION_OF_TOOLS
from ..special_tokens import MARK


# `json`: indented; minja breaks lines in empty lists and objects, Jinja does not. `said`: the content of a message
# as one text; `role`: its role as ChatGLM calls it.
_MACROS = (
    TEMPLATE_MARK
    + """{%- macro said(message) -%}
{%- if message['content'] is string -%}
{{- message['content'].split('MARK')|join('') -}}
{%- elif message['content'] is iterable -%}
{%- for part in message['content'] -%}
{{- (part if part is string else part['text']).split('MARK')|join('') -}}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro json(value) -%}
{%- set dumped = namespace(text=value|tojson(indent=4), gap='\\n') -%}
{%- for depth in range(12) -%}
{%- set dumped.text = dumped.text.split('{' + dumped.gap + '    ' + dumped.gap + '}')|join('{}') -%}
{%- set dumped.text = dumped.text.split('[' + dumped.gap + '    ' + dumped.gap + ']')|join('[]') -%}
{%- set dumped.gap = dumped.gap + '    ' -%}
{%- endfor -%}
{{- dumped.text.split('MARK')|join('') -}}
{%- endmacro -%}
{%- macro role(message) -%}
{{- 'observation' if message['role'] in ['tool', 'function'] else message['role'] -}}
{%- endmacro -%}
"""
)
_ROUNDS = (
    _MACROS
    + """{%- set gap = GAP -%}
{%- set counter = namespace(round=FIRST, spoken=0) -%}
{%- for message in messages -%}
{%- if message['role'] != 'system' -%}{%- set counter.spoken = counter.spoken + 1 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}{{- raise_exception('NAME has no form for tools; use ChatGLM3 or GLM-4.') -}}{%- endif -%}
{{- 'BEFORE' -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- said(message) + gap -}}
{%- elif message['role'] == 'user' and BARE_ALLOWED and counter.spoken == 1 and loop.last -%}
{{- said(message) -}}
{%- elif message['role'] == 'user' -%}
{{- '[Round ' + counter.round|string + ']' + gap + '问：' + said(message) + gap -}}
{%- if loop.last and add_generation_prompt -%}{{- '答：' -}}{%- endif -%}
{%- set counter.round = counter.round + 1 -%}
{%- elif message['role'] == 'assistant' -%}
{{- '答：' + said(message) + ('' if loop.last else gap) -}}
{%- else -%}
{{- raise_exception('NAME has no role ' + message['role'] + '; use system, user and assistant.') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'AFTER' -}}{%- endif -%}"""
)
_CHATGLM = (
    _ROUNDS.replace("GAP", "'\\n'")
    .replace("FIRST", "0")
    .replace("BARE_ALLOWED", "true")
    .replace("NAME", "ChatGLM")
    .replace("BEFORE", "")
    .replace("AFTER", "MARK[gMASK]<sop>")
)
_CHATGLM2 = (
    _ROUNDS.replace("GAP", "'\\n\\n'")
    .replace("FIRST", "1")
    .replace("BARE_ALLOWED", "false")
    .replace("NAME", "ChatGLM2")
    .replace("BEFORE", "MARK[gMASK]MARKsop")
    .replace("AFTER", "")
)
_CHECKED_ROLE = """{%- if role(message) not in ['system', 'user', 'assistant', 'observation'] -%}
{{- raise_exception('NAME has no role ' + message['role'] + '; use system, user, assistant and observation.') -}}
{%- endif -%}
"""
# `argument_needle`: minja tries whether a template has calls with an argument of this name, and finds it in JSON or in
# a dictionary of Python alone. Without it, it would write calls, and the role `tool`, in a form of its own.
_CHATGLM3 = (
    _MACROS
    + """{%- macro python(value) -%}
{%- if value is string -%}
{{- ("'" + value + "'") if "'" not in value and '\\\\' not in value and '\\n' not in value else value|tojson -}}
{%- elif value is none -%}{{- 'None' -}}
{%- elif value is boolean -%}{{- 'True' if value else 'False' -}}
{%- else -%}{{- value|tojson -}}
{%- endif -%}
{%- endmacro -%}
{%- macro definitions(tools) -%}
{%- set bare = namespace(tools=[]) -%}
{%- for tool in tools -%}
{%- set bare.tools = bare.tools + [tool['function'] if tool['type'] == 'function' and 'function' in tool else tool] -%}
{%- endfor -%}
{{- '\\n' + json(bare.tools) -}}
{%- endmacro -%}
{{- 'MARK[gMASK]MARKsop' -}}
{%- if tools and (messages|length == 0 or messages[0]['role'] != 'system') -%}
{{- 'MARK<|system|>\\n INTRODUCTION' + definitions(tools) -}}
{%- endif -%}
{%- for message in messages -%}
"""
    + _CHECKED_ROLE.replace("NAME", "ChatGLM3")
    + """{%- set content = said(message) -%}
{%- set own = tools if tools and loop.first else message['tools'] -%}
{%- if message['role'] == 'system' and own -%}
{%- set content = content + definitions(own) -%}
{%- endif -%}
{%- if content or not message['tool_calls'] -%}
{{- 'MARK<|' + role(message) + '|>' + (message['metadata'] or '').split('MARK')|join('') + '\\n' -}}
{%- if content -%}{{- ' ' + content -}}{%- endif -%}
{%- endif -%}
{%- if message['tool_calls'] -%}
{%- for call in message['tool_calls'] -%}
{%- set function = call['function'] if 'function' in call else call -%}
{{- 'MARK<|assistant|>' + function['name'].split('MARK')|join('') + '\\n ```python\\ntool_call(' -}}
{%- for name, value in function['arguments'].items() -%}
{%- if function['name'] == 'ipython' and name == 'argument_needle' -%}{{- "'argument_needle':" -}}{%- endif -%}
{%- set written = python(value) -%}
{{- name + '=' + written.split('MARK')|join('') + ('' if loop.last else ', ') -}}
{%- endfor -%}
{{- ')\\n```' -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'MARK<|assistant|>' -}}{%- endif -%}"""
).replace("INTRODUCTION", INTRODUCTION_OF_TOOLS)
_GLM4 = (
    _MACROS
    + """{%- set built_in = BUILT_IN_TOOLS -%}
{%- macro definitions(tools) -%}
{{- '<|system|>\\nINTRODUCTION' -}}
{%- for tool in tools -%}
{%- if tool['type'] == 'function' or 'type' not in tool -%}
{%- set function = tool['function'] if tool['type'] == 'function' else tool -%}
{{- '\\n## ' + function['name'] + '\\n\\n' + json(function) + 'CALL_FORMAT' -}}
{%- elif tool['type'] in built_in -%}
{{- '\\n## ' + tool['type'] + '\\n\\n' + built_in[tool['type']] -}}
{%- else -%}
{{- raise_exception('GLM-4 has no tool of type ' + tool['type'] + '.') -}}
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{{- '[gMASK]<sop>' -}}
{%- if tools and (messages|length == 0 or messages[0]['role'] != 'system') -%}{{- definitions(tools) -}}{%- endif -%}
{%- for message in messages -%}
"""
    + _CHECKED_ROLE.replace("NAME", "GLM-4")
    + """{%- set own = tools if tools and loop.first and message['role'] == 'system' else message['tools'] -%}
{%- if own -%}{{- definitions(own) -}}{%- endif -%}
{%- set content = said(message) -%}
{%- if content -%}
{{- '<|' + role(message) + '|>' + (message['metadata'] or '') + '\\n' + content -}}
{%- endif -%}
{%- if message['tool_calls'] -%}
{%- for call in message['tool_calls'] -%}
{%- set function = call['function'] if 'function' in call else call -%}
{%- set arguments = function['arguments'] -%}
{{- '<|assistant|>' + function['name'] + '\\n' + (arguments if arguments is string else arguments|tojson) -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
)
_GLM4 = (
    _GLM4.replace("INTRODUCTION", GLM4_INTRODUCTION)
    .replace("CALL_FORMAT", GLM4_CALL_FORMAT)
    .replace("BUILT_IN_TOOLS", "{" + ", ".join(f"'{name}': '{text}'" for name, text in GLM4_TOOLS.items()) + "}")
)
_CODEGEEX4 = (
    _MACROS
    + """{%- macro definitions(tools) -%}
{{- 'TOOLS' -}}
{%- for tool in tools -%}
{%- set function = tool['function'] if tool['function'] is mapping else tool -%}
{{- '\\n## Function ' + loop.index|string + '\\n\\n### Name\\n' + function['name'] + '\\n' -}}
{{- '\\n### Description\\n' + function['description']|default('') + '\\n' -}}
{{- '\\n### Parameters\\n```json\\n' + function['parameters']|default({})|tojson + '\\n```\\n' -}}
{%- endfor -%}
{%- endmacro -%}
{{- '[gMASK]<sop>' -}}
{%- if tools and (messages|length == 0 or messages[0]['role'] != 'system') -%}
{{- '<|system|>\\nINTRODUCTION' + definitions(tools) -}}
{%- endif -%}
{%- for message in messages -%}
"""
    + _CHECKED_ROLE.replace("NAME", "CodeGeeX4")
    + """{%- set own = tools if tools and loop.first and message['role'] == 'system' else message['tools'] -%}
{%- set content = said(message) -%}
{%- if content or own -%}
{{- '<|' + role(message) + '|>' + (message['metadata'] or '') + '\\n' + content -}}
{%- endif -%}
{%- if own -%}{{- definitions(own) -}}{%- endif -%}
{%- if message['tool_calls'] -%}
{{- '<|assistant|>\\n' -}}
{%- for call in message['tool_calls'] -%}
{%- set function = call['function'] if 'function' in call else call -%}
{%- set arguments = function['arguments'] -%}
{{- '```json\\n{"name": ' + function['name']|tojson + ', "arguments": ' -}}
{{- (arguments if arguments is string else arguments|tojson) + '}\\n```' + ('' if loop.last else '\\n') -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
)
_CODEGEEX4 = _CODEGEEX4.replace("INTRODUCTION", CODEGEEX4_INTRODUCTION).replace("TOOLS", CODEGEEX4_TOOLS)

TEMPLATES = {
    generation: template.replace("MARK", MARK)
    for generation, template in (
        ("chatglm", _CHATGLM),
        ("chatglm2", _CHATGLM2),
        ("chatglm3", _CHATGLM3),
        ("glm4", _GLM4),
        ("codegeex4", _CODEGEEX4),
    )
}
"""By generation; the first line is that of this package's templates."""
