"""Raw requests to /v1/responses, their replies checked against the openai package's types."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pydantic
from openai.types.responses import Response, ResponseStreamEvent

from srt.entrypoints.fake_service import LiveServer

PATH = "/v1/responses"
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    },
    {"type": "function", "name": "get_time", "parameters": None, "strict": None},
]
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nHm, é.\n</think>"
EVERYTHING = f"{THOUGHT}\n\nI look.\n{WEATHER}\n{TIME}\nDone."
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


def post(server: LiveServer, **fields: Any) -> httpx.Response:
    return server.post(PATH, {"model": "m", "input": "Hi", **fields})


def create(server: LiveServer, **fields: Any) -> dict[str, Any]:
    reply = post(server, **fields)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    Response.model_validate(found, strict=True)
    return found


def stream(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    """The events, each checked: its number, its name, and that the package's types hold it."""
    reply = post(server, stream=True, **fields)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    *blocks, rest = reply.text.split("\n\n")
    assert rest == ""
    events = []
    for number, block in enumerate(b for b in blocks if not b.startswith(": ")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        assert EVENT.validate_python(event, strict=True).type == event["type"]
        events.append(event)
    return events


def accumulated(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output put together from the deltas alone, each done event compared on the way."""
    items: list[dict[str, Any]] = []
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        item = items[event["output_index"]] if kind != "output_item.added" else {}
        assert event.get("item_id", item.get("id")) == item.get("id")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif kind == "output_item.done":
            item["status"] = event["item"]["status"]
            assert event["item"] == item
        elif kind == "content_part.added":
            assert item["content"] == []
            item["content"].append(event["part"])
        elif kind == "content_part.done":
            assert item["content"] == [event["part"]]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert item["arguments"] == event["arguments"]
        else:
            (part,) = item["content"]
            if kind.endswith("delta"):
                part["text"] += event["delta"]
                if "logprobs" in event:
                    part["logprobs"] += event["logprobs"]
            else:
                assert kind in ("output_text.done", "reasoning_text.done")
                assert part["text"] == event["text"]
    return items
