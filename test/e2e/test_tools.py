"""The demo model calls a function: it is shown how, and follows, through a real server."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from e2e.server_process import running_server

# The demo model's own template has no place for tools.
TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\nCall a function like <tool_call>{"name": "get_weather",' }}
{{- ' "arguments": {"city": "Rome"}}</tool_call>. Functions:\\n' + tools | tojson }}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def asked(city: str) -> dict[str, Any]:
    return {"role": "user", "content": f"Weather in {city}?"}


def called(city: str) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": json.dumps({"city": city})}
    call = {"id": f"call_{city}", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


CHAT: list[Any] = [
    *(say(city) for city in ("Rome", "Oslo", "Madrid") for say in (asked, called)),
    asked("Paris"),
]


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    flags = ("--dtype", "float32", "--tool-call-parser", "auto", "--chat-template", TEMPLATE)
    with (
        running_server(*flags) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as made,
    ):
        yield made


def test_the_model_calls_a_function(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="default", messages=CHAT, tools=TOOLS, temperature=0, max_tokens=64
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def in_pieces(ask: Callable[[], tuple[list[str], str]]) -> str:
    """What was said whole, when it came in more than three pieces that are the same.

    Tokens that nobody has fetched yet come together, and on a machine that does much else these may
    be all of them: then it is asked again.
    """
    for _ in range(10):
        pieces, whole = ask()
        assert "".join(pieces) == whole
        if len(pieces) > 3:
            return whole
    raise AssertionError(f"always in {len(pieces)} pieces")


def test_the_call_comes_in_pieces(client: openai.OpenAI) -> None:
    def ask() -> tuple[list[str], str]:
        with client.chat.completions.stream(
            model="default", messages=CHAT, tools=TOOLS, temperature=0, max_tokens=64
        ) as stream:
            pieces = [e.arguments_delta for e in stream if e.type.endswith("arguments.delta")]
            (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
        return pieces, call.function.arguments

    assert json.loads(in_pieces(ask)) == {"city": "Paris"}


def test_a_response_calls_a_function_and_goes_on(client: openai.OpenAI) -> None:
    """By way of /v1/responses: the same call, whole and streamed, then its output."""
    items: list[Any] = []
    for city in ("Rome", "Oslo", "Madrid"):
        arguments = json.dumps({"city": city})
        call = {"type": "function_call", "call_id": f"call_{city}", "name": "get_weather"}
        items += [asked(city), {**call, "arguments": arguments}]
    tools: list[Any] = [{"type": "function", **TOOLS[0]["function"]}]
    given: dict[str, Any] = {"tools": tools, "temperature": 0, "max_output_tokens": 64}
    reply = client.responses.create(model="default", input=[*items, asked("Paris")], **given)
    (call,) = reply.output
    assert call.type == "function_call"
    assert json.loads(call.arguments) == {"city": "Paris"}

    def ask() -> tuple[list[str], str]:
        with client.responses.stream(
            model="default", input=[*items, asked("Paris")], **given
        ) as events:
            pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
            streamed = events.get_final_response()
        assert streamed.usage is not None
        assert reply.usage is not None
        assert streamed.usage.output_tokens == reply.usage.output_tokens
        return pieces, call.arguments

    in_pieces(ask)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "It is sunny."}
    more = client.responses.create(
        model="default",
        previous_response_id=reply.id,
        input=[output],  # type: ignore[list-item]
        **{**given, "max_output_tokens": 8},
    )
    assert more.usage is not None
    assert more.usage.input_tokens > reply.usage.total_tokens
    assert more.usage.input_tokens_details.cached_tokens > 0
    assert client.responses.retrieve(more.id).output == more.output


def test_a_message_calls_a_function_and_goes_on(client: openai.OpenAI) -> None:
    """By way of /v1/messages: the same call, whole and streamed, then its result."""
    url = str(client.base_url).removesuffix("/v1/")
    function = TOOLS[0]["function"]
    tool = {"name": function["name"], "input_schema": function["parameters"]}
    messages: list[Any] = []
    for city in ("Rome", "Oslo", "Madrid"):
        use = {"type": "tool_use", "id": city, "name": "get_weather", "input": {"city": city}}
        messages += [asked(city), {"role": "assistant", "content": [use]}]
    tool["description"] = function["description"]
    fields = {"max_tokens": 64, "temperature": 0, "tools": [tool]}
    body = {**fields, "messages": [*messages, asked("Paris")]}
    reply = httpx.post(f"{url}/v1/messages", json=body, timeout=120).json()
    (block,) = reply["content"]
    assert (block["name"], block["input"]) == ("get_weather", {"city": "Paris"})
    assert reply["stop_reason"] == "tool_use"
    counted = httpx.post(
        f"{url}/v1/messages/count_tokens", json={k: body[k] for k in ("messages", "tools")}
    ).json()
    usage = reply["usage"]
    total = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted == {"input_tokens": total}
    text = httpx.post(f"{url}/v1/messages", json={**body, "stream": True}, timeout=120).text
    events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
    pieces = [e["delta"]["partial_json"] for e in events if e["type"] == "content_block_delta"]
    assert json.loads("".join(pieces)) == {"city": "Paris"}
    assert events[-2]["usage"]["output_tokens"] == usage["output_tokens"]
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "It is sunny."}
    said = [{"role": "assistant", "content": [block]}, {"role": "user", "content": [result]}]
    more = {**fields, "max_tokens": 8, "messages": [*body["messages"], *said]}
    usage = httpx.post(f"{url}/v1/messages", json=more, timeout=120).json()["usage"]
    assert usage["cache_read_input_tokens"] > 0
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] > total


def test_ollamas_chat_calls_a_function(client: openai.OpenAI) -> None:
    """By way of /api/chat: the same call, whole and streamed."""
    url = str(client.base_url).removesuffix("/v1/") + "/api/chat"
    messages: list[Any] = []
    for city in ("Rome", "Oslo", "Madrid"):
        call = {"function": {"name": "get_weather", "arguments": {"city": city}}}
        messages += [asked(city), {"role": "assistant", "content": "", "tool_calls": [call]}]
    options = {"temperature": 0, "num_predict": 64}
    body = {"model": "m", "messages": [*messages, asked("Paris")], "tools": TOOLS}
    body["options"] = options
    whole = httpx.post(url, json={**body, "stream": False}, timeout=120).json()
    lines = [json.loads(line) for line in httpx.post(url, json=body, timeout=120).iter_lines()]
    for line in (whole, lines[0]):
        (call,) = line["message"]["tool_calls"]
        assert call["function"] == {"name": "get_weather", "arguments": {"city": "Paris"}}
    for name in ("done_reason", "prompt_eval_count", "eval_count"):
        assert whole[name] == lines[-1][name]
    assert whole["done_reason"] == "stop"
    assert whole["total_duration"] > whole["eval_duration"] > 0


def test_an_answer_can_be_forced_to_be_a_call(client: openai.OpenAI) -> None:
    """Without a conversation to follow, the model would talk."""
    reply = client.chat.completions.create(
        model="default",
        messages=[asked("Paris")],
        tools=TOOLS,
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
        max_tokens=200,
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_weather"
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() <= {"city"}
    assert all(isinstance(value, str) for value in arguments.values())


def test_a_strict_function_gets_only_what_its_schema_allows(client: openai.OpenAI) -> None:
    """Paris is asked for, as above; the schema knows two other cities."""
    function = {
        **TOOLS[0]["function"],
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Lima", "Cairo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
    tools: list[Any] = [{"type": "function", "function": function}]
    reply = client.chat.completions.create(
        model="default", messages=CHAT, tools=tools, temperature=0, max_tokens=64
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] in ("Lima", "Cairo")


def test_a_structural_tag_through_the_client(client: openai.OpenAI) -> None:
    number = {"type": "integer", "minimum": 10, "maximum": 12}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"]}
    tag = {
        "type": "structural_tag",
        "format": {
            "type": "sequence",
            "elements": [
                {"type": "const_string", "value": "<r>"},
                {"type": "json_schema", "json_schema": {**schema, "additionalProperties": False}},
                {"type": "regex", "pattern": "</r>( |!)"},
            ],
        },
    }
    reply = client.chat.completions.create(
        model="default",
        messages=[asked("Paris")],
        response_format=tag,  # type: ignore[arg-type]
        temperature=1.0,
        seed=3,
        max_tokens=200,
    )
    text = reply.choices[0].message.content or ""
    assert text.startswith("<r>{")
    assert text[-5:] in ("</r> ", "</r>!")
    assert json.loads(text[3:-5])["n"] in (10, 11, 12)
