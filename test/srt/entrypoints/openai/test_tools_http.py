"""Tool calls through the openai package and raw HTTP, with answers that the fake model is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from sglang.srt.entrypoints.openai.tool_fields import forced_schema
from sglang.srt.sampling.sampling_params import ReasoningFirst
from srt.constrained.grammar_cases import can_write, compiled, golden_tokenizer, vocabulary_of
from srt.entrypoints.fake_service import LiveServer

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "get_time"}},
]
ASK: list[Any] = [{"role": "user", "content": "Weather?"}]
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("tools")
    with LiveServer(directory, tool_call_parser="hermes", reasoning_parser="qwen3") as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as one:
        yield one


def chat(server: LiveServer, **fields: Any) -> Any:
    return server.post("/v1/chat/completions", {"model": "m", "messages": ASK, **fields})


def stream(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    """The choices of all chunks."""
    body = {"model": "m", "messages": ASK, **fields}
    events = server.events("/v1/chat/completions", body)
    return [choice for event in events for choice in event["choices"]]


def test_a_call_through_the_client(client: openai.OpenAI, server: LiveServer) -> None:
    server.service.answer = WEATHER
    reply = client.chat.completions.create(model="d", messages=ASK, tools=TOOLS)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert server.service.templates[0][1]["tools"] == TOOLS


def test_the_reply_has_exactly_the_shape(server: LiveServer) -> None:
    server.service.answer = f"I look.\n{TIME}\n{WEATHER}"
    (choice,) = chat(server, tools=TOOLS).json()["choices"]
    ids = [call.pop("id") for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 2
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "get_time", "arguments": "{}"}},
                {
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                },
            ],
        },
        "logprobs": None,
        "finish_reason": "tool_calls",
        "matched_stop": 2,
    }


def test_a_stream_through_the_client(client: openai.OpenAI, server: LiveServer) -> None:
    server.service.answer = f"I look.\n{WEATHER}\n{TIME}"
    chunks = list(
        client.chat.completions.create(model="d", messages=ASK, tools=TOOLS, stream=True, n=2)
    )
    for index in (0, 1):
        choices = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert choices[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in choices) == "I look."
        calls: dict[int, list[Any]] = {}
        for call in (call for c in choices for call in c.delta.tool_calls or []):
            calls.setdefault(call.index, []).append(call)
        names = [first.function.name for first, *_ in calls.values()]
        assert names == ["get_weather", "get_time"]
        assert all(first.id and first.type == "function" for first, *_ in calls.values())
        assert all(more.id is None for _, *others in calls.values() for more in others)
        pieces = [one.function.arguments for one in calls[0]]
        assert json.loads("".join(pieces)) == {"city": "Paris"}
        assert len(pieces) > 5  # as they come
        assert [c.finish_reason for c in choices if c.finish_reason] == ["tool_calls"]


def test_the_packages_own_accumulator_reads_the_stream(
    client: openai.OpenAI, server: LiveServer
) -> None:
    server.service.answer = f"<think>\nHm.\n</think>\n\n{WEATHER}"
    with client.chat.completions.stream(model="d", messages=ASK, tools=TOOLS) as events:
        final = events.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
    assert final.choices[0].finish_reason == "tool_calls"


def test_a_stream_says_the_same_as_the_whole_reply(server: LiveServer) -> None:
    server.service.answer = f"<think>\nSo.\n</think>\n\nI look.\n{WEATHER}\n\nDone."
    (whole,) = chat(server, tools=TOOLS).json()["choices"]
    deltas = [choice["delta"] for choice in stream(server, tools=TOOLS)]
    message = whole["message"]
    for field in ("content", "reasoning_content"):
        assert "".join(delta.get(field) or "" for delta in deltas) == message[field]
    arguments = "".join(
        call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", [])
    )
    assert arguments == message["tool_calls"][0]["function"]["arguments"]
    assert (message["content"], message["reasoning_content"]) == ("I look.\n\nDone.", "So.")


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
def test_without_tools_the_text_is_the_content(server: LiveServer, fields: Any) -> None:
    server.service.answer = WEATHER
    (choice,) = chat(server, **fields).json()["choices"]
    assert choice["message"]["content"] == WEATHER
    assert choice["message"]["tool_calls"] is None
    assert choice["finish_reason"] == "stop"
    assert "tools" not in server.service.templates[0][1]


def test_one_call_when_calls_may_not_be_parallel(server: LiveServer) -> None:
    server.service.answer = f"{WEATHER}\n{TIME}"
    (choice,) = chat(server, tools=TOOLS, parallel_tool_calls=False).json()["choices"]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["message"]["content"] == TIME


def test_a_broken_call_is_content(server: LiveServer) -> None:
    server.service.answer = text = WEATHER.replace('"Paris"', "Paris")
    (choice,) = chat(server, tools=TOOLS).json()["choices"]
    assert choice["message"]["content"] == text
    assert (choice["message"]["tool_calls"], choice["finish_reason"]) == (None, "stop")
    last = stream(server, tools=TOOLS)[-1]
    assert last["finish_reason"] == "stop"


def test_a_call_that_is_cut_off_ends_with_length(server: LiveServer) -> None:
    server.service.answer = WEATHER
    size = WEATHER.index("Paris")
    (choice,) = chat(server, tools=TOOLS, max_tokens=size).json()["choices"]
    assert choice["message"]["content"] == WEATHER[:size]
    assert (choice["message"]["tool_calls"], choice["finish_reason"]) == (None, "length")
    chunks = stream(server, tools=TOOLS, max_tokens=size)
    assert chunks[-1]["finish_reason"] == "length"
    assert chunks[1]["delta"]["tool_calls"][0]["function"]["name"] == "get_weather"


def test_every_token_keeps_its_log_probability(server: LiveServer) -> None:
    server.service.answer = f"I look.\n{WEATHER}\n"
    chunks = stream(server, tools=TOOLS, logprobs=True)
    shown = [c["logprobs"]["content"] for c in chunks if c["logprobs"] is not None]
    assert "".join(one["token"] for part in shown for one in part) == server.service.answer
    (whole,) = chat(server, tools=TOOLS, logprobs=True).json()["choices"]
    assert [one["token"] for one in whole["logprobs"]["content"]] == list(server.service.answer)


def test_a_conversation_with_calls_reaches_the_template(server: LiveServer) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    messages = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call],
            "reasoning_content": "Look it up.",
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
    ]
    assert chat(server, messages=messages, tools=TOOLS).status_code == 200
    _, seen, result = server.service.templates[0][0]
    assert seen["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert seen["reasoning_content"] == seen["thinking"] == "Look it up."
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name"),
        ({"tools": [{"function": {"name": "f", "parameters": []}}]}, "function.parameters"),
        ({"tools": {}}, "tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "'f' is not among the tools",
        ),
        ({"tool_choice": "required"}, "there are no tools"),
        (
            {"tools": TOOLS, "tool_choice": "required", "regex": "a"},
            "'tool_choice': regex is given as well",
        ),
    ],
)
def test_bad_fields_are_named(server: LiveServer, fields: dict[str, Any], named: str) -> None:
    reply = chat(server, **fields)
    assert reply.status_code == 400
    assert named in reply.json()["message"]


def test_model_info_names_the_parsers(server: LiveServer) -> None:
    info = server.request("GET", "/model_info").json()
    assert (info["tool_call_parser"], info["reasoning_parser"]) == ("hermes", "qwen3")


def test_without_a_parser_the_template_has_the_tools_and_the_text_comes_back(
    tmp_path: Any,
) -> None:
    with LiveServer(tmp_path) as plain:
        plain.service.answer = WEATHER
        (choice,) = chat(plain, tools=TOOLS).json()["choices"]
        assert choice["message"]["content"] == WEATHER
        assert choice["message"]["tool_calls"] is None
        assert plain.service.templates[0][1]["tools"] == TOOLS


def test_special_tokens_that_the_format_needs_are_asked_for(tmp_path: Any) -> None:
    with LiveServer(tmp_path, tool_call_parser="mistral") as mistral:
        mistral.service.answer = "[TOOL_CALLS]get_time[ARGS]{}"
        (choice,) = chat(mistral, tools=TOOLS).json()["choices"]
        assert len(choice["message"]["tool_calls"][0]["id"]) == 9
        chat(mistral)
        kept = [request.kept_special_tokens for request in mistral.service.requests]
        assert kept == [("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), ()]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def test_a_forced_answer_is_held_to_be_calls(tmp_path: Any) -> None:
    """Without a parser, too: what a forced call looks like is not the model's to say."""
    with LiveServer(tmp_path) as plain:
        plain.service.answer = '[{"name": "get_time", "parameters": {}}]'
        (choice,) = chat(plain, tools=TOOLS, tool_choice="required").json()["choices"]
        body = {"tools": TOOLS, "tool_choice": named("get_time"), "parallel_tool_calls": True}
        deltas = [one["delta"] for one in stream(plain, **body)]
        schemas = [json.loads(r.sampling_params.json_schema) for r in plain.service.requests]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_time", "arguments": "{}"}
    assert choice["message"]["content"] is None
    assert choice["message"]["reasoning_content"] is None
    assert choice["finish_reason"] == "tool_calls"
    (start,) = (d["tool_calls"][0] for d in deltas if "id" in d.get("tool_calls", [{}])[0])
    assert start["function"]["name"] == "get_time"
    of_any, of_one = (schema["items"]["anyOf"] for schema in schemas)
    assert [one["properties"]["name"]["const"] for one in of_any] == ["get_weather", "get_time"]
    assert of_any[0]["properties"]["parameters"] == {"$ref": "#/$defs/0"}
    assert schemas[0]["$defs"]["0"] == TOOLS[0]["function"]["parameters"]
    assert [one["properties"]["name"]["const"] for one in of_one] == ["get_time"]
    assert ("maxItems" in schemas[0], schemas[1]["maxItems"]) == (False, 1)


