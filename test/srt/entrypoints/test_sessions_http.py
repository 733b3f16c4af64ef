"""Sessions over HTTP: what the service is asked, and that no end of a request harms a session."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sglang.srt.entrypoints.session_runner import SessionRunner
from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import GenerateDelta, GenerateRequest, SessionParams
from sglang.srt.managers.io_struct import FinishReason
from sglang.srt.sampling.sampling_params import SamplingParams
from srt.entrypoints.fake_service import ANSWER, LiveServer, http_post

BOS = "\x01"


class CuttingService:
    """Generates for the first two ids of each prompt, as a server that cuts to fit does."""

    def __init__(self, service: Any) -> None:
        self.tokenizer = service.tokenizer
        self._service = service

    def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateDelta, None]:
        assert request.input_ids is not None
        cut: AsyncGenerator[GenerateDelta, None] = self._service.generate(
            replace(request, input_ids=request.input_ids[:2])
        )
        return cut


@pytest.fixture
def session(server: LiveServer) -> str:
    reply = server.post("/open_session", {"capacity_of_str_len": 1000})
    assert reply.status_code == 200
    opened = reply.json()
    assert isinstance(opened, str)
    return opened


def prompts(server: LiveServer) -> list[str]:
    """The prompts that the service was given since the last look."""
    found = []
    for request in server.service.requests:
        assert request.session is None
        ids = request.input_ids
        found.append(request.text if ids is None else "".join(map(chr, ids.tolist())))
    server.service.requests.clear()
    return found


def ask(server: LiveServer, session: str, text: str, name: str, /, **wanted: Any) -> dict[str, Any]:
    params = wanted.pop("sampling_params", {})
    body = {"text": text, "rid": name, "sampling_params": params}
    reply = server.post("/generate", {**body, "session_params": {"id": session, **wanted}})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def message(reply: Any) -> str:
    assert reply.status_code == 400
    return str(reply.json()["error"]["message"])


def test_a_request_goes_on_from_another(server: LiveServer, session: str) -> None:
    first = ask(server, session, "Hi", "a")
    assert first["meta_info"]["id"] == "a"
    second = ask(server, session, " So?", "b", rid="a", sampling_params={"max_new_tokens": 2})
    ask(server, session, "!", "c", rid="b")
    ask(server, session, "?", "d", rid="a", drop_previous_output=True)
    ask(server, session, "?", "e", rid="a", offset=2)
    known = f"{BOS}Hi{ANSWER}"
    assert prompts(server) == [
        f"{BOS}Hi",
        f"{known} So?",
        f"{known} So?{ANSWER[:2]}!",
        f"{BOS}Hi?",
        f"{BOS}H?",
    ]
    assert second["meta_info"]["prompt_tokens"] == len(f"{known} So?")


def test_streams_batches_and_choices_are_requests_of_a_session(
    server: LiveServer, session: str
) -> None:
    body = {"text": "Hi", "rid": "s", "session_params": {"id": session}}
    assert server.events("/generate", body)[-1]["text"] == ANSWER
    batch = {"text": ["x", "y"], "session_params": [None, {"id": session, "rid": "s"}]}
    answers = server.post("/generate", {**batch, "rid": ["b0", "b1"]}).json()
    assert [answer["meta_info"]["id"] for answer in answers] == ["b0", "b1"]
    refused = ask_for(server, session, "b0")
    assert "no request 'b0'" in message(refused)
    choices = {"text": "z", "rid": "n", "sampling_params": {"n": 2, "max_new_tokens": 1}}
    server.post("/generate", {**choices, "session_params": {"id": session, "rid": "b1"}})
    prompts(server)
    ask(server, session, "!", "last", rid="n_1")
    known = f"{BOS}Hi{ANSWER}y{ANSWER}z{ANSWER[0]}"
    assert prompts(server) == [f"{known}!"]


def ask_for(server: LiveServer, session: str, rid: str) -> Any:
    return server.post("/generate", {"text": "x", "session_params": {"id": session, "rid": rid}})


def test_the_openai_endpoints_go_on_from_their_replies_ids(
    server: LiveServer, session: str
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    wanted: dict[str, Any] = {"session_params": {"id": session}, "max_tokens": 3}
    chat = server.post("/v1/chat/completions", {"messages": messages, **wanted}).json()
    wanted["session_params"] = {"id": session, "rid": chat["id"]}
    text = server.post("/v1/completions", {"prompt": "And?", **wanted}).json()
    wanted["session_params"] = {"id": session, "rid": text["id"]}
    server.events("/v1/chat/completions", {"messages": messages, **wanted})
    assert prompts(server) == [
        "<user>Hi",
        f"<user>Hi{ANSWER[:3]}And?",
        f"<user>Hi{ANSWER[:3]}And?{ANSWER[:3]}<user>Hi",
    ]
    echo = server.post("/v1/completions", {"prompt": "x", "echo": True, **wanted})
    assert (echo.status_code, "'echo'" in echo.json()["message"]) == (400, True)
    answer = server.post("/v1/responses", {"input": "x", **wanted})
    assert "use previous_response_id" in message(answer)


def test_no_end_of_a_request_harms_its_session(server: LiveServer, session: str) -> None:
    ask(server, session, "Hi", "a")
    wanted = {"id": session, "rid": "a", "replace": True}
    body = {"text": "x", "session_params": wanted}
    service = server.service
    service.refusals["refused"] = FinishReason("abort", message="full", status_code=503)
    assert server.post("/generate", {**body, "rid": "refused"}).status_code == 503
    service.fail_at["fails"] = 2
    assert server.post("/generate", {**body, "rid": "fails"}).status_code == 503
    assert server.post("/generate", {**body, "rid": "long", "text": "x" * 600}).status_code == 400
    service.hold_at["left"] = 2
    head = b'{"text":"x","rid":"left","stream":true,"session_params":{"id":"%s","rid":"a"}}'
    while not service.started.empty():
        service.started.get_nowait()
    with server.raw(http_post("/generate", head % session.encode())) as connection:
        assert service.started.get(timeout=20) == "left"
        assert b"200 OK" in connection.recv(1 << 16)
        assert "has a request 'left' already" in message(
            server.post("/generate", {**body, "rid": "left"})
        )
    while service.ended.get(timeout=20) != ("left", False):
        pass
    service.hold_at.clear()
    for rid in ("refused", "fails", "long", "left"):
        assert f"no request '{rid}'" in message(ask_for(server, session, rid))
    prompts(server)
    ask(server, session, "!", "left", rid="a")
    assert prompts(server) == [f"{BOS}Hi{ANSWER}!"]


def test_a_streaming_session(server: LiveServer) -> None:
    opened = server.post("/open_session", {"session_id": "live", "streaming": True})
    assert opened.json() == "live"
    for number, text in enumerate(("a", "b", "c")):
        ask(server, "live", text, f"r{number}", sampling_params={"max_new_tokens": 1})
    first = ANSWER[0]
    assert prompts(server) == [f"{BOS}a", f"{BOS}a{first}b", f"{BOS}a{first}b{first}c"]
    refused = server.post(
        "/generate", {"text": "x", "session_params": {"id": "live", "replace": True}}
    )
    assert "only added to" in message(refused)
    assert server.request("GET", "/close_session", json={"session_id": "live"}).text == ""


def test_a_closed_session_is_gone(server: LiveServer, session: str) -> None:
    ask(server, session, "Hi", "a")
    reply = server.post("/close_session", {"session_id": session})
    assert (reply.status_code, reply.content) == (200, b"")
    assert "no session" in message(ask_for(server, session, "a"))
    assert "no session" in message(server.post("/close_session", {"session_id": session}))


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/open_session", {"timeout": 0}, "timeout"),
        ("/open_session", {"timeout": "x"}, "timeout"),
        ("/open_session", {"session_id": ""}, "session_id"),
        ("/open_session", {"streaming": 1}, "streaming"),
        ("/open_session", {"size": 1}, "size"),
        ("/close_session", {}, "no session ''"),
        ("/generate", {"text": "x", "session_params": "s"}, "session_params"),
        ("/generate", {"text": "x", "session_params": {"id": "s", "at": 1}}, "session_params"),
        ("/generate", {"text": "x", "session_params": {"id": "s", "offset": 0.5}}, "offset"),
        ("/generate", {"text": "x", "session_params": {"id": "never open"}}, "no session"),
        ("/generate", {"text": ["x"], "session_params": [None, None]}, "session_params"),
        ("/generate", {"text": "x", "session_id": "s"}, "use session_params"),
    ],
)
def test_what_is_wrong_is_named(
    server: LiveServer, path: str, body: dict[str, Any], named: str
) -> None:
    assert named in message(server.post(path, body))


@pytest.mark.parametrize("params", [None, {}, {"id": None, "rid": "a"}])
def test_params_without_an_id_name_no_session(server: LiveServer, params: Any) -> None:
    reply = server.post("/generate", {"text": "x", "session_params": params})
    assert reply.status_code == 200
    assert prompts(server) == ["x"]


async def test_a_prompt_that_was_cut_is_not_kept(server: LiveServer) -> None:
    """Its output does not go on from what a later request would be given."""
    runner = SessionRunner(CuttingService(server.service))  # type: ignore[arg-type]
    session = runner.open(None)
    params = SamplingParams(max_new_tokens=1)
    for rid, ids in (("whole", [5, 6]), ("cut", [5, 6, 7])):
        ask = GenerateRequest(
            rid, None, np.array(ids, np.int32), params, False, session=SessionParams(session)
        )
        async with aclosing(runner.generate(ask)) as deltas:
            assert [delta.prompt_tokens async for delta in deltas] == [2]
    for rid, message_of in (("whole", ""), ("cut", "no request 'cut'")):
        ask = GenerateRequest(
            rid="more",
            text=None,
            input_ids=np.array([8], np.int32),
            sampling_params=params,
            stream=False,
            session=SessionParams(session, rid),
        )
        async with aclosing(runner.generate(ask)) as deltas:
            if message_of:
                with pytest.raises(RequestError, match=message_of):
                    await anext(deltas)
            else:
                await anext(deltas)
