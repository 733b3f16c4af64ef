"""The doors that parse texts, and what /generate and /tokenize know of parsers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from srt.entrypoints.fake_service import LiveServer, ids_of

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_time"}},
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
]
THOUGHT = "Hm.\n</think>"


@pytest.fixture(scope="module")
def parsing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("parsers")
    with LiveServer(directory, tool_call_parser="llama3", reasoning_parser="deepseek-r1") as one:
        yield one


@pytest.mark.parametrize(
    ("fields", "reasoning", "text"),
    [
        ({"reasoning_parser": "deepseek-r1", "text": f"{THOUGHT}\n\nYes."}, "Hm.", "Yes."),
        ({"reasoning_parser": "deepseek-r1", "text": "Hm"}, "Hm", ""),
        ({"reasoning_parser": "qwen3", "text": f"<think>{THOUGHT}Yes."}, "Hm.", "Yes."),
        ({"reasoning_parser": "qwen3", "text": "Yes.", "return_blocks": False}, "", "Yes."),
        (
            {
                "reasoning_parser": "gpt-oss",
                "text": "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
                "<|channel|>final<|message|>Yes.",
            },
            "Hm",
            "Yes.",
        ),
    ],
)
def test_reasoning_is_separated(
    server: LiveServer, fields: dict[str, Any], reasoning: str, text: str
) -> None:
    reply = server.post("/separate_reasoning", fields)
    assert reply.status_code == 200, reply.text
    assert reply.json() == {"reasoning_text": reasoning, "text": text}


def test_calls_are_parsed(server: LiveServer) -> None:
    text = 'So.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    fields = {"text": text, "tools": TOOLS, "tool_call_parser": "qwen25"}
    assert server.post("/parse_function_call", fields).json() == {
        "normal_text": "So.",
        "calls": [{"tool_index": 1, "name": "get_weather", "parameters": '{"city": "Oslo"}'}],
    }
    without = server.post("/parse_function_call", {**fields, "tools": []})
    assert without.json() == {"normal_text": text, "calls": []}


def test_a_long_text_is_parsed(server: LiveServer) -> None:
    city = "x" * 200_000
    text = f"[get_weather(city='{city}')]"
    fields = {"text": text, "tools": TOOLS, "tool_call_parser": "pythonic"}
    (call,) = server.post("/parse_function_call", fields).json()["calls"]
    assert call["parameters"] == f'{{"city": "{city}"}}'


def test_the_servers_own_parsers_need_not_be_named(parsing: LiveServer) -> None:
    reply = parsing.post("/separate_reasoning", {"text": f"{THOUGHT}Yes."})
    assert reply.json() == {"reasoning_text": "Hm.", "text": "Yes."}
    fields = {
        "text": '{"name": "get_time", "parameters": {}}',
        "tools": TOOLS,
        "tool_call_parser": "auto",
    }
    assert len(parsing.post("/parse_function_call", fields).json()["calls"]) == 1


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/separate_reasoning", {"text": "x", "reasoning_parser": "kimi"}, "reasoning_parser"),
        ("/separate_reasoning", {"text": "x"}, "the server has none of its own"),
        ("/separate_reasoning", {"text": 5}, "text"),
        ("/separate_reasoning", {"text": "x", "return_blocks": True}, "return_blocks"),
        ("/parse_function_call", {"text": "x", "tool_call_parser": "glm"}, "tool_call_parser"),
        ("/parse_function_call", {"text": "x"}, "the server has none of its own"),
        (
            "/parse_function_call",
            {"text": "x", "tool_call_parser": "hermes", "tools": [{}]},
            "tools[0].function",
        ),
        ("/parse_function_call", {"other": 1}, "other"),
    ],
)
def test_bad_fields_are_named(
    server: LiveServer, path: str, fields: dict[str, Any], named: str
) -> None:
    reply = server.post(path, fields)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]


def test_generate_counts_reasoning_when_asked(parsing: LiveServer) -> None:
    parsing.service.answer = f"{THOUGHT}\nYes."
    wanted: list[dict[str, Any]] = [
        {"text": "Why?"},
        {"input_ids": ids_of("Why?").tolist()},
    ]
    for prompt in wanted:
        reply = parsing.post("/generate", {**prompt, "require_reasoning": True}).json()
        assert reply["text"] == parsing.service.answer
        assert reply["meta_info"]["reasoning_tokens"] == len(THOUGHT)
        events = parsing.events("/generate", {**prompt, "require_reasoning": True})
        assert events[-1]["meta_info"]["reasoning_tokens"] == len(THOUGHT)
        assert events[0]["meta_info"]["reasoning_tokens"] == 1
        assert parsing.post("/generate", prompt).json()["meta_info"]["reasoning_tokens"] == 0
    closed = {"input_ids": ids_of("Why?<think>\n\n</think>\n\n").tolist()}
    reply = parsing.post("/generate", {**closed, "require_reasoning": True}).json()
    assert reply["meta_info"]["reasoning_tokens"] == 0


def test_generate_lets_reasoning_come_before_a_constraint(parsing: LiveServer) -> None:
    parsing.service.answer = f"{THOUGHT}7"
    wants = {"sampling_params": {"regex": "[0-9]"}, "require_reasoning": True}
    prompts = ["Why?", "Why?<think>\n", "Why?<think>\n\n</think>\n\n"]
    for prompt in prompts:
        parsing.post("/generate", {"text": prompt, **wants})
    parsing.post("/generate", {"input_ids": ids_of(prompts[1]).tolist(), **wants})
    parsing.post("/generate", {"text": prompts, **wants, "stream": True})
    parsing.post("/generate", {"text": "Why?", **wants, "require_reasoning": False})
    parsing.post("/generate", {"text": "Why?", "require_reasoning": True})
    found = [request.sampling_params.reasoning for request in parsing.service.requests[-9:]]
    inside = [None if one is None else one.inside for one in found]
    assert inside[:4] == [True, True, None, True]
    assert sorted(inside[4:7], key=str) == [None, True, True]
    assert inside[7:] == [None, None]


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_reasoning_of_raw_prompts_is_bounded(parsing: LiveServer, path: str) -> None:
    name = "text" if path == "/generate" else "prompt"
    parsing.service.requests.clear()
    for prompt in ("Why?<think>\n", "Why?<think>\n\n</think>\n\n"):
        reply = parsing.post(path, {name: prompt, "max_thinking_tokens": 5})
        assert reply.status_code == 200
    in_params: dict[str, Any] = {"custom_params": {"thinking_budget": 6, "other": [1]}}
    wrapped = {"sampling_params": in_params} if path == "/generate" else in_params
    parsing.post(path, {name: "Why?<think>\n", **wrapped})
    parsing.post(path, {name: "Why?<think>\n", **wrapped, "max_thinking_tokens": 0})
    parsing.post(path, {name: "Why?<think>\n", **wrapped, "max_thinking_tokens": -1})
    sent = [request.sampling_params for request in parsing.service.requests]
    assert [params.max_thinking_tokens for params in sent] == [5, 5, 6, 0, None]
    inside = [params.reasoning and params.reasoning.inside for params in sent]
    assert inside == [True, None, True, True, None]
    assert [params.held_to is None for params in sent] == [False, True, False, False, True]


def test_each_prompt_of_a_batch_has_its_own_budget(parsing: LiveServer) -> None:
    parsing.service.requests.clear()
    body = {"text": ["a", "b"], "max_thinking_tokens": [None, 3]}
    parsing.post("/generate", {**body, "sampling_params": {"regex": "[0-9]"}})
    sent = {one.text: one.sampling_params for one in parsing.service.requests}
    assert [sent[text].max_thinking_tokens for text in "ab"] == [None, 3]
    assert [sent[text].reasoning is None for text in "ab"] == [True, False]


@pytest.mark.parametrize("value", [-2, 1.5, "5", True, 1 << 40])
def test_a_budget_is_a_number_of_tokens(parsing: LiveServer, value: Any) -> None:
    for fields in (
        {"max_thinking_tokens": value},
        {"sampling_params": {"custom_params": {"thinking_budget": value}}},
    ):
        reply = parsing.post("/generate", {"text": "x", **fields})
        assert reply.status_code == 400
        assert "thinking" in reply.json()["error"]["message"]


def test_budgets_need_a_parser(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "x"}]
    for path, body in (
        ("/generate", {"text": "x"}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": messages}),
        ("/v1/responses", {"input": "x"}),
    ):
        reply = server.post(path, {**body, "max_thinking_tokens": 5})
        assert reply.status_code == 400
        assert "--reasoning-parser" in reply.text


def test_generate_needs_a_parser_to_count(server: LiveServer) -> None:
    reply = server.post("/generate", {"text": "Why?", "require_reasoning": True})
    assert reply.status_code == 400
    assert "require_reasoning" in reply.json()["error"]["message"]


def test_tokenize_gives_the_template_the_tools(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "Why?"}]
    fields = {"messages": messages, "tools": TOOLS}
    assert server.post("/tokenize", fields).status_code == 200
    assert server.post("/tokenize", {**fields, "tool_choice": "none"}).status_code == 200
    seen = [kwargs.get("tools") for _, kwargs in server.service.templates]
    assert seen == [TOOLS, None]
