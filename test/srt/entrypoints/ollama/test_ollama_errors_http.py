"""What Ollama's paths refuse, and how answers fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from srt.entrypoints.fake_service import LiveServer, http_post
from srt.entrypoints.ollama.ollama_client import ASK, TOOLS, lines, send

CHAT, GENERATE = "/api/chat", "/api/generate"


@pytest.mark.parametrize("path", [CHAT, GENERATE])
def test_failing_before_and_in_a_stream(server: LiveServer, path: str) -> None:
    server.service.fail_at[""] = 0
    failed = {"error": "The scheduler process died."}
    for is_stream in (False, True):
        reply = send(server, path, stream=is_stream)
        assert (reply.status_code, reply.json()) == (503, failed)
    server.service.fail_at[""] = 4
    reply = send(server, path, stream=False)
    assert (reply.status_code, reply.json()) == (503, failed)
    found = lines(server, path)
    assert found[-1] == failed
    assert [line.get("done") for line in found] == [*[False] * 4, None]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        (CHAT, {"messages": ASK}),
        (GENERATE, {"prompt": "Hi"}),
        (GENERATE, {"prompt": "Hi", "raw": True}),
    ],
    ids=["chat", "generate", "raw"],
)
def test_a_client_that_leaves_ends_its_work(
    server: LiveServer, body: tuple[str, dict[str, Any]], is_stream: bool
) -> None:
    server.service.hold_at[""] = 2
    path, fields = body
    sent = json.dumps({"model": "m", **fields, "stream": is_stream}).encode()
    with server.raw(http_post(path, sent)) as connection:
        rid = server.service.started.get(timeout=20)
        if is_stream:
            assert b"200 OK" in connection.recv(1 << 16)
    assert server.service.ended.get(timeout=20) == (rid, False)


def options(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"options": fields}


def message(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": "x", **fields}]}


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ((CHAT, {"model": ...}), "Invalid value for 'model': it is missing."),
        ((GENERATE, {"model": ""}), "'model'"),
        ((CHAT, {"prompt": "x"}), "Unknown field 'prompt'."),
        ((CHAT, {"messages": "x"}), "'messages'"),
        (message(role="king"), "'messages[0].role'"),
        (message(content=[{"type": "text", "text": "x"}]), "'messages[0].content'"),
        (message(images=["aGk="]), "Images are not served: the model takes text only"),
        (message(images="aGk="), "'messages[0].images': expected a list of images in base64"),
        (message(tool_calls=["x"]), "'messages[0].tool_calls'"),
        (message(tool_calls=[{"name": "f"}]), "'messages[0].tool_calls'"),
        (message(thinking=5), "'messages[0].thinking'"),
        (message(content="refuse me"), "The chat template cannot render"),
        (message(content="x" * 600), "longer than the model's context length"),
        ((CHAT, {"tools": [*TOOLS, TOOLS[0]]}), "'tools[2].function.name'"),
        ((CHAT, {"stream": "yes"}), "'stream'"),
        ((CHAT, {"format": "xml"}), "'format': expected json or a schema, got 'xml'"),
        ((CHAT, {"format": 5}), "'format'"),
        ((CHAT, {"think": True}), '"m" does not support thinking'),
        ((GENERATE, {"think": "high"}), '"m" does not support thinking'),
        ((CHAT, {"think": 5}), "'think'"),
        ((CHAT, {"logprobs": True}), "'logprobs'"),
        ((CHAT, {"truncate": True}), "'truncate'"),
        ((CHAT, {"shift": True}), "'shift'"),
        ((CHAT, {"_debug_render_only": True}), "'_debug_render_only'"),
        (options(num_ctx=513), "'options.num_ctx': the context has 512 tokens"),
        (options(num_predict=-3), "'options.num_predict'"),
        (options(num_predict=1000), "Requested token count exceeds"),
        (options(temperature="hot"), "'options.temperature'"),
        (options(temperature=-1), "temperature must be in"),
        (options(repeat_last_n=64), "'options.repeat_last_n'"),
        (options(mirostat=2), "'options.mirostat'"),
        (options(typical_p=0.5), "'options.typical_p'"),
        (options(best_of=2), "Unknown field 'options.best_of'."),
        ((CHAT, {"options": []}), "'options'"),
        ((GENERATE, {"images": ["aGk="]}), "Images are not served: the model takes text only"),
        ((GENERATE, {"images": [5]}), "'images'"),
        ((GENERATE, {"images": ["aGk="], "raw": True}), "'images'"),
        ((GENERATE, {"suffix": "x"}), "'suffix'"),
        ((GENERATE, {"template": "{{ .Prompt }}"}), "'template'"),
        ((GENERATE, {"context": [1]}), "'context'"),
        ((GENERATE, {"raw": True, "system": "x"}), "'system'"),
        ((GENERATE, {"raw": True, "think": True}), "'think'"),
        ((GENERATE, {"prompt": 5}), "'prompt'"),
        (("/api/show", {"model": ...}), "Unknown field 'prompt'."),
    ],
)
def test_bad_fields_are_named(
    server: LiveServer, request_: tuple[str, dict[str, Any]], error: str
) -> None:
    path, fields = request_
    reply = send(server, path, **fields)
    assert reply.status_code == 400, reply.text
    assert set(reply.json()) == {"error"}
    assert error in reply.json()["error"]


@pytest.mark.parametrize("body", [b"", b"[]", b'{"model": "m", "prompt": "\\ud800"}'], ids=range(3))
def test_bodies_that_are_nothing(server: LiveServer, body: bytes) -> None:
    for path in (CHAT, GENERATE, "/api/show"):
        reply = server.post_raw(path, body)
        assert reply.status_code == 400
        assert set(reply.json()) == {"error"}


def test_no_key_and_not_ready(tmp_path: Path) -> None:
    with LiveServer(tmp_path, ready=False, api_key="secret") as server:
        reply = server.post(CHAT, {})
        assert (reply.status_code, reply.json()) == (401, {"error": "Unauthorized"})
        key = {"authorization": "Bearer secret"}
        reply = server.request("GET", "/api/tags", headers=key)
        assert (reply.status_code, reply.json()) == (503, {"error": "The server is starting."})
