"""A client that leaves ends its work, in whatever state its request is."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from srt.entrypoints.fake_service import ANSWER, LiveServer, http_post

CHAT = b'{"model":"m","rid":"r","messages":[{"role":"user","content":"x"}]'
BODIES = {
    "/generate": b'{"text":"x","rid":"r"',
    "/v1/completions": b'{"model":"m","prompt":"x","rid":"r"',
    "/v1/chat/completions": CHAT,
}


def leave(connection: socket.socket, how: str) -> None:
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("held_at", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_one_sequence(server: LiveServer, path: str, stream: bool, held_at: int, how: str) -> None:
    server.service.hold_at["r"] = held_at
    body = BODIES[path] + (b',"stream":true}' if stream else b"}")
    with server.raw(http_post(path, body)) as connection:
        assert server.service.started.get(timeout=20) == "r"
        if stream and held_at:
            assert b"200 OK" in connection.recv(1 << 16)
        leave(connection, how)
        assert server.service.ended.get(timeout=20) == ("r", False)


@pytest.mark.parametrize("stream", [False, True])
def test_every_sequence_of_a_batch(server: LiveServer, stream: bool) -> None:
    server.service.hold_at["b"] = 1
    body = b'{"text":["x","y","z"],"rid":"b","sampling_params":{"n":2}'
    with server.raw(http_post("/generate", body + (b',"stream":true}' if stream else b"}"))):
        started = {server.service.started.get(timeout=20) for _ in range(6)}
    ended = {server.service.ended.get(timeout=20) for _ in range(6)}
    assert ended == {(rid, False) for rid in started}


def test_siblings_that_wait_for_their_first_choice_never_start(server: LiveServer) -> None:
    server.service.hold_at["b_0"] = 0
    body = b'{"text":"x","rid":"b","sampling_params":{"n":3}}'
    with server.raw(http_post("/generate", body)):
        assert server.service.started.get(timeout=20) == "b_0"
    assert server.service.ended.get(timeout=20) == ("b_0", False)
    assert server.post("/generate", {"text": "x", "rid": "after"}).status_code == 200
    assert server.service.started.get(timeout=20) == "after"


def test_an_abort_reaches_siblings_that_have_not_started(server: LiveServer) -> None:
    server.service.hold_at["b_0"] = 0
    body = b'{"text":"x","rid":"b","stream":true,"sampling_params":{"n":3}}'
    with server.raw(http_post("/generate", body)) as connection:
        assert server.service.started.get(timeout=20) == "b_0"
        while server.service.ended.empty():
            assert server.post("/abort_request", {"rid": "b"}).status_code == 200
        data = b""
        while b"[DONE]" not in data:
            data += connection.recv(1 << 16)
    assert data.count(b'"type":"abort"') == 3
    assert [r.rid for r in server.service.requests] == ["b_0"]


def test_a_client_that_stops_reading_holds_nothing_up(server: LiveServer) -> None:
    """The reply does not fit in the socket's buffers; leaving then still ends the request."""
    server.service.answer = "x" * 3000
    server.service.context_length = 10_000
    body = b'{"text":"x","rid":"r","stream":true,"sampling_params":{"max_new_tokens":3000}}'
    with server.raw(b"") as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(http_post("/generate", body))
        assert server.service.started.get(timeout=20) == "r"
        assert server.post("/generate", {"text": "x", "rid": "other"}).status_code == 200
        assert server.service.ended.get(timeout=20) == ("other", True)
    ended = server.service.ended.get(timeout=20)
    assert ended == ("r", False)


def test_leaving_while_the_body_is_sent(server: LiveServer) -> None:
    whole = http_post("/generate", b'{"text":"' + b"x" * 1000 + b'"}')
    with server.raw(whole[:-500]):
        pass
    assert server.post("/generate", {"text": "x"}).json()["text"] == ANSWER
    assert len(server.service.requests) == 1


def test_the_connection_is_reused_after_a_stream(server: LiveServer) -> None:
    request = http_post("/generate", b'{"text":"x","stream":true}')
    with server.raw(request) as connection:
        for requests_left in (1, 0):
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data += connection.recv(1 << 16)
            assert b"[DONE]" in data
            connection.sendall(request * requests_left)


def test_a_half_closed_client_counts_as_gone(server: LiveServer) -> None:
    server.service.hold_at["r"] = 0
    with server.raw(http_post("/generate", b'{"text":"x","rid":"r"}')) as connection:
        assert server.service.started.get(timeout=20) == "r"
        connection.shutdown(socket.SHUT_WR)
        assert server.service.ended.get(timeout=20) == ("r", False)


def test_health_generate_ends_with_its_client(server: LiveServer) -> None:
    server.service.hold_at["HEALTH"] = 0
    head: Any = b"GET /health_generate HTTP/1.1\r\nhost: x\r\n\r\n"
    with server.raw(head):
        rid = server.service.started.get(timeout=20)
    assert server.service.ended.get(timeout=20) == (rid, False)
