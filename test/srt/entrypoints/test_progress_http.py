"""Progress of long prefills in streams: comments that clients may ask for and others never see."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import openai
import pytest

from sglang.srt.managers.io_struct import FinishReason, PrefillProgress
from srt.entrypoints.fake_service import ANSWER, LiveServer

NEWS = [PrefillProgress("r", 1000, 3000, 512.34, 3.96), PrefillProgress("r", 2000, 3000, 0.0, None)]
SHOWN: list[dict[str, Any]] = [
    {"done_tokens": 1000, "total_tokens": 3000, "tokens_per_s": 512.3, "eta_s": 4.0},
    {"done_tokens": 2000, "total_tokens": 3000, "tokens_per_s": 0.0, "eta_s": None},
]
OPTIONS = {"stream_options": {"include_progress": True}}
ASKS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **OPTIONS}),
    ("/v1/completions", {"prompt": "Hi", **OPTIONS}),
    ("/generate", {"text": "Hi", "include_progress": True}),
]


def comments(reply: httpx.Response) -> list[Any]:
    """The decoded comments, which must all stand before the first event."""
    blocks = reply.text.split("\n\n")
    found = [block for block in blocks if block.startswith(":")]
    assert blocks[: len(found)] == found
    return [msgspec.json.decode(block.removeprefix(": progress ")) for block in found]


@pytest.mark.parametrize(("path", "body"), ASKS)
def test_a_stream_that_asks_has_comments(
    server: LiveServer, path: str, body: dict[str, Any]
) -> None:
    server.service.progress = list(NEWS)
    reply = server.post(path, {**body, "stream": True})
    assert comments(reply) == [{"index": 0, **shown} for shown in SHOWN]
    assert reply.text.endswith("data: [DONE]\n\n")
    # The events are those of a stream that does not ask.
    plain = {k: v for k, v in body.items() if k not in ("stream_options", "include_progress")}
    assert len(server.events(path, plain)) == reply.text.count("data: ") - 1
    assert not server.service.requests[-1].include_progress


@pytest.mark.parametrize(("path", "body"), ASKS)
def test_a_reply_that_is_no_stream_asks_for_nothing(
    server: LiveServer, path: str, body: dict[str, Any]
) -> None:
    server.service.progress = list(NEWS)
    assert server.post(path, body).status_code == 200
    assert not server.service.requests[-1].include_progress


@pytest.mark.parametrize(("path", "body"), ASKS)
def test_an_error_after_progress_is_an_event(
    server: LiveServer, path: str, body: dict[str, Any]
) -> None:
    server.service.progress = list(NEWS)
    server.service.refusals["bad"] = FinishReason("abort", message="no room", status_code=503)
    reply = server.post(path, {**body, "rid": "bad", "stream": True})
    assert reply.status_code == 200
    assert len(comments(reply)) == 2
    error, done = reply.text.split("\n\n")[2:4]
    assert "no room" in error
    assert done == "data: [DONE]"


def test_choices_wait_for_tokens_not_for_progress(server: LiveServer) -> None:
    server.service.progress = list(NEWS)
    body = {"prompt": "Hi", "n": 2, "stream": True, **OPTIONS}
    reply = server.post("/v1/completions", body)
    first = reply.text.split("\n\n")[:3]
    assert [block.startswith(":") for block in first] == [True, True, False]


def test_the_openai_package_is_not_disturbed(server: LiveServer) -> None:
    server.service.progress = list(NEWS)
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        chat = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            extra_body=OPTIONS,
        )
        assert "".join(c.choices[0].delta.content or "" for c in chat) == ANSWER
        assert server.service.requests[-1].include_progress
        texts = client.completions.create(
            model="m", prompt="Hi", max_tokens=99, stream=True, extra_body=OPTIONS
        )
        assert "".join(c.choices[0].text for c in texts) == ANSWER
        assert server.service.requests[-1].include_progress
