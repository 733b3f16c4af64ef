"""Ollama's API through the ollama package, whose types every reply has to fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from sglang.srt.entrypoints.ollama.ollama_fields import (
    OLLAMA_CHAT_FIELDS,
    OLLAMA_GENERATE_FIELDS,
    OPTION_FIELDS,
)
from srt.entrypoints.fake_service import ANSWER, CONTEXT_LENGTH, LiveServer
from srt.entrypoints.ollama.ollama_client import ASK, EVERYTHING, TOOLS

ollama = pytest.importorskip("ollama")


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("ollama")
    with LiveServer(directory, tool_call_parser="hermes", reasoning_parser="qwen3") as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[Any]:
    with ollama.Client(host=server.url) as one:
        yield one


def test_a_chat_with_tools(client: Any, server: LiveServer) -> None:
    server.service.answer = EVERYTHING
    reply = client.chat(model="m", messages=ASK, tools=TOOLS, think=True)
    assert (reply.message.content, reply.message.thinking) == ("I look.\nDone.", "Hm, é.")
    weather, time = reply.message.tool_calls
    assert weather.function.arguments == {"city": "Paris"}
    assert (time.function.name, reply.done_reason) == ("get_time", "stop")
    server.service.answer = "Sunny."
    result = {"role": "tool", "content": "sun", "tool_name": "get_weather"}
    again = client.chat(model="m", messages=[*ASK, reply.message, result], tools=TOOLS)
    assert again.message.content == "Sunny."
    sent = server.service.templates[-1][0]
    assert [m["role"] for m in sent] == ["user", "assistant", "tool"]
    assert sent[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}


def test_streams(client: Any, server: LiveServer) -> None:
    chunks = list(client.chat(model="m", messages=ASK, stream=True))
    assert "".join(chunk.message.content for chunk in chunks) == ANSWER
    assert chunks[-1].done
    assert chunks[-1].eval_count == len(ANSWER)
    pieces = list(client.generate(model="m", prompt="Hi", stream=True, options={"num_predict": 5}))
    assert "".join(piece.response for piece in pieces) == "Paris"
    assert (pieces[-1].done_reason, pieces[-1].eval_count) == ("length", 5)


def test_a_prompt_with_a_schema(client: Any, server: LiveServer) -> None:
    server.service.answer = '{"name": "Oslo"}'
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    reply = client.generate(model="m", prompt="Hi", format=schema, system="Be brief.")
    assert json.loads(reply.response) == {"name": "Oslo"}


def test_the_model(client: Any) -> None:
    (model,) = client.list().models
    assert (model.model, model.details.family) == ("tiny", "llama")
    shown = client.show("tiny")
    assert shown.modelinfo["llama.context_length"] == CONTEXT_LENGTH
    assert "tools" in shown.capabilities
    (running,) = client.ps().models
    assert running.context_length == CONTEXT_LENGTH


def test_errors(client: Any, server: LiveServer) -> None:
    with pytest.raises(ollama.ResponseError, match="not found") as error:
        client.show("other")
    assert error.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="takes text only"):
        client.generate(model="m", prompt="Hi", images=[b"x"])
    server.service.fail_at[""] = 3
    with pytest.raises(ollama.ResponseError, match="died"):
        list(client.chat(model="m", messages=ASK, stream=True))


def test_every_field_of_the_api_is_known() -> None:
    types = ollama._types
    for table, request in (
        (OLLAMA_CHAT_FIELDS, types.ChatRequest),
        (OLLAMA_GENERATE_FIELDS, types.GenerateRequest),
        (OPTION_FIELDS, types.Options),
    ):
        known = table.served | table.accepted | set(table.refused)
        assert set(request.model_fields) - known == set()
