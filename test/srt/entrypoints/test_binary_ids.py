"""Ids that come as bytes: the same as those sent as JSON, or a 400 that says what is wrong."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.entrypoints import binary_ids
from sglang.srt.entrypoints.binary_ids import ids_of_base64, ids_of_body
from sglang.srt.entrypoints.generate_request_body import FIELDS_HEADER
from sglang.srt.errors import RequestError
from srt.entrypoints.fake_service import LiveServer


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40), st.integers(1, 9))
def test_base64_in_blocks(ids: list[int], block: int) -> None:
    array = np.array(ids, "<i4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binary_ids, "_BASE64_BLOCK", 4 * block)
        result = ids_of_base64("b", base64.b64encode(array.tobytes()).decode())
    assert result.dtype == np.int32
    assert np.array_equal(result, array)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "0 bytes are not a multiple of 4"),
        ("AAAA", "3 bytes are not a multiple of 4"),
        ("AAAAA", "5 characters are no base64 text"),
        ("AAAA*AAAAAA=", "no base64 text from character 4 on"),
        ("AAAAAAA\nAAA=", "no base64 text from character 4 on"),
        ("AA==AAAAAAA=", "padding stands before the end|no base64 text from character 0 on"),
        ("AA=AAAAAAAA=", "no base64 text from character 0 on|padding stands"),
        ("\u0663AAAAAA=", "8 characters are no base64 text"),
    ],
)
def test_what_is_no_base64(text: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary_ids, "_BASE64_BLOCK", 4)
    with pytest.raises(RequestError, match=f"'b': ({problem})"):
        ids_of_base64("b", text)


def test_a_binary_body_is_not_copied() -> None:
    body = bytearray(np.arange(5, dtype="<i4").tobytes())
    ids = ids_of_body(body)
    assert ids.tolist() == [0, 1, 2, 3, 4]
    assert np.shares_memory(ids, np.frombuffer(body, np.uint8))


@pytest.mark.parametrize("size", [0, 1, 3, 7])
def test_a_body_that_is_no_whole_number_of_ids(size: int) -> None:
    with pytest.raises(RequestError, match=f"{size} bytes are not a multiple of 4"):
        ids_of_body(bytes(size))


# ---- through HTTP


def post(server: LiveServer, body: bytes, fields: dict[str, Any] | None = None) -> httpx.Response:
    headers = {"content-type": "application/octet-stream"}
    if fields is not None:
        headers[FIELDS_HEADER] = json.dumps(fields)
    return server.request("POST", "/generate", content=body, headers=headers)


def test_a_binary_prompt(server: LiveServer) -> None:
    ids = np.array([5, 0, 7], "<i4")
    fields = {"rid": "r", "sampling_params": {"max_new_tokens": 2}, "stream": False}
    reply = post(server, ids.tobytes(), fields)
    assert reply.status_code == 200
    assert reply.json()["meta_info"]["prompt_tokens"] == 3
    request = server.service.requests[0]
    assert request.input_ids is not None
    assert request.input_ids.tolist() == [5, 0, 7]
    assert (request.rid, request.sampling_params.max_new_tokens) == ("r", 2)


def test_a_base64_prompt(server: LiveServer) -> None:
    text = base64.b64encode(np.array([5, 0, 7], "<i4").tobytes()).decode()
    assert server.post("/generate", {"input_ids_b64": text}).status_code == 200
    request = server.service.requests[0]
    assert request.input_ids is not None
    assert request.input_ids.tolist() == [5, 0, 7]


@pytest.mark.parametrize(
    ("body", "fields", "problem"),
    [
        (b"12345", {}, "5 bytes are not a multiple of 4"),
        (b"", None, "0 bytes are not a multiple of 4"),
        (b"1234", {"input_ids": [1]}, "'input_ids': the prompt is the body's token ids"),
        (b"1234", {"text": "x"}, "'text': the prompt is the body's token ids"),
        (b"1234", {"nonsense": 1}, "Unknown field 'nonsense'"),
    ],
)
def test_binary_requests_that_are_refused(
    server: LiveServer, body: bytes, fields: Any, problem: str
) -> None:
    reply = post(server, body, fields)
    assert reply.status_code == 400
    assert problem in reply.json()["error"]["message"]
    assert server.service.requests == []


def test_a_binary_body_that_never_fits_is_not_read(server: LiveServer) -> None:
    limit = 4 * server.service.context_length + (1 << 20)
    head = (
        "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/octet-stream\r\n"
        f"content-length: {limit + 4}\r\n\r\n"
    )
    with server.raw(head.encode()) as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_two_prompts_are_refused(server: LiveServer) -> None:
    reply = server.post("/generate", {"input_ids_b64": "AAAAAA==", "input_ids": [1]})
    assert reply.status_code == 400
    assert "exactly one of" in reply.json()["error"]["message"]
