"""The demo model thinks, then answers as it must: it is shown how, through a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from e2e.server_process import ServerProcess, running_server

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{1,12}$"}},
    "required": ["city"],
    "additionalProperties": False,
}


def asked(country: str) -> dict[str, Any]:
    return {"role": "user", "content": f"The capital of {country}?"}


def told(country: str, city: str) -> dict[str, Any]:
    thought = f"<think>The capital of {country} is {city}.</think>"
    return {"role": "assistant", "content": f'{thought}{{"city": "{city}"}}'}


CAPITALS = {"Italy": "Rome", "Norway": "Oslo", "Spain": "Madrid", "Japan": "Tokyo"}
CHAT: list[Any] = [
    *(one for land, city in CAPITALS.items() for one in (asked(land), told(land, city))),
    asked("France"),
]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "locate", "parameters": CITY}}]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server("--dtype", "float32", "--reasoning-parser", "qwen3") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120) as made:
        yield made


def check_reasoning(text: str) -> None:
    assert "capital of France" in text
    assert "<think>" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_free_and_the_answer_is_not(client: openai.OpenAI, stream: bool) -> None:
    reply: Any = client.chat.completions.create(
        model="default",
        messages=CHAT,
        temperature=0,
        max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "c", "schema": CITY}},
        stream=stream,
    )
    if stream:
        deltas = [chunk.choices[0].delta for chunk in reply]
        content = "".join(delta.content or "" for delta in deltas)
        thought = "".join(delta.model_extra.get("reasoning_content") or "" for delta in deltas)
    else:
        message = reply.choices[0].message
        content, thought = message.content, message.model_extra["reasoning_content"]
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.completion_tokens_details.reasoning_tokens > 5
    check_reasoning(thought)
    assert json.loads(content) == {"city": "Paris"}


def test_reasoning_comes_before_a_forced_call(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="default",
        messages=CHAT,
        tools=TOOLS,
        tool_choice="required",
        temperature=0,
        max_tokens=120,
    )
    (choice,) = reply.choices
    assert choice.finish_reason == "tool_calls"
    check_reasoning((choice.message.model_extra or {})["reasoning_content"])
    (call, *_) = choice.message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments).keys() == {"city"}


def test_several_answers_each_end_their_own_reasoning(client: openai.OpenAI) -> None:
    reply: Any = client.chat.completions.create(
        model="default",
        messages=CHAT,
        temperature=0.7,
        seed=5,
        n=4,
        max_tokens=80,
        extra_body={"regex": "[A-Z][a-z]+"},
    )
    ended = [choice for choice in reply.choices if choice.finish_reason == "stop"]
    assert ended
    for choice in ended:
        assert re.fullmatch("[A-Z][a-z]+", choice.message.content)


def test_generate_says_whether_there_is_reasoning(server: ServerProcess) -> None:
    """A prompt without an example goes on for as long as it may: the end of text is hidden."""
    params = {"temperature": 0, "max_new_tokens": 24, "regex": "[0-9]{3}"}
    body = {"text": "<think>", "sampling_params": params, "require_reasoning": True}
    free = server.post("/generate", body).json()
    assert free["meta_info"]["finish_reason"] == {"type": "length", "length": 24}
    assert free["meta_info"]["reasoning_tokens"] == 24
    assert not re.match("[0-9]{3}", free["text"])
    held = server.post("/generate", {**body, "require_reasoning": False}).json()
    assert re.fullmatch("[0-9]{3}", held["text"])


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_ends_when_its_budget_is_used_up(client: openai.OpenAI, stream: bool) -> None:
    reply: Any = client.chat.completions.create(
        model="default",
        messages=CHAT,
        temperature=0,
        max_tokens=40,
        n=2,
        stream=stream,
        extra_body={"max_thinking_tokens": 3, "continue_final_message": False},
        stream_options={"include_usage": True} if stream else openai.omit,
    )
    texts = [["", ""], ["", ""]]
    for part in reply if stream else [reply]:
        for choice in part.choices:
            message: Any = choice.delta if stream else choice.message
            thought = (message.model_extra or {}).get("reasoning_content")
            texts[choice.index][0] += thought or ""
            texts[choice.index][1] += message.content or ""
        usage = part.usage or None
    assert texts[0] == texts[1]
    assert texts[0][0] == "The capital of"
    assert texts[0][1]
    assert usage is not None
    free = client.chat.completions.create(
        model="default", messages=CHAT, temperature=0, max_tokens=40
    )
    assert len((free.choices[0].message.model_extra or {})["reasoning_content"]) > 20
