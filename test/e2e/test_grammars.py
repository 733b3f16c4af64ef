"""Structured outputs of a real server with the demo model, through real clients."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

from e2e.server_process import ServerProcess

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ASK: list[dict[str, str]] = [{"role": "user", "content": "Describe a person as JSON."}]


def check_person(text: str) -> None:
    person = json.loads(text)
    assert list(person) == ["name", "age", "tags"]
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 20
    assert 0 <= person["age"] <= 150
    assert set(person["tags"]) <= {"a", "b"}


def format_of(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "p", "schema": schema, "strict": True}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_holds_through_openai(client: openai.OpenAI, stream: bool) -> None:
    for temperature in (0.0, 1.0):
        reply: Any = client.chat.completions.create(
            model="default",
            messages=ASK,  # type: ignore[arg-type]
            temperature=temperature,
            seed=4,
            max_tokens=160,
            response_format=format_of(PERSON),
            stream=stream,
        )
        if stream:
            chunks = [chunk.choices[0] for chunk in reply]
            text = "".join(chunk.delta.content or "" for chunk in chunks)
            finish = chunks[-1].finish_reason
        else:
            text, finish = reply.choices[0].message.content, reply.choices[0].finish_reason
        assert finish == "stop", text
        check_person(text)


def test_any_object_and_several_choices(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="default",
        messages=ASK,  # type: ignore[arg-type]
        temperature=0.8,
        seed=3,
        n=3,
        max_tokens=200,
        response_format={"type": "json_object"},
    )
    ended = [choice for choice in reply.choices if choice.finish_reason == "stop"]
    assert ended
    for choice in ended:
        assert isinstance(json.loads(choice.message.content or ""), dict)


def test_regex_and_ebnf(client: openai.OpenAI, server: ServerProcess) -> None:
    reply = client.completions.create(
        model="default",
        prompt="My telephone number is",
        max_tokens=30,
        temperature=0,
        extra_body={"regex": r" \d{3}-\d{4}"},
    )
    assert re.fullmatch(r" \d{3}-\d{4}", reply.choices[0].text)
    said = generate(server, "Is the sky blue?", ebnf='root ::= " " ("yes" | "no") "!"')
    assert said["text"] in (" yes!", " no!")
    assert said["meta_info"]["finish_reason"]["type"] == "stop"


def generate(server: ServerProcess, text: str, **params: Any) -> Any:
    params = {"temperature": 0, "max_new_tokens": 32, **params}
    reply = server.post("/generate", {"text": text, "sampling_params": params})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_log_probabilities_are_of_what_may_follow(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="default",
        messages=ASK,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=160,
        logprobs=True,
        top_logprobs=2,
        response_format=format_of(PERSON),
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    content = logprobs.content or []
    assert content[0].token.startswith("{")
    forced = next(item for item in content if item.token.endswith("name"))
    assert forced.logprob == 0.0
    assert forced.top_logprobs[1].logprob == -9999.0  # JSON has no minus infinity


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"json_schema": '{"type": "thing"}'}, "Invalid type"),
        ({"regex": "a", "ebnf": "b"}, "Only one constraint"),
        ({"ebnf": "root := a"}, "ebnf cannot be served"),
    ],
)
def test_a_broken_constraint_is_a_400(
    server: ServerProcess, fields: dict[str, str], reason: str
) -> None:
    for stream in (False, True):
        body = {"text": "a", "sampling_params": fields, "stream": stream}
        reply = httpx.post(f"{server.url}/generate", json=body, timeout=60)
        assert reply.status_code == 400
        assert reason in reply.json()["error"]["message"]
    assert generate(server, "a", regex="b+", max_new_tokens=2)["text"].startswith("b")
