"""/v1/messages through the anthropic package, whose types every reply and event has to fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from sglang.srt.entrypoints.anthropic.messages_fields import (
    COUNT_FIELDS,
    MESSAGES_FIELDS,
    TOOL_FIELDS,
)
from srt.entrypoints.anthropic.messages_client import ASK, EVERYTHING, THOUGHT, TOOLS, WEATHER
from srt.entrypoints.fake_service import LiveServer

anthropic = pytest.importorskip("anthropic")


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("anthropic")
    with LiveServer(
        directory, tool_call_parser="hermes", reasoning_parser="qwen3", api_key="secret"
    ) as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as one:
        yield one


FIELDS: dict[str, Any] = {"model": "m", "max_tokens": 200, "messages": ASK}


def test_a_message(client: Any, server: LiveServer) -> None:
    server.service.answer = EVERYTHING
    message = client.messages.create(**FIELDS, tools=TOOLS)
    assert [block.type for block in message.content] == [
        *("thinking", "text", "tool_use", "tool_use", "text")
    ]
    assert (message.content[2].name, message.content[2].input) == ("get_weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use"
    again = [*ASK, {"role": "assistant", "content": message.content}]
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "sun"}
        for block in message.content
        if block.type == "tool_use"
    ]
    server.service.answer = "Sunny."
    more = client.messages.create(
        **{**FIELDS, "messages": [*again, {"role": "user", "content": results}]}, tools=TOOLS
    )
    assert more.content[0].text == "Sunny."
    sent = server.service.templates[-1][0]
    assert [m["role"] for m in sent] == ["user", "assistant", "tool", "tool"]
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"]


def test_the_packages_own_accumulator_reads_the_stream(client: Any, server: LiveServer) -> None:
    server.service.answer = EVERYTHING
    with client.messages.stream(**FIELDS, tools=TOOLS) as events:
        text = "".join(event.text for event in events if event.type == "text")
        final = events.get_final_message()
    assert text == "I look.\nDone."
    assert [block.type for block in final.content] == [
        *("thinking", "text", "tool_use", "tool_use", "text")
    ]
    assert final.content[0].thinking == "Hm, é."
    assert final.content[2].input == {"city": "Paris"}
    assert final.stop_reason == "tool_use"
    assert final.usage.output_tokens == len(EVERYTHING)
    assert final.usage.output_tokens_details.thinking_tokens == len(THOUGHT)


def test_every_event_has_the_packages_type(client: Any, server: LiveServer) -> None:
    server.service.answer = f"I look.{WEATHER}"
    kinds = [event.type for event in client.messages.create(**FIELDS, tools=TOOLS, stream=True)]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    message = {k: v for k, v in create_raw(server).items() if k != "id"}
    anthropic.types.Message.model_validate({"id": "msg_1", **message}, strict=True)


def create_raw(server: LiveServer) -> dict[str, Any]:
    reply = server.request(
        "POST", "/v1/messages", json={**FIELDS, "tools": TOOLS}, headers={"x-api-key": "secret"}
    )
    found: dict[str, Any] = json.loads(reply.text)
    return found


def test_counting(client: Any, server: LiveServer) -> None:
    counted = client.messages.count_tokens(model="m", messages=ASK, system="Be brief.")
    assert counted.input_tokens == len("<system>Be brief.<user>Hi")


def test_errors_have_the_packages_classes(client: Any, server: LiveServer) -> None:
    with pytest.raises(anthropic.BadRequestError, match="no tools to choose from"):
        client.messages.create(**FIELDS, tool_choice={"type": "any"})
    server.service.fail_at[""] = 0
    with pytest.raises(anthropic.InternalServerError, match="died"):
        client.messages.create(**FIELDS)
    server.service.fail_at[""] = 3
    with (
        pytest.raises(anthropic.APIStatusError, match="died"),
        client.messages.stream(**FIELDS) as events,
    ):
        events.get_final_message()
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError),
    ):
        other.messages.create(**FIELDS)


def test_every_field_of_the_api_is_known() -> None:
    types = anthropic.types
    for table, params in (
        (MESSAGES_FIELDS, types.message_create_params.MessageCreateParamsBase),
        (COUNT_FIELDS, types.MessageCountTokensParams),
        (TOOL_FIELDS, types.ToolParam),
    ):
        known = table.served | table.accepted | set(table.refused)
        assert set(params.__annotations__) - known == set()