@pytest.mark.parametrize("parser", ["deepseek-r1", "qwen3"])
def test_reasoning_comes_before_a_forced_call(tmp_path: Any, parser: str) -> None:
    calls = '[{"name": "get_time", "parameters": {}}]'
    begin = "<think>" if parser == "qwen3" else ""
    body = {"tools": TOOLS, "tool_choice": "required"}
    with LiveServer(tmp_path, reasoning_parser=parser) as thinking:
        thinking.service.answer = f"{begin}Which? [1]\n</think>{calls}"
        (choice,) = chat(thinking, **body).json()["choices"]
        deltas = [one["delta"] for one in stream(thinking, **body)]
        as_written = chat(thinking, **body, separate_reasoning=False).json()["choices"][0]
        requests = list(thinking.service.requests)
    for request in requests:
        assert request.sampling_params.reasoning == ReasoningFirst(
            "<think>", "</think>", inside=parser == "deepseek-r1"
        )
        assert request.kept_special_tokens == ("<think>", "</think>")
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("Which? [1]", None)
    assert message["tool_calls"][0]["function"]["name"] == "get_time"
    assert choice["finish_reason"] == "tool_calls"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Which? [1]"
    assert next(d["tool_calls"][0]["index"] for d in deltas if "tool_calls" in d) == 0
    assert as_written["message"]["content"] == f"{begin}Which? [1]\n</think>"
    assert as_written["message"]["tool_calls"][0]["function"]["name"] == "get_time"


