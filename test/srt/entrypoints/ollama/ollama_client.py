"""Raw requests to Ollama's paths, and what the lines of a stream add up to."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx

from srt.entrypoints.fake_service import LiveServer

ASK: list[Any] = [{"role": "user", "content": "Hi"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}},
]
WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nHm, é.\n</think>"
EVERYTHING = f"{THOUGHT}\n\nI look.\n{WEATHER}\n{TIME}\nDone."
COUNTS = ("prompt_eval_count", "prompt_eval_cached_count", "eval_count")
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


def send(server: LiveServer, path: str, **fields: Any) -> httpx.Response:
    """A request; a chat asks `ASK` and a prompt "Hi" unless told otherwise."""
    given = {"messages": ASK} if path == "/api/chat" else {"prompt": "Hi"}
    body = {"model": "m", **given, **fields}
    return server.post(path, {name: value for name, value in body.items() if value is not ...})


def whole(server: LiveServer, path: str, **fields: Any) -> dict[str, Any]:
    """A reply, its timestamp and durations checked and taken out."""
    reply = send(server, path, stream=False, **fields)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/json"
    return checked(reply.json())


def lines(server: LiveServer, path: str, **fields: Any) -> list[dict[str, Any]]:
    """The lines of a stream, which is the default."""
    reply = send(server, path, **fields)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-ndjson"
    *found, rest = reply.text.split("\n")
    assert rest == ""
    return [checked(json.loads(line)) for line in found]


def checked(line: dict[str, Any]) -> dict[str, Any]:
    if set(line) == {"error"}:
        return line
    assert _TIME.fullmatch(line.pop("created_at"))
    if line["done"] and line["done_reason"] != "load":
        total, load, prompt, rest = (line.pop(name) for name in DURATIONS)
        assert (load, total) == (0, prompt + rest)
        assert prompt > 0
        assert rest >= 0
    return line


def added_up(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The reply that the lines of a stream add up to."""
    *news, last = found
    assert all(set(line) <= {"model", "done", "message", "response", "thinking"} for line in news)
    assert not any(line["done"] for line in news)
    sums: dict[str, Any] = {}
    for line in news:
        part = line.get("message") or {k: line[k] for k in ("response", "thinking") if k in line}
        for field, value in part.items():
            if field != "role":
                sums[field] = sums[field] + value if field in sums else value
    if "message" in last:
        assert last["message"] == {"role": "assistant", "content": ""}
        return {**last, "message": {**last["message"], **sums}}
    assert last["response"] == ""
    return {**last, **sums}
