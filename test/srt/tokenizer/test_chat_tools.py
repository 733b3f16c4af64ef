"""Tools and calls through chat templates that use them as the public ones do, to real tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.entrypoints.openai.chat_messages import template_messages
from sglang.srt.tokenizer.loader import load_tokenizer
from srt.tokenizer.vocabularies import demo_gguf, write_gguf

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "f", "description": "Fünf", "parameters": {}}}
]
MESSAGES: list[Any] = [
    {"role": "user", "content": "Q"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "f", "arguments": '{"x": "é", "n": [1]}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "R"},
]

# As Qwen's: whole tools as JSON, arguments as JSON, results as the user's.
QWEN_LIKE = """\
{%- if tools %}{{- '<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>' }}{%- endif %}
{%- for message in messages %}
{%- if message.tool_calls %}
{%- for tool_call in message.tool_calls %}
{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- '<tool_call>{"name": "' + tool_call.name + '", "arguments": ' }}
{{- tool_call.arguments | tojson }}{{- '}</tool_call>' }}
{%- endfor %}
{%- elif message.role == 'tool' %}{{- '<tool_response>' + message.content + '</tool_response>' }}
{%- else %}{{- message.role + ':' + message.content }}{%- endif %}
{%- endfor %}"""

# As Qwen3-Coder's: arguments one by one.
CODER_LIKE = """\
{%- for tool in tools %}{{- tool.function.name }}{%- endfor %}
{%- for message in messages if message.tool_calls %}
{%- for name, value in message.tool_calls[0].function.arguments | items %}
{{- '<parameter=' + name + '>' }}
{{- value if value is string else value | tojson }}{{- '</parameter>' }}
{%- endfor %}
{%- endfor %}"""

# As Llama 3's: functions alone, one call a message.
LLAMA_LIKE = """\
{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}
{%- for message in messages if 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{- raise_exception('one call') }}{%- endif %}
{%- set tool_call = message.tool_calls[0].function %}
{{- '{"name": "' + tool_call.name + '", "parameters": ' }}
{{- tool_call.arguments | tojson }}{{- '}' }}
{%- endfor %}"""


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            QWEN_LIKE,
            "<tools>\n" + json.dumps(TOOLS[0], ensure_ascii=False) + "\n</tools>user:Q"
            '<tool_call>{"name": "f", "arguments": {"x": "é", "n": [1]}}</tool_call>'
            "<tool_response>R</tool_response>",
        ),
        (CODER_LIKE, "f<parameter=x>é</parameter><parameter=n>[1]</parameter>"),
        (
            LLAMA_LIKE,
            json.dumps(TOOLS[0], ensure_ascii=False, indent=4)
            + '{"name": "f", "parameters": {"x": "é", "n": [1]}}',
        ),
    ],
)
def test_templates_get_what_they_expect(tmp_path: Path, template: str, expected: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", "bpe", chat_template=template)
    tokenizer = load_tokenizer(str(path))
    messages = template_messages(MESSAGES)
    assert tokenizer.apply_chat_template(messages, tools=TOOLS) == expected


def test_the_demo_models_template_has_no_place_for_tools() -> None:
    tokenizer = load_tokenizer(str(demo_gguf()))
    messages = template_messages(MESSAGES[:1])
    with_tools = tokenizer.apply_chat_template(messages, tools=TOOLS)
    assert with_tools == tokenizer.apply_chat_template(messages)