def test_reasoning_comes_before_a_held_text(tmp_path: Any) -> None:
    """White space behind the marker is the text's, and the prompt may say that there is none."""
    body = {"regex": " [0-9]+"}
    with LiveServer(tmp_path, reasoning_parser="qwen3") as thinking:
        for thought in ("<think>Hm.</think>", ""):
            thinking.service.answer = thought + " 42"
            (choice,) = chat(thinking, **body).json()["choices"]
            assert choice["message"]["content"] == " 42"
            assert choice["message"]["reasoning_content"] == ("Hm." if thought else None)
        reply = chat(thinking, **body, separate_reasoning=False).json()
        assert reply["choices"][0]["message"]["content"] == " 42"
        thinking.service.answer = "<think>Hm.</think> 42"
        reply = chat(thinking, **body, separate_reasoning=False).json()
        assert reply["choices"][0]["message"]["content"] == "<think>Hm.</think> 42"
        assert reply["usage"]["reasoning_tokens"] == len("<think>Hm.</think>")
        chat(thinking)
        last = {"role": "assistant", "content": "<think>x</think>"}
        goes_on = [{"role": "user", "content": "?"}, last]
        chat(thinking, **body, messages=goes_on, continue_final_message=True)
        reasoning = [r.sampling_params.reasoning for r in thinking.service.requests]
    assert [one is None for one in reasoning] == [False] * 4 + [True] * 2


