"""/v1/completions through the openai package and raw HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from srt.entrypoints.fake_service import ANSWER, LiveServer


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as one:
        yield one


def test_reply_through_the_client(client: openai.OpenAI, server: LiveServer) -> None:
    reply = client.completions.create(model="any", prompt="Hi")
    assert reply.object == "text_completion"
    assert reply.choices[0].text == ANSWER[:16]  # OpenAI's default of max_tokens
    assert reply.choices[0].finish_reason == "length"
    assert reply.choices[0].logprobs is None
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 16)
    assert server.service.requests[0].text == "Hi"
    assert server.service.requests[0].add_special_tokens


@pytest.mark.parametrize(
    ("prompt", "prompt_tokens"),
    [("Hi", [3]), (["Hi", "a"], [3, 2]), ([5, 6, 7, 8], [4]), ([[5], [6, 7]], [1, 2])],
)
def test_prompts_in_four_forms(
    client: openai.OpenAI, server: LiveServer, prompt: Any, prompt_tokens: list[int]
) -> None:
    reply = client.completions.create(model="any", prompt=prompt, max_tokens=2, n=2)
    assert [c.index for c in reply.choices] == list(range(2 * len(prompt_tokens)))
    assert {c.text for c in reply.choices} == {ANSWER[:2]}
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(prompt_tokens)
    assert reply.usage.completion_tokens == 4 * len(prompt_tokens)


def test_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="any",
        prompt="Hi",
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert [c.choices[0].text for c in chunks[:-1]] == list(ANSWER[:3])
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None, None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 6


def test_stream_of_a_batch(server: LiveServer) -> None:
    body = {"model": "m", "prompt": ["a", "b"], "max_tokens": 2, "echo": True}
    events = server.events("/v1/completions", body)
    texts = ["", ""]
    for one in events:
        texts[one["choices"][0]["index"]] += one["choices"][0]["text"]
    assert texts == ["a" + ANSWER[:2], "b" + ANSWER[:2]]


def test_echo_with_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="any", prompt="Hi", max_tokens=2, echo=True, logprobs=2)
    choice = reply.choices[0]
    assert choice.text == "Hi" + ANSWER[:2]
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["\x01", "H", "i", "P", "a"]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.5, 0.0, 0.0]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.top_logprobs[1] == {"A": 0.0, "B": -1.0}


def test_echo_of_ids_and_of_the_prompt_alone(server: LiveServer) -> None:
    body = {"model": "m", "prompt": [72, 105], "max_tokens": 0, "echo": True, "logprobs": 0}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"] == "Hi"
    assert choice["logprobs"]["tokens"] == ["H", "i"]
    assert choice["logprobs"]["top_logprobs"] is None


def test_logprobs_of_a_stream_run_on(server: LiveServer) -> None:
    body = {"model": "m", "prompt": "Hi", "max_tokens": 3, "logprobs": 1, "echo": True}
    events = server.events("/v1/completions", body)
    offsets = [o for e in events for o in e["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == [0, 1, 2, 3, 4, 5]


def test_stop_reason_is_reported(server: LiveServer) -> None:
    server.service.answer = "ab"
    choice = server.post("/v1/completions", {"model": "m", "prompt": "x"}).json()["choices"][0]
    assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", 2)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [[1], 2]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": True}, "prompt"),
        ({"prompt": [-1]}, "-1"),
        ({"prompt": [4096]}, "4096"),
        ({"prompt": [2**31]}, "2147483648"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 5000}, "top_logprobs_num"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": 600}, "context length"),
        ({"structural_tag": "a"}, "structural_tag is not valid JSON"),
        ({"structural_tag": "{}", "regex": "a"}, "regex and structural_tag"),
        ({"regex": "a", "ebnf": "b"}, "regex and ebnf"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"json_schema": "[]"}, "json_schema must be a JSON object"),
    ],
)
def test_bad_fields_are_named(server: LiveServer, fields: dict[str, Any], named: str) -> None:
    reply = server.post("/v1/completions", {"model": "m", "prompt": "x", **fields})
    assert reply.status_code == 400
    assert named in reply.json()["message"]
