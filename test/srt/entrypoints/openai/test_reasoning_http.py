"""Reasoning through the openai package and raw HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from srt.entrypoints.fake_service import LiveServer

ASK: list[Any] = [{"role": "user", "content": "Well?"}]
THOUGHT = "<think>\nHm, é.\n</think>"
ANSWER = f"{THOUGHT}\n\nYes."


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("think"), reasoning_parser="qwen3") as server:
        yield server


@pytest.fixture
def thinking(server: LiveServer) -> LiveServer:
    server.service.answer = ANSWER
    return server


def chat(server: LiveServer, **fields: Any) -> Any:
    reply = server.post("/v1/chat/completions", {"model": "m", "messages": ASK, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


def deltas(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    body = {"model": "m", "messages": ASK, **fields}
    events = server.events("/v1/chat/completions", body)
    return [event["choices"][0]["delta"] for event in events]


def test_reasoning_is_apart_and_counted(thinking: LiveServer) -> None:
    with openai.OpenAI(base_url=thinking.url + "/v1", api_key="none", max_retries=0) as client:
        reply = client.chat.completions.create(model="d", messages=ASK)
    message = reply.choices[0].message
    assert message.content == "Yes."
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"] == "Hm, é."
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(ANSWER)
    details = reply.usage.completion_tokens_details
    assert details is not None
    # One token is one character here; "<think>" shows with its last one, and counts.
    assert details.reasoning_tokens == len(THOUGHT)
    assert reply.usage.model_extra is not None
    assert reply.usage.model_extra["reasoning_tokens"] == details.reasoning_tokens


def test_a_stream_sends_reasoning_while_it_comes(thinking: LiveServer) -> None:
    parts = deltas(thinking)
    reasoning = [delta["reasoning_content"] for delta in parts if "reasoning_content" in delta]
    assert "".join(reasoning) == "Hm, é."
    assert len(reasoning) > 3
    assert "".join(delta.get("content") or "" for delta in parts) == "Yes."


def test_a_stream_may_send_reasoning_at_its_end(thinking: LiveServer) -> None:
    parts = deltas(thinking, stream_reasoning=False)
    assert [delta["reasoning_content"] for delta in parts if "reasoning_content" in delta] == [
        "Hm, é."
    ]
    thinking.service.answer = "<think>\nNever done"
    last = deltas(thinking, stream_reasoning=False)[-2:]
    assert last == [{"reasoning_content": "Never done"}, {}]


def test_usage_of_a_stream_counts_reasoning(thinking: LiveServer) -> None:
    body = {"model": "m", "messages": ASK, "n": 2, "stream_options": {"include_usage": True}}
    usage = thinking.events("/v1/chat/completions", body)[-1]["usage"]
    assert usage["reasoning_tokens"] == 2 * len(THOUGHT)
    assert usage["completion_tokens_details"] == {"reasoning_tokens": usage["reasoning_tokens"]}


def test_reasoning_need_not_be_separated(thinking: LiveServer) -> None:
    reply = chat(thinking, separate_reasoning=False)
    message = reply["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (ANSWER, None)
    assert reply["usage"]["reasoning_tokens"] > 0
    parts = deltas(thinking, separate_reasoning=False)
    assert "".join(delta.get("content") or "" for delta in parts) == ANSWER


def test_reasoning_that_is_not_separated_leaves_calls(tmp_path: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = '<tool_call>{"name": "f"}</tool_call>'
    with LiveServer(tmp_path, reasoning_parser="qwen3", tool_call_parser="qwen25") as server:
        server.service.answer = f"<think>{call}</think>\n{call}"
        reply = chat(server, separate_reasoning=False, tools=tools)
        parts = deltas(server, separate_reasoning=False, tools=tools)
    message = reply["choices"][0]["message"]
    assert message["content"] == f"<think>{call}</think>\n"
    assert len(message["tool_calls"]) == 1
    assert "".join(delta.get("content") or "" for delta in parts) == message["content"]


def test_the_prompt_says_whether_it_thinks(tmp_path: Any) -> None:
    with LiveServer(tmp_path, reasoning_parser="deepseek-r1") as server:
        server.service.answer = "Hm.\n</think>\nYes."
        message = chat(server)["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Hm.", "Yes.")
        server.service.answer = "Yes."
        closed = [{"role": "user", "content": "x<think>\n\n</think>\n\n"}]  # as a template ends it
        message = chat(server, messages=closed)["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (None, "Yes.")


def test_thinking_is_switched_by_the_template(thinking: LiveServer) -> None:
    chat(thinking, chat_template_kwargs={"enable_thinking": False})
    assert thinking.service.templates[0][1]["enable_thinking"] is False


def test_channels_of_gpt_oss(tmp_path: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with LiveServer(tmp_path, reasoning_parser="gpt-oss", tool_call_parser="gpt-oss") as server:
        server.service.answer = (
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
        )
        reply = chat(server, tools=tools)
        assert "<|channel|>" in server.service.requests[0].kept_special_tokens
    (choice,) = reply["choices"]
    assert choice["message"]["reasoning_content"] == "Hm"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert choice["finish_reason"] == "tool_calls"


def test_without_a_parser_nothing_is_separated(tmp_path: Any) -> None:
    with LiveServer(tmp_path) as server:
        server.service.answer = ANSWER
        reply = chat(server)
    assert reply["choices"][0]["message"]["content"] == ANSWER
    assert reply["usage"]["reasoning_tokens"] == 0
    assert "completion_tokens_details" not in reply["usage"]


def test_reasoning_of_a_chat_is_bounded(thinking: LiveServer, tmp_path: Any) -> None:
    chat(thinking, max_thinking_tokens=9)
    chat(thinking, custom_params={"thinking_budget": 8}, regex="Yes")
    closed = [{"role": "user", "content": "x<think>\n\n</think>\n\n"}]
    chat(thinking, messages=closed, max_thinking_tokens=9)
    chat(thinking)
    sent = [request.sampling_params for request in thinking.service.requests]
    assert [params.max_thinking_tokens for params in sent] == [9, 8, 9, None]
    assert [params.reasoning is not None for params in sent] == [True, True, False, False]
    held = [params.held_to and params.held_to.kind for params in sent]
    assert held == ["max_thinking_tokens", "regex", None, None]
    with LiveServer(tmp_path, reasoning_parser="gpt-oss") as server:
        body = {"model": "m", "messages": ASK, "max_thinking_tokens": 9}
        reply = server.post("/v1/chat/completions", body)
        assert reply.status_code == 400
        assert "gpt-oss" in reply.json()["message"]