def test_gpt_oss_is_held_from_the_first_character(tmp_path: Any) -> None:
    with LiveServer(tmp_path, reasoning_parser="gpt-oss") as channels:
        channels.service.answer = "{}"
        fields = {"response_format": {"type": "json_object"}}
        (choice,) = chat(channels, **fields).json()["choices"]
        assert choice["message"]["content"] == "{}"
        assert channels.service.requests[-1].sampling_params.reasoning is None


def test_an_answer_held_to_a_schema_is_content(server: LiveServer) -> None:
    server.service.answer = text = WEATHER
    fields = {"tools": TOOLS, "response_format": {"type": "json_object"}}
    (choice,) = chat(server, **fields).json()["choices"]
    assert choice["message"]["content"] == text
    assert choice["message"]["tool_calls"] is None


def test_references_of_a_schema_stay_within_it(tmp_path: Path) -> None:
    """A tool's schema may refer to itself, by the names that another tool's schema has, too."""
    chain = {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}
    tools = {
        "chain": {"properties": chain, "required": ["next"], "additionalProperties": False},
        "number": typed("integer"),
        "flag": typed("boolean"),
        "other": {"$ref": "#/$defs/C", "$defs": {"C": {"properties": {}}}},
        "any": {},
    }
    tokenizer = golden_tokenizer(tmp_path, "bpe")
    held = compiled(vocabulary_of(tokenizer), "json_schema", forced_schema(tools, 1))

    def fits(name: str, parameters: object) -> bool:
        text = json.dumps([{"name": name, "parameters": parameters}])
        return can_write(held, tokenizer, text)

    assert fits("chain", {"next": {"next": None}})
    assert not fits("chain", {"next": [{"name": "chain", "parameters": {"next": None}}]})
    assert fits("number", {"c": 1, "same": 2})
    assert not fits("number", {"c": 1, "same": True})
    assert fits("flag", {"c": True, "same": False})
    assert fits("other", {})
    for name in tools:
        assert not fits(name, 1), "arguments are an object"


def typed(kind: str) -> dict[str, Any]:
    return {
        "properties": {"c": {"$ref": "#/$defs/C"}, "same": {"$ref": "#/properties/c"}},
        "required": ["c", "same"],
        "additionalProperties": False,
        "$defs": {"C": {"type": kind}},
    }


@pytest.mark.parametrize("word", ["$defs", "definitions", "properties", "$ref"])
def test_odd_schemas_of_tools_are_the_constraints_to_refuse(server: LiveServer, word: str) -> None:
    function = {"name": "f", "parameters": {word: [1]}}
    fields = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    server.service.answer = "[]"
    assert chat(server, **fields).status_code == 200


def test_a_schema_that_is_no_text_is_refused(server: LiveServer) -> None:
    broken = b'{"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": "\xff"}}}'
    content = (
        b'{"messages": [{"role": "user", "content": "?"}], "response_format": ' + broken + b"}"
    )
    headers = {"Content-Type": "application/json"}
    url = f"{server.url}/v1/chat/completions"
    reply = httpx.post(url, content=content, headers=headers)
    assert reply.status_code == 400
    assert reply.json()["message"].endswith("it is not UTF-8 (invalid start byte).")


