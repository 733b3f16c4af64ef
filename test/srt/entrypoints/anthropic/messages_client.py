"""Raw requests to /v1/messages, and what the events of a stream add up to."""

from __future__ import annotations

import json
from typing import Any

import httpx

from srt.entrypoints.fake_service import LiveServer

PATH = "/v1/messages"
TOOLS: list[Any] = [
    {
        "name": "get_weather",
        "description": "The weather of a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
        "cache_control": {"type": "ephemeral"},
    },
    {"name": "get_time", "type": "custom", "input_schema": {}},
]
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nHm, é.\n</think>"
EVERYTHING = f"{THOUGHT}\n\nI look.\n{WEATHER}\n{TIME}\nDone."
ASK: list[Any] = [{"role": "user", "content": "Hi"}]


def post(server: LiveServer, **fields: Any) -> httpx.Response:
    body = {"model": "m", "max_tokens": 200, "messages": ASK, **fields}
    return server.post(PATH, {name: value for name, value in body.items() if value is not ...})


def create(server: LiveServer, **fields: Any) -> dict[str, Any]:
    reply = post(server, **fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def stream(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    """The events, each checked for its name."""
    reply = post(server, stream=True, **fields)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = reply.text.split("\n\n")
    assert rest == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def accumulated(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that the events of a stream add up to, their order checked on the way."""
    message: dict[str, Any] = events[0]["message"]
    assert (events[0]["type"], message["content"]) == ("message_start", [])
    partial: list[str] = []
    is_open = False
    for event in events[1:-2]:
        if event["type"] == "ping":
            continue
        kind, index = event["type"].removeprefix("content_block_"), event["index"]
        if kind == "start":
            assert (is_open, index) == (False, len(message["content"]))
            is_open = True
            partial.clear()
            message["content"].append(event["content_block"])
            continue
        assert (is_open, index) == (True, len(message["content"]) - 1)
        block = message["content"][index]
        if kind == "stop":
            is_open = False
            if block["type"] == "tool_use":
                block["input"] = json.loads("".join(partial))
            continue
        delta = event["delta"]
        if delta["type"] == "input_json_delta":
            partial.append(delta["partial_json"])
        else:
            field = delta["type"].removesuffix("_delta")
            assert block["type"] == field
            block[field] += delta[field]
    assert not is_open
    last = events[-2]
    assert (last["type"], events[-1]) == ("message_delta", {"type": "message_stop"})
    return {**message, **last["delta"], "usage": last["usage"]}
