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


def test_token_ids_are_shown_when_asked(server: LiveServer) -> None:
    answer = [ord(char) for char in ANSWER[:3]]
    body = {"prompt": ["Hi", "a"], "max_tokens": 3, "n": 2}
    prompts = [[1, 72, 105], [1, 72, 105], [1, 97], [1, 97]]
    both = server.post("/v1/completions", {**body, "return_token_ids": True}).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in both] == prompts
    assert [choice["token_ids"] for choice in both] == [answer] * 4
    one = server.post("/v1/completions", {**body, "return_prompt_token_ids": True}).json()
    assert [choice["prompt_token_ids"] for choice in one["choices"]] == prompts
    assert all("token_ids" not in choice for choice in one["choices"])
    none = server.post("/v1/completions", body).json()["choices"]
    assert not any({"token_ids", "prompt_token_ids"} & choice.keys() for choice in none)
    known = server.post("/v1/completions", {"prompt": [5, 6], "return_token_ids": True}).json()
    assert known["choices"][0]["prompt_token_ids"] == [5, 6]


def test_token_ids_of_a_stream_come_with_their_text(server: LiveServer) -> None:
    body = {"prompt": ["Hi", "a"], "max_tokens": 3, "return_token_ids": True}
    firsts, texts = {}, {0: "", 1: ""}
    for event in server.events("/v1/completions", body):
        (choice,) = event["choices"]
        firsts.setdefault(choice["index"], choice)
        assert ("prompt_token_ids" in choice) == (choice is firsts[choice["index"]])
        assert "".join(map(chr, choice["token_ids"])) == choice["text"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: ANSWER[:3], 1: ANSWER[:3]}
    assert [firsts[index]["prompt_token_ids"] for index in (0, 1)] == [[1, 72, 105], [1, 97]]


def test_a_replica_can_be_named_as_for_generate(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "x"}]
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": messages}),
        ("/generate", {"text": "x"}),
    ):
        server.service.requests.clear()
        for fields in ({}, {"data_parallel_rank": 0}, {"routed_dp_rank": 0}):
            assert server.post(path, {**body, **fields}).status_code == 200
        assert [one.routed_dp_rank for one in server.service.requests] == [None, 0, 0]
        assert server.post(path, {**body, "routed_dp_rank": 1}).status_code == 400
