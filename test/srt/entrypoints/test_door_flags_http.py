"""Flags that change how requests are read and replies look, for every client of a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sglang.srt.configs.parser_names import COMPLETION_TEMPLATES
from sglang.srt.entrypoints.openai.fill_in_middle import MIDDLE_MARKS
from srt.entrypoints.fake_service import LiveServer

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(
        tmp_path_factory.mktemp("model"),
        default_chat_template_kwargs='{"enable_thinking": false, "style": "short"}',
        stream_response_default_include_usage=True,
        weight_version="v7",
        completion_template="qwen_coder",
    ) as server:
        yield server


def test_chat_template_kwargs_have_defaults(server: LiveServer) -> None:
    server.post("/v1/chat/completions", CHAT)
    given = {"chat_template_kwargs": {"style": "long", "more": 1}}
    server.post("/v1/chat/completions", {**CHAT, **given})
    server.post("/v1/responses", {"input": "Hi"})
    server.post("/tokenize", CHAT)
    names = ("enable_thinking", "style", "more")
    seen = [[kwargs.get(name) for name in names] for _, kwargs in server.service.templates]
    defaults = [False, "short", None]
    assert seen == [defaults, [False, "long", 1], defaults, defaults]


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "Hi"})]
)
def test_streams_have_usage_unless_they_ask_not_to(
    server: LiveServer, path: str, body: dict[str, Any]
) -> None:
    for options, has_usage in (
        ({}, True),
        ({"stream_options": {"include_usage": None}}, True),
        ({"stream_options": {"include_usage": True}}, True),
        ({"stream_options": {"include_usage": False}}, False),
    ):
        last = server.events(path, {**body, **options})[-1]
        assert (last["choices"] == []) == has_usage
        assert ((last.get("usage") or {}).get("completion_tokens", 0) > 0) == has_usage


def test_the_weights_have_a_name(server: LiveServer) -> None:
    assert server.post("/generate", {"text": "x"}).json()["meta_info"]["weight_version"] == "v7"
    chat = server.post("/v1/chat/completions", CHAT).json()
    assert chat["metadata"] == {"weight_version": "v7"}
    assert server.request("GET", "/model_info").json()["weight_version"] == "v7"


def test_a_suffix_asks_for_the_middle(server: LiveServer, tmp_path: Any) -> None:
    assert tuple(MIDDLE_MARKS) == COMPLETION_TEMPLATES
    body = {"prompt": ["f(", "g("], "suffix": ")\n", "max_tokens": 2, "echo": True}
    choices = server.post("/v1/completions", body).json()["choices"]
    asked = [request.text for request in server.service.requests]
    assert sorted(asked, key=str) == [
        "<|fim_prefix|>f(<|fim_suffix|>)\n<|fim_middle|>",
        "<|fim_prefix|>g(<|fim_suffix|>)\n<|fim_middle|>",
    ]
    assert [choice["text"][:2] for choice in choices] == ["f(", "g("]
    for suffix in (None, ""):
        server.service.requests.clear()
        server.post("/v1/completions", {"prompt": "f(", "suffix": suffix})
        assert server.service.requests[0].text == "f("
    ids = server.post("/v1/completions", {"prompt": [5, 6], "suffix": ")"})
    assert (ids.status_code, "'suffix'" in ids.json()["message"]) == (400, True)
    with LiveServer(tmp_path) as other:
        reply = other.post("/v1/completions", {"prompt": "f(", "suffix": ")"})
        assert (reply.status_code, "--completion-template" in reply.json()["message"]) == (
            400,
            True,
        )
