"""Ollama's API through raw HTTP, with answers the fake model is given."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang.srt.environ import Environ
from sglang.srt.managers.io_struct import FinishReason
from srt.entrypoints.fake_service import ANSWER, CONTEXT_LENGTH, LiveServer
from srt.entrypoints.ollama.ollama_client import (
    ASK,
    EVERYTHING,
    THOUGHT,
    TIME,
    TOOLS,
    WEATHER,
    added_up,
    lines,
    send,
    whole,
)

PATHS = ("/api/chat", "/api/generate")


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("ollama")
    (directory / "model.safetensors").write_bytes(b"x" * 100)
    with LiveServer(
        directory, device="cpu", tool_call_parser="hermes", reasoning_parser="qwen3"
    ) as server:
        yield server


def without_ids(reply: dict[str, Any]) -> dict[str, Any]:
    """What two replies to one request have in common."""
    for call in reply.get("message", {}).get("tool_calls", []):
        call.pop("id")
    return reply


def test_replies_have_exactly_the_shape(server: LiveServer) -> None:
    server.service.answer = "Yes."
    counts = {
        "prompt_eval_count": len("<user>Hi"),
        "prompt_eval_cached_count": 3,
        "eval_count": 4,
    }
    end = {"model": "m", "done": True, "done_reason": "stop", **counts}
    assert whole(server, "/api/chat") == {
        "message": {"role": "assistant", "content": "Yes."},
        **end,
    }
    assert whole(server, "/api/generate") == {"response": "Yes.", **end}
    found = lines(server, "/api/chat")
    assert found == [
        *(
            {"model": "m", "message": {"role": "assistant", "content": char}, "done": False}
            for char in "Yes."
        ),
        {"message": {"role": "assistant", "content": ""}, **end},
    ]
    assert lines(server, "/api/generate")[0] == {"model": "m", "response": "Y", "done": False}


def test_parts_of_every_kind(server: LiveServer) -> None:
    server.service.answer = EVERYTHING
    message = whole(server, "/api/chat", tools=TOOLS, think="low")["message"]
    ids = [call.pop("id") for call in message["tool_calls"]]
    assert message == {
        "role": "assistant",
        "content": "I look.\nDone.",
        "thinking": "Hm, é.",
        "tool_calls": [
            {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}},
            {"function": {"name": "get_time", "arguments": {}}},
        ],
    }
    assert len(set(ids)) == 2
    kwargs = server.service.templates[0][1]
    assert kwargs["tools"] == TOOLS
    assert (kwargs["reasoning_effort"], kwargs["enable_thinking"]) == ("low", True)


ANSWERS = {
    "text": "Yes.",
    "nothing": "",
    "spaced": "  Yes. ",
    "everything": EVERYTHING,
    "calls": f"{WEATHER}{TIME}",
    "thought": THOUGHT,
    "broken": WEATHER.replace('"Paris"', "Paris"),
}


@pytest.mark.parametrize("limit", [-1, 20])
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_stream_adds_up_to_the_whole_reply(server: LiveServer, answer: str, limit: int) -> None:
    server.service.answer = answer
    fields: dict[str, Any] = {"options": {"num_predict": limit}}
    for path, extra in (("/api/chat", {"tools": TOOLS}), ("/api/generate", {})):
        streamed = added_up(lines(server, path, **fields, **extra))
        assert without_ids(streamed) == without_ids(whole(server, path, **fields, **extra))


def test_a_call_comes_in_one_line(server: LiveServer) -> None:
    server.service.answer = WEATHER
    *news, _ = lines(server, "/api/chat", tools=TOOLS)
    (message,) = [line["message"] for line in news]
    (call,) = message["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"function": {"name": "get_weather", "arguments": {"city": "Paris"}}}


def test_options_reach_the_sampler(server: LiveServer) -> None:
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["END"],
        "num_predict": 5,
        "num_ctx": CONTEXT_LENGTH,
        "repeat_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "repeat_last_n": -1,
        "mirostat": 0,
        "num_gpu": 99,
    }
    for path in PATHS:
        reply = whole(server, path, options=options, keep_alive="5m")
        assert (reply["done_reason"], reply["eval_count"]) == ("length", 5)
        params = server.service.requests[-1].sampling_params
        assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, -1)
        assert (params.min_p, params.sampling_seed, params.stop) == (0.1, 7, ("END",))
        assert (params.repetition_penalty, params.presence_penalty) == (1.2, 0.3)
        assert (params.frequency_penalty, params.max_new_tokens) == (0.4, 5)
    for unlimited in ({}, {"num_predict": -2, "seed": -1}):
        whole(server, "/api/chat", options=unlimited)
        params = server.service.requests[-1].sampling_params
        assert (params.max_new_tokens, params.sampling_seed) == (None, None)
        assert (params.temperature, params.top_k) == (0.6, 20)  # the model's


def test_formats(server: LiveServer) -> None:
    server.service.answer = "{}"
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    for wanted, expected in (("json", {"type": "object"}), (schema, schema)):
        for fields in ({}, {"raw": True}):
            reply = whole(server, "/api/generate", format=wanted, **fields)
            assert reply["response"] == "{}"
            constraint = server.service.requests[-1].sampling_params.constraint
            assert constraint is not None
            assert (constraint.kind, json.loads(constraint.text)) == ("json_schema", expected)
    for nothing in ("", None):
        whole(server, "/api/chat", format=nothing)
        assert server.service.requests[-1].sampling_params.constraint is None


def test_prompts(server: LiveServer) -> None:
    whole(server, "/api/generate", system="Be brief.")
    assert server.service.templates[-1][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    num_rendered = len(server.service.templates)
    server.service.answer = f"{THOUGHT}{WEATHER}"
    reply = whole(server, "/api/generate", prompt="<s>Hi", raw=True)
    assert reply["response"] == server.service.answer
    assert reply["prompt_eval_count"] == len("\x01<s>Hi")  # as the tokenizer begins a text
    assert len(server.service.templates) == num_rendered
    assert added_up(lines(server, "/api/generate", prompt="<s>Hi", raw=True)) == reply
    assert server.service.requests[-1].sampling_params.max_new_tokens is None
    whole(server, "/api/generate", raw=True, options={"num_predict": 4, "top_k": 5})
    params = server.service.requests[-1].sampling_params
    assert (params.max_new_tokens, params.top_k) == (4, 5)


@pytest.mark.parametrize(
    ("think", "expected"),
    [
        (None, {}),
        (False, {"enable_thinking": False, "thinking": False}),
        (True, {"enable_thinking": True, "thinking": True}),
        ("high", {"enable_thinking": True, "thinking": True, "reasoning_effort": "high"}),
    ],
)
def test_thinking_goes_to_the_template(
    server: LiveServer, think: bool | str | None, expected: dict[str, Any]
) -> None:
    server.service.answer = f"{THOUGHT}Yes."
    for path in PATHS:
        reply = whole(server, path, think=think)
        assert reply.get("message", reply)["thinking"] == "Hm, é."
        kwargs = server.service.templates[-1][1]
        asked = ("enable_thinking", "thinking", "reasoning_effort")
        assert {name: kwargs[name] for name in asked if name in kwargs} == expected


def test_a_conversation_becomes_messages(server: LiveServer) -> None:
    function = {"name": "f", "arguments": {"a": 1}}
    whole(
        server,
        "/api/chat",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi", "images": []},
            {"role": "assistant", "thinking": "A", "tool_calls": [{"function": function}]},
            {"role": "tool", "content": "sun", "tool_name": "f"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "c2", "type": "function", "function": function}],
            },
            {"role": "tool", "content": "rain", "tool_call_id": "c2", "tool_name": ""},
            {"role": "assistant", "content": "Wet.", "tool_calls": None},
            {"role": "user", "content": None},
        ],
    )
    call = {"type": "function", "function": function}
    assert server.service.templates[-1][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "A",
            "thinking": "A",
            "tool_calls": [call],
        },
        {"role": "tool", "content": "sun", "name": "f"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c2", **call}]},
        {"role": "tool", "content": "rain", "tool_call_id": "c2"},
        {"role": "assistant", "content": "Wet."},
        {"role": "user", "content": ""},
    ]


def test_an_answer_that_is_aborted(server: LiveServer) -> None:
    server.service.refusals[""] = FinishReason("abort", status_code=499)
    for path in PATHS:
        assert whole(server, path)["done_reason"] == "abort"


def test_nothing_to_answer_loads_the_model(server: LiveServer) -> None:
    end = {"model": "m", "done": True, "done_reason": "load"}
    for is_stream in (True, False):
        for fields in ({"messages": []}, {"messages": ..., "keep_alive": 0}):
            reply = send(server, "/api/chat", stream=is_stream, **fields).json()
            reply.pop("created_at")
            assert reply == {"message": {"role": "assistant", "content": ""}, **end}
        reply = send(server, "/api/generate", prompt=..., stream=is_stream).json()
        reply.pop("created_at")
        assert reply == {"response": "", **end}
    assert server.service.requests == []


def test_any_type_of_body_is_read(server: LiveServer) -> None:
    body = json.dumps({"model": "m", "prompt": "Hi", "stream": False}).encode()
    reply = server.post_raw("/api/generate", body, "application/x-www-form-urlencoded")
    assert reply.json()["response"] == ANSWER


def test_the_model_is_told_of(server: LiveServer) -> None:
    (model,) = server.request("GET", "/api/tags").json()["models"]
    assert model.pop("modified_at").endswith("Z")
    details = {
        "parent_model": "",
        "format": "safetensors",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "",
        "quantization_level": "F32",
    }
    digest = model["digest"]
    assert re.fullmatch("[0-9a-f]{64}", digest)
    card = {"name": "tiny", "model": "tiny", "size": 100, "digest": digest, "details": details}
    assert model == card
    (running,) = server.request("GET", "/api/ps").json()["models"]
    assert running == {
        **card,
        "size_vram": 0,
        "expires_at": "9999-12-31T23:59:59Z",
        "context_length": CONTEXT_LENGTH,
    }
    own_client = {"system": "", "template": "", "options": None, "name": "", "verbose": False}
    bodies = ({"model": "tiny"}, {"model": "tiny:latest", **own_client}, {"name": "tiny"})
    for body in bodies:
        shown = server.post("/api/show", body).json()
        assert shown["details"] == details
        assert shown["capabilities"] == ["completion", "tools", "thinking"]
        assert shown["parameters"] == "temperature 0.6\ntop_k 20"
        info = shown["model_info"]
        assert info["general.architecture"] == "llama"
        assert (info["llama.context_length"], info["llama.block_count"]) == (CONTEXT_LENGTH, 1)
    reply = server.post("/api/show", {"model": "other"})
    assert (reply.status_code, reply.json()) == (404, {"error": "model 'other' not found"})
    assert server.request("GET", "/api/version").json() == {"version": "0.12.0"}


def test_paths_can_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {"chat": "/ollama/chat", "generate": "/generate", "root": "/"}
    environ = Environ.from_os({f"SGLANG_OLLAMA_{k.upper()}_ROUTE": p for k, p in changed.items()})
    monkeypatch.setattr("srt.entrypoints.fake_service.Environ", lambda **_: environ)
    with LiveServer(tmp_path) as server:
        assert server.request("GET", "/").text == "Ollama is running"
        assert server.request("HEAD", "/").status_code == 200
        body = {"model": "m", "messages": ASK, "stream": False}
        assert server.post("/ollama/chat", body).json()["message"]["content"] == ANSWER
        assert server.post("/ollama/chat", {}).json() == {
            "error": "Invalid value for 'model': it is missing."
        }
        assert server.post("/api/chat", body).status_code == 404
        assert server.request("GET", "/api/tags").status_code == 200
        reply = server.post("/generate", {"model": "m", "prompt": "Hi", "stream": False})
        assert reply.json()["response"] == ANSWER
