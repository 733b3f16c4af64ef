"""Flags that change how requests are read and replies look, for every client of a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from sglang.srt.configs.parser_names import COMPLETION_TEMPLATES
from sglang.srt.entrypoints.openai.fill_in_middle import MIDDLE_MARKS
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.environ import Environ
from sglang.srt.errors import RequestError
from srt.entrypoints.fake_service import LiveServer

PREFERRED = '{"top_k": 7, "stop": "x"}'
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(
        tmp_path_factory.mktemp("model"),
        default_chat_template_kwargs='{"enable_thinking": false, "style": "short"}',
        stream_response_default_include_usage=True,
        weight_version="v7",
        completion_template="qwen_coder",
        preferred_sampling_params=PREFERRED,
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


def test_generate_has_preferred_parameters(server: LiveServer) -> None:
    fields = b'{"sampling_params": {"stop": ["y"]}}'
    kinds = {"content-type": "application/octet-stream", "x-generate-fields": fields.decode()}
    server.post("/generate", {"text": "x"})
    server.post("/generate", {"text": "x", "sampling_params": {"top_k": 3}})
    server.post("/generate", {"text": ["x"], "sampling_params": [{"stop": ["y"]}]})
    server.request("POST", "/generate", content=bytes([5, 0, 0, 0]), headers=kinds)
    server.post("/v1/completions", {"prompt": "x"})
    sent = [request.sampling_params for request in server.service.requests]
    assert [params.top_k for params in sent] == [7, 3, 7, 7, 20]  # the last is the model's
    assert [params.stop for params in sent] == [("x",), ("x",), ("y",), ("y",), ()]
    info = server.request("GET", "/model_info").json()
    assert info["preferred_sampling_params"] == PREFERRED


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"preferred_sampling_params": '{"top_q": 1}'}, "sampling_params.top_q"),
        ({"default_chat_template_kwargs": '{"messages": 1}'}, "messages"),
    ],
)
def test_flags_that_name_what_is_not_served_stop_the_start(
    server: LiveServer, flags: dict[str, str], named: str
) -> None:
    args = dataclasses.replace(server.context.server_args, **flags)
    with pytest.raises(RequestError, match=named):
        ServerContext(args, Environ()).attach(server.service)