def strict(*tools: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]


def test_arguments_of_a_strict_function_follow_its_schema(
    server: LiveServer, tmp_path: Path
) -> None:
    server.service.answer = f"<think>It is far.</think>I look.\n{WEATHER}"
    schema = {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}},
        "required": ["city"],
        "$defs": {"city": {"enum": ["Paris", "Rome"]}},
    }
    weather = {"type": "function", "function": {"name": "get_weather", "parameters": schema}}
    (choice,) = chat(server, tools=[*strict(weather), TOOLS[1]]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "I look."
    assert choice["message"]["reasoning_content"] == "It is far."
    params = server.service.requests[0].sampling_params
    assert params.reasoning == ReasoningFirst("<think>", "</think>", False)
    assert params.constraint is not None
    assert params.constraint.kind == "structural_tag"
    tokenizer = golden_tokenizer(tmp_path, "bpe")
    held = compiled(vocabulary_of(tokenizer), "structural_tag", params.constraint.text)
    for text in ("", "I look.", WEATHER, f"So:{WEATHER}\n{TIME}", TIME.replace("{}", '{"x": 1}')):
        assert can_write(held, tokenizer, text), text
    for text in (WEATHER.replace("Paris", "Oslo"), TIME.replace("get_time", "f"), "<tool_call>"):
        assert not can_write(held, tokenizer, text), text


def test_one_call_at_most_ends_the_answer(server: LiveServer, tmp_path: Path) -> None:
    chat(server, tools=strict(*TOOLS), parallel_tool_calls=False)
    constraint = server.service.requests[0].sampling_params.constraint
    assert constraint is not None
    tokenizer = golden_tokenizer(tmp_path, "bpe")
    held = compiled(vocabulary_of(tokenizer), "structural_tag", constraint.text)
    assert can_write(held, tokenizer, f"So:{TIME}")
    assert not can_write(held, tokenizer, f"So:{TIME}\n")


@pytest.mark.parametrize("fields", [{"regex": "a"}, {"tool_choice": "none"}])
def test_what_else_is_asked_for_comes_first(server: LiveServer, fields: dict[str, Any]) -> None:
    reply = chat(server, tools=strict(*TOOLS), **fields)
    assert reply.status_code == 200
    assert server.service.requests[0].sampling_params.structural_tag is None


def test_strict_asks_for_nothing_where_no_text_can_be_held(server: LiveServer) -> None:
    server.service.constraint_refusal = "not here"
    server.service.answer = WEATHER
    (choice,) = chat(server, tools=strict(*TOOLS)).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert server.service.requests[0].sampling_params.constraint is None


def test_a_structural_tag_leaves_calls_and_reasoning_to_be_read(server: LiveServer) -> None:
    server.service.answer = f"<think>a</think>{TIME}"
    tag = {"type": "structural_tag", "format": {"type": "any_text"}}
    (choice,) = chat(server, tools=TOOLS, response_format=tag).json()["choices"]
    assert choice["message"]["reasoning_content"] == "a"
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["get_time"]


def test_strict_is_true_or_false(server: LiveServer) -> None:
    reply = chat(server, tools=[{"type": "function", "function": {"name": "f", "strict": 1.5}}])
    assert reply.status_code == 400
    assert "tools[0].function.strict" in reply.json()["message"]


def test_gpt_oss_is_held_from_its_first_character(tmp_path: Path) -> None:
    with LiveServer(tmp_path, tool_call_parser="gpt-oss", reasoning_parser="gpt-oss") as server:
        server.service.answer = "<r>a</r>"
        tag = {"type": "structural_tag", "format": {"type": "any_text"}}
        (choice,) = chat(server, tools=strict(*TOOLS), response_format=tag).json()["choices"]
        assert choice["message"]["content"] == "<r>a</r>"
        assert chat(server, tools=strict(*TOOLS)).status_code == 200
        assert server.service.requests[1].sampling_params.constraint is None
