"""What /v1/responses refuses, and how responses fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from sglang.srt.entrypoints.openai.responses_fields import RESPONSES_FIELDS
from sglang.srt.managers.io_struct import FinishReason, PrefillProgress
from srt.entrypoints.fake_service import LiveServer, http_post
from srt.entrypoints.openai.responses_client import (
    PATH,
    TOOLS,
    accumulated,
    create,
    post,
    stream,
)


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as one:
        yield one


def test_failing_before_and_in_a_stream(client: openai.OpenAI, server: LiveServer) -> None:
    server.service.fail_at["early"] = 0
    server.service.fail_at["late"] = 4
    for is_stream in (False, True):
        reply = post(server, rid="early", stream=is_stream)
        assert reply.status_code == 503
        assert reply.json() == {
            "error": {
                "message": "The scheduler process died.",
                "type": "server_error",
                "param": None,
                "code": None,
            }
        }
    assert post(server, rid="late").status_code == 503
    events = stream(server, rid="late")
    last = events[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {
        "code": "server_error",
        "message": "The scheduler process died.",
    }
    assert last["response"]["output"][0]["content"][0]["text"] == "Pari"
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert last["response"]["output"] == accumulated(events)
    assert client.responses.retrieve(last["response"]["id"]).status == "failed"


def test_a_refusal_by_the_engine(server: LiveServer) -> None:
    refusal = FinishReason("abort", message="too long", status_code=400)
    server.service.refusals["r"] = refusal
    for is_stream in (False, True):
        reply = post(server, rid="r", stream=is_stream)
        assert (reply.status_code, reply.json()["error"]["message"]) == (400, "too long")
    server.service.progress = [PrefillProgress("r", 1, 2, 1.0, None)]
    fields = {"rid": "r", "stream_options": {"include_progress": True}}
    last = stream(server, **fields)[-1]["response"]
    assert (last["status"], last["output"], last["usage"]) == ("failed", [], None)
    assert last["error"] == {"code": "invalid_prompt", "message": "too long"}


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_ends_its_work(server: LiveServer, is_stream: bool) -> None:
    server.service.hold_at["gone"] = 2
    body = {"model": "m", "input": "x", "rid": "gone", "stream": is_stream}
    with server.raw(http_post(PATH, json.dumps(body).encode())) as connection:
        rid = server.service.started.get(timeout=20)
        assert rid.startswith("gone_resp_")
        if is_stream:
            assert b"200 OK" in connection.recv(1 << 16)
    assert server.service.ended.get(timeout=20) == (rid, False)
    assert create(server)["status"] == "completed"


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [fields]}


IMAGE = {"type": "input_image", "image_url": "x"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": []}, "'input'"),
        ({"input": 5}, "'input'"),
        ({"input": None}, "'input'"),
        (item(type="item_reference", id="x"), "'input[0].type': 'item_reference'"),
        (item(type=["message"]), "'input[0].type'"),
        (item(role="tool", content="x"), "'input[0].role'"),
        (item(role="user"), "'input[0].content'"),
        (item(role="user", content=[IMAGE]), "Images are not served"),
        (item(role="system", content=[IMAGE]), "'input[0].content[0]': only text parts"),
        (
            item(role="user", content=[{"type": "input_image", "file_id": "x"}]),
            "'input[0].content[0]': an input_image needs its image_url",
        ),
        (item(role="user", content=[IMAGE, 5]), "'input[0].content[1][0]': only text parts"),
        (item(type="function_call", call_id="c", name="f"), "'input[0].arguments'"),
        (
            item(type="function_call", call_id="c", name="f", arguments="{"),
            "'input[0].arguments': they are not JSON",
        ),
        (item(type="function_call_output", output="x"), "'input[0].call_id'"),
        (item(type="function_call_output", call_id="c"), "'input[0].output'"),
        (item(type="reasoning", summary="x"), "'input[0].summary'"),
        ({"tools": [{"type": "web_search"}]}, "'tools[0].type': only functions are served"),
        ({"tools": [{"type": "function"}]}, "'tools[0].name'"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "'tools[2].name'"),
        ({"tools": [{**TOOLS[0], "parameters": []}]}, "'tools[0].parameters'"),
        ({"tools": [{**TOOLS[0], "strict": 1.5}]}, "'tools[0].strict'"),
        ({"tools": {}}, "'tools'"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "'tool_choice.type'"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "f"}}, "'tool_choice'"),
        ({"tool_choice": "required"}, "'tool_choice'"),
        ({"text": {"format": {"type": "grammar"}}}, "'text.format.type'"),
        ({"text": {"format": {"type": "json_schema"}}}, "'text.format.schema'"),
        ({"text": {"verbosity": "low"}}, "'text.verbosity'"),
        ({"reasoning": {"mode": "pro"}}, "'reasoning.mode'"),
        ({"reasoning": {"context": "all_turns"}}, "'reasoning.context'"),
        ({"include": ["x"]}, "'include'"),
        ({"top_logprobs": 21}, "'top_logprobs'"),
        ({"max_output_tokens": -1}, "'max_output_tokens'"),
        ({"metadata": {"a": 1}}, "'metadata'"),
        ({"background": True}, "'background'"),
        ({"conversation": "conv_1"}, "'conversation'"),
        ({"truncation": "auto"}, "'truncation'"),
        ({"prompt": {"id": "p"}}, "'prompt'"),
        ({"messages": []}, "'messages': use input"),
        ({"max_tokens": 5}, "'max_tokens': use max_output_tokens"),
        ({"n": 2}, "'n'"),
        ({"rid": ""}, "'rid'"),
    ],
)
def test_bad_fields_are_named(server: LiveServer, fields: dict[str, Any], named: str) -> None:
    reply = post(server, **fields)
    assert reply.status_code == 400, reply.text
    assert set(reply.json()) == {"error"}
    assert named in reply.json()["error"]["message"]
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"input": "\\ud800"}',
        b'{"input": "x", "instructions": "\\ud800"}',
        b'{"input": "x", "metadata": {"a": "\\ud800"}}',
        b'{"input": "x", "tools": ' + b"[" * 2000 + b"]" * 2000 + b"}",
        b'{"input": [' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"]}",
    ],
    ids=range(7),
)
def test_bodies_that_are_nothing(server: LiveServer, body: bytes) -> None:
    reply = server.post_raw(PATH, body)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]
    assert server.post_raw(PATH, b'{"input": "x"}', "text/plain").status_code == 400


def test_deep_parameters_and_items_are_echoed_and_kept(server: LiveServer) -> None:
    schema = json.loads('{"a":' * 400 + "{}" + "}" * 400)
    tools = [{"type": "function", "name": "f", "parameters": schema}]
    extra = {"role": "user", "content": "Hi", "extra": schema}
    assert create(server, tools=tools, input=[extra])["tools"] == tools


def test_every_field_of_the_api_is_known() -> None:
    known = RESPONSES_FIELDS.served | RESPONSES_FIELDS.accepted | set(RESPONSES_FIELDS.refused)
    missing = set(ResponseCreateParamsBase.__annotations__) - known
    # Kinds of access and of pictures that no answer here depends on.
    assert missing == {"access_programs", "background_options", "image"}
