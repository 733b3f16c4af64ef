"""What /v1/messages refuses, and how messages fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.entrypoints.anthropic.messages_fields import COUNT_FIELDS, MESSAGES_FIELDS
from sglang.srt.managers.io_struct import FinishReason, PrefillProgress
from srt.entrypoints.anthropic.messages_client import ASK, PATH, TOOLS, create, post, stream
from srt.entrypoints.fake_service import LiveServer, http_post


def test_failing_before_and_in_a_stream(server: LiveServer) -> None:
    server.service.fail_at["early"] = 0
    server.service.fail_at["late"] = 4
    failed = {
        "type": "error",
        "error": {"type": "overloaded_error", "message": "The scheduler process died."},
    }
    for is_stream in (False, True):
        reply = post(server, rid="early", stream=is_stream)
        assert (reply.status_code, reply.json()) == (503, failed)
    assert post(server, rid="late").status_code == 503
    events = stream(server, rid="late")
    assert events[-1] == failed
    kinds = ["message_start", "ping", "content_block_start", *["content_block_delta"] * 4, "error"]
    assert [event["type"] for event in events] == kinds


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_refusals_by_the_engine(server: LiveServer, status: int, kind: str) -> None:
    refusal = FinishReason("abort", message="no", status_code=status)
    server.service.refusals["r"] = refusal
    error = {"type": "error", "error": {"type": kind, "message": "no"}}
    for is_stream in (False, True):
        reply = post(server, rid="r", stream=is_stream)
        assert (reply.status_code, reply.json()) == (status, error)
    server.service.progress = [PrefillProgress("r", 1, 2, 1.0, None)]
    assert [event["type"] for event in stream(server, rid="r")] == [
        *("message_start", "ping", "error")
    ]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_ends_its_work(server: LiveServer, is_stream: bool) -> None:
    server.service.hold_at["gone"] = 2
    body = {"max_tokens": 9, "messages": ASK, "rid": "gone", "stream": is_stream}
    with server.raw(http_post(PATH, json.dumps(body).encode())) as connection:
        rid = server.service.started.get(timeout=20)
        assert rid.startswith("gone_msg_")
        if is_stream:
            assert b"200 OK" in connection.recv(1 << 16)
    assert server.service.ended.get(timeout=20) == (rid, False)
    assert create(server)["stop_reason"] == "end_turn"


def block(role: str = "user", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": [fields]}]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": ...}, "Invalid value for 'max_tokens': it is missing."),
        ({"max_tokens": -1}, "'max_tokens'"),
        ({"messages": []}, "'messages': it is empty"),
        ({"messages": "Hi"}, "'messages'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages[0].role'"),
        ({"messages": [{"role": "user"}]}, "'messages[0].content'"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "'messages[0].content[0]'"),
        (block(**IMAGE), "Images are not served: the model takes text only"),
        (block("assistant", **IMAGE), "'messages[0].content[0].type': 'image' is not served in"),
        (block(type="image"), "'messages[0].content[0].source': expected an object"),
        (
            block(type="image", source={"type": "file"}),
            "'messages[0].content[0].source.type': url and base64 are served, not 'file'",
        ),
        (
            block(type="image", source={"type": "base64", "data": "aGk="}),
            "'messages[0].content[0].source.media_type'",
        ),
        (block(type="document"), "'messages[0].content[0]': documents are not served"),
        (block(type="text"), "'messages[0].content[0].text'"),
        (block(type="text", text=5), "'messages[0].content[0].text'"),
        (block(**USE), "'messages[0].content[0].type': 'tool_use' is not served in a message of"),
        (block("assistant", **{**USE, "input": "{}"}), "'messages[0].content[0].input'"),
        (block("assistant", **{**USE, "id": None}), "'messages[0].content[0].id'"),
        (block("assistant", type="thinking"), "'messages[0].content[0].thinking'"),
        (block("assistant", type="server_tool_use"), "'messages[0].content[0].type'"),
        (block("assistant", **USE), "'messages': the last one uses tools"),
        (block(type="tool_result"), "'messages[0].content[0].tool_use_id'"),
        (
            block(type="tool_result", tool_use_id="t", content=[IMAGE]),
            "'messages[0].content[0].content[0]': only text parts are served, got 'image'",
        ),
        ({"system": [IMAGE]}, "'system[0]'"),
        ({"system": 5}, "'system'"),
        ({"tools": [{"name": "f"}]}, "'tools[0].input_schema': it is missing"),
        ({"tools": [{"input_schema": {}}]}, "'tools[0].name'"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "'tools[2].name'"),
        ({"tools": [{**TOOLS[0], "input_schema": []}]}, "'tools[0].input_schema'"),
        ({"tools": [{**TOOLS[0], "parameters": {}}]}, "Unknown field 'tools[0].parameters'."),
        ({"tools": [{**TOOLS[0], "defer_loading": True}]}, "'tools[0].defer_loading'"),
        (
            {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]},
            "'tools[0].type': only custom tools are served, got 'web_search_20250305'",
        ),
        ({"tools": {}}, "'tools'"),
        ({"tool_choice": "auto"}, "'tool_choice'"),
        ({"tool_choice": {"type": "any"}}, "'tool_choice': there are no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "required"}}, "'tool_choice.type'"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "f"}}, "'tool_choice': 'f'"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto", "x": 1}}, "'tool_choice'"),
        ({"thinking": {"type": "on"}}, "'thinking.type'"),
        ({"thinking": {"type": "enabled"}}, "'thinking.budget_tokens'"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 200}},
            "'thinking.budget_tokens': it must be less than max_tokens",
        ),
        ({"thinking": {"type": "adaptive", "display": "all"}}, "'thinking.display'"),
        ({"output_config": {"format": {"type": "xml"}}}, "'output_config.format.type'"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "'output_config.format.schema'"),
        ({"output_config": {"verbosity": "low"}}, "'output_config'"),
        ({"chat_template_kwargs": {"messages": []}}, "'chat_template_kwargs'"),
        ({"stop_sequences": "END"}, "'stop_sequences'"),
        ({"temperature": "hot"}, "'temperature'"),
        ({"temperature": -1}, "temperature must be in"),
        ({"container": "c"}, "'container'"),
        ({"mcp_servers": [{}]}, "'mcp_servers'"),
        ({"context_management": {"edits": [{"type": "x"}]}}, "'context_management'"),
        ({"n": 2}, "'n'"),
        ({"rid": ""}, "'rid'"),
        ({"max_output_tokens": 5}, "Unknown field 'max_output_tokens'."),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "The chat template cannot"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "longer than the model's context"),
    ],
)
def test_bad_fields_are_named(server: LiveServer, fields: dict[str, Any], message: str) -> None:
    reply = post(server, **fields)
    assert reply.status_code == 400, reply.text
    found = reply.json()
    assert (set(found), found["type"]) == ({"type", "error"}, "error")
    assert (set(found["error"]), found["error"]["type"]) == (
        {"type", "message"},
        "invalid_request_error",
    )
    assert message in found["error"]["message"]


def test_fields_that_change_no_answer_pass(server: LiveServer) -> None:
    keep = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    fields: dict[str, Any] = {"cache_control": {"type": "ephemeral"}, "service_tier": "auto"}
    reply = post(server, **fields, context_management=keep, thinking=None, tool_choice=None)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"max_tokens": 5, "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"max_tokens": 5, "messages": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"max_tokens": 5, "tools": [{"name": "f", "input_schema": '
        + b'{"a":' * 2000
        + b"1"
        + b"}" * 2000
        + b"}]}",
    ],
    ids=range(5),
)
def test_bodies_that_are_nothing(server: LiveServer, body: bytes) -> None:
    reply = server.post_raw(PATH, body)
    assert (reply.status_code, reply.json()["type"]) == (400, "error")
    assert reply.json()["error"]["message"]


def test_other_types_of_bodies_are_refused(server: LiveServer) -> None:
    reply = server.post_raw(PATH, b'{"max_tokens": 5}', "text/plain")
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


def test_the_key_may_come_in_either_header(tmp_path: Path) -> None:
    with LiveServer(tmp_path, api_key="secret") as server:
        body = {"max_tokens": 5, "messages": ASK}
        given: list[dict[str, str]] = [
            {"x-api-key": "secret"},
            {"authorization": "Bearer secret"},
            {"x-api-key": "secret", "authorization": "Bearer other"},
        ]
        for headers in given:
            assert server.request("POST", PATH, json=body, headers=headers).status_code == 200
        wrong: list[dict[str, str]] = [{}, {"x-api-key": "Bearer secret"}, {"x-api-key": ""}]
        for headers in wrong:
            reply = server.request("POST", PATH, json=body, headers=headers)
            assert (reply.status_code, reply.json()) == (
                401,
                {
                    "type": "error",
                    "error": {
                        "type": "authentication_error",
                        "message": "The API key is missing or wrong.",
                    },
                },
            )
        models = server.request("GET", "/v1/models", headers={"x-api-key": "secret"})
        assert models.status_code == 200


def test_starting_and_large_bodies(tmp_path: Path) -> None:
    with LiveServer(tmp_path, ready=False) as server:
        reply = post(server)
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "overloaded_error")
    with LiveServer(tmp_path, max_request_bytes=100) as server:
        reply = post(server, system="x" * 100)
        assert (reply.status_code, reply.json()["error"]["type"]) == (413, "request_too_large")


def test_counting_takes_what_makes_the_prompt() -> None:
    own = {"max_tokens", "stop_sequences", "temperature", "top_p", "top_k", "stream"}
    ours = {"rid", "extra_key", "cache_salt", "priority"}
    assert MESSAGES_FIELDS.served - COUNT_FIELDS.served == own | ours
    assert MESSAGES_FIELDS.accepted == COUNT_FIELDS.accepted
