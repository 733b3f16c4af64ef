"""/v1/chat/completions through the openai package and raw HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from sglang.srt.managers.io_struct import FinishReason
from srt.entrypoints.fake_service import ANSWER, LiveServer

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as one:
        yield one


def chat(server: LiveServer, **fields: Any) -> Any:
    return server.post("/v1/chat/completions", {"model": "m", "messages": HELLO, **fields})


def test_reply_through_the_client(client: openai.OpenAI, server: LiveServer) -> None:
    reply = client.chat.completions.create(model="default", messages=HELLO)
    assert reply.model == "default"
    assert reply.object == "chat.completion"
    choice = reply.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"
    assert reply.usage is not None
    prompt = len("<user>Hello")
    assert reply.usage.prompt_tokens == prompt
    assert reply.usage.completion_tokens == len(ANSWER)
    assert reply.usage.total_tokens == prompt + len(ANSWER)
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    sent = server.service.requests[0]
    assert sent.text == "<user>Hello"
    assert not sent.add_special_tokens
    assert sent.sampling_params.max_new_tokens is None


def test_reply_has_every_field_of_the_shape(server: LiveServer) -> None:
    body = chat(server, max_tokens=2, rid="r").json()
    assert body.pop("created") > 1_600_000_000
    assert body == {
        "id": "r",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": ANSWER[:2],
                    "reasoning_content": None,
                    "tool_calls": None,
                },
                "logprobs": None,
                "finish_reason": "length",
                "matched_stop": None,
            }
        ],
        "usage": {
            "prompt_tokens": 11,
            "completion_tokens": 2,
            "total_tokens": 13,
            "reasoning_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
        "metadata": {"weight_version": "default"},
    }


def test_model_defaults_fill_in_what_is_left_out(server: LiveServer) -> None:
    chat(server)
    chat(server, temperature=0, top_k=5)
    first, second = (r.sampling_params for r in server.service.requests)
    assert (first.temperature, first.top_k, first.top_p) == (0.6, 20, 1.0)
    assert (second.temperature, second.top_k) == (0.0, 5)


def test_openai_defaults_ignore_the_models(tmp_path: Any) -> None:
    with LiveServer(tmp_path, sampling_defaults="openai") as server:
        chat(server)
        params = server.service.requests[0].sampling_params
    assert (params.temperature, params.top_k) == (1.0, -1)


def test_fields_reach_the_sampling_parameters(server: LiveServer) -> None:
    reply = chat(
        server,
        max_completion_tokens=5,
        max_tokens=9,
        min_tokens=1,
        stop="x",
        seed=4,
        logit_bias={"70": -3},
        ignore_eos=True,
        stop_token_ids=[9],
        top_p=0.5,
        min_p=0.2,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        presence_penalty=-0.1,
        user="u",
        metadata={"a": "b"},
        unknown_extension={"x": 1},
        tool_choice="auto",
        tools=[],
        response_format={"type": "text"},
        parallel_tool_calls=True,
    )
    assert reply.status_code == 200, reply.text
    params = server.service.requests[0].sampling_params
    assert (params.max_new_tokens, params.min_new_tokens, params.stop) == (5, 1, ("x",))
    assert (params.sampling_seed, params.logit_bias, params.ignore_eos) == (4, {70: -3.0}, True)
    assert (params.top_p, params.min_p, params.repetition_penalty) == (0.5, 0.2, 1.2)
    assert (params.frequency_penalty, params.presence_penalty) == (0.1, -0.1)
    assert params.stop_token_ids == (9,)


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "regex": "", "ebnf": None}, None),
        ({"response_format": {"type": "json_object"}}, ("json_schema", '{"type": "object"}')),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "strict": True, "schema": {"b": 1, "a": [2]}},
                }
            },
            ("json_schema", '{"b":1,"a":[2]}'),  # as the client wrote it: the order counts
        ),
        ({"regex": "a+"}, ("regex", "a+")),
        ({"ebnf": 'root ::= "a"'}, ("ebnf", 'root ::= "a"')),
        ({"json_schema": "{}"}, ("json_schema", "{}")),
        ({"structural_tag": '{"format": 1}'}, ("structural_tag", '{"format": 1}')),
        (
            {"response_format": {"type": "structural_tag", "format": {"b": 1, "a": [2]}}},
            ("structural_tag", '{"format": {"b":1,"a":[2]}}'),
        ),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "structures": [{"begin": "é", "schema": {}, "end": ""}],
                    "triggers": ["é"],
                }
            },
            (
                "structural_tag",
                '{"structures": [{"begin":"é","schema":{},"end":""}], "triggers": ["é"]}',
            ),
        ),
    ],
)
def test_a_constraint_arrives(
    server: LiveServer, fields: dict[str, Any], constraint: tuple[str, str] | None
) -> None:
    reply = chat(server, **fields)
    assert reply.status_code == 200, reply.text
    found = server.service.requests[0].sampling_params.constraint
    assert (None if found is None else (found.kind, found.text)) == constraint


def test_messages_are_flattened_for_the_template(server: LiveServer) -> None:
    messages = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "done", "tool_call_id": "1"},
        {"role": "assistant", "content": "So"},
    ]
    kwargs = {"enable_thinking": False}
    fields = {"continue_final_message": True, "reasoning_effort": "low"}
    reply = chat(server, messages=messages, chat_template_kwargs=kwargs, **fields)
    assert reply.status_code == 200, reply.text
    seen, options = server.service.templates[0]
    assert seen[0]["content"] == "a\nb"
    assert seen[1]["content"] == ""
    assert seen[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert options == {
        "add_generation_prompt": True,
        "continue_final_message": True,
        "enable_thinking": False,
        "reasoning_effort": "low",
    }


def test_stream_through_the_client(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="default", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == ANSWER
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons == [None] * (len(ANSWER) + 1) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(ANSWER)
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_stream_without_usage_ends_with_the_reason(server: LiveServer) -> None:
    body = {"model": "m", "messages": HELLO, "max_tokens": 1}
    events = server.events("/v1/chat/completions", body)
    assert [e["choices"][0]["finish_reason"] for e in events] == [None, None, "length"]
    assert events[-1]["choices"][0]["delta"] == {}


def test_continuous_usage(server: LiveServer) -> None:
    body = {"model": "m", "messages": HELLO, "max_tokens": 2}
    options = {"stream_options": {"continuous_usage_stats": True}}
    events = server.events("/v1/chat/completions", {**body, **options})
    assert [e["usage"]["completion_tokens"] for e in events] == [1, 1, 2, 2]


def test_choices_of_a_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="d", messages=HELLO, stream=True, n=3)
    texts = {0: "", 1: "", 2: ""}
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == dict.fromkeys(range(3), ANSWER)


def test_choices_and_usage_of_n(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="d", messages=HELLO, n=2, max_tokens=3)
    assert [c.index for c in reply.choices] == [0, 1]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (11, 6)


def test_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model="d", messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=9
    )
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content
    assert content is not None
    assert "".join(item.token for item in content) == ANSWER[:9]
    assert content[8].bytes == list("é".encode())
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("A", 0.0), ("B", -1.0)]


def test_logprobs_of_a_stream(server: LiveServer) -> None:
    body = {"model": "m", "messages": HELLO, "max_tokens": 2, "logprobs": True}
    events = server.events("/v1/chat/completions", body)
    shown = [e["choices"][0]["logprobs"] for e in events]
    assert shown[0] is None
    assert [one["content"][0]["token"] for one in shown[1:3]] == list(ANSWER[:2])
    assert shown[3] is None


def test_an_engine_abort_is_an_error(client: openai.OpenAI, server: LiveServer) -> None:
    server.service.refusals[""] = FinishReason("abort", message="full", status_code=503)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="d", messages=HELLO)
    assert caught.value.status_code == 503
    with pytest.raises(openai.InternalServerError):
        list(client.chat.completions.create(model="d", messages=HELLO, stream=True))


def test_an_error_inside_a_stream(server: LiveServer) -> None:
    server.service.fail_at[""] = 1
    events = server.events("/v1/chat/completions", {"model": "m", "messages": HELLO})
    assert events[-1] == {
        "error": {
            "object": "error",
            "message": "The scheduler process died.",
            "type": "ServiceUnavailable",
            "param": None,
            "code": 503,
        }
    }


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [1]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "god", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "chat template"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n must be"),
        ({"n": 1000}, "n must be"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "json_schema must be a JSON object",
        ),
        ({"functions": [{}]}, "functions"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1e9}}, "logit_bias of token 5 must be in [-1e6, 1e6]"),
        ({"stop": [""]}, "stop"),
        ({"stream_options": 5}, "stream_options"),
        ({"rid": ""}, "rid"),
    ],
)
def test_bad_fields_are_named(server: LiveServer, fields: dict[str, Any], named: str) -> None:
    for stream in (False, True):
        reply = chat(server, stream=stream, **fields)
        assert reply.status_code == 400
        body = reply.json()
        assert named in body["message"]
        assert (body["object"], body["param"], body["code"]) == ("error", None, 400)


PROMPT_IDS = [ord(char) for char in "<user>Hello"]


def test_token_ids_are_shown_when_asked(server: LiveServer) -> None:
    (choice,) = chat(server, return_token_ids=True).json()["choices"]
    assert choice["token_ids"] == [ord(char) for char in ANSWER]
    assert choice["prompt_token_ids"] == PROMPT_IDS
    (choice,) = chat(server, return_prompt_token_ids=True).json()["choices"]
    assert choice["prompt_token_ids"] == PROMPT_IDS
    assert "token_ids" not in choice


@pytest.mark.parametrize("parses", [False, True])
def test_no_token_id_of_a_stream_is_lost(tmp_path: Any, parses: bool) -> None:
    """Also where a parser holds text back."""
    body = {"model": "m", "messages": HELLO, "return_token_ids": True}
    answer = "<think>Hm.</think>Yes." if parses else ANSWER
    with LiveServer(tmp_path, reasoning_parser="qwen3" if parses else None) as other:
        other.service.answer = answer
        choices = [one["choices"][0] for one in other.events("/v1/chat/completions", body)]
    assert choices[0]["delta"]["role"] == "assistant"
    assert choices[0]["prompt_token_ids"] == PROMPT_IDS
    assert all("prompt_token_ids" not in choice for choice in choices[1:])
    ids = [token for choice in choices for token in choice.get("token_ids", ())]
    assert "".join(map(chr, ids)) == answer
