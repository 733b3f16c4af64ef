"""The streaming client against a server that says what the test wants."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from haystack.client import Answer, encode_request, generate

IDS = np.array([5, 6, 7], dtype=np.int32)


@contextmanager
def server_that_says(status: int, body: bytes) -> Iterator[str]:
    """The URL of a server that answers one request so."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        work = threading.Thread(target=server.handle_request)
        work.start()
        yield f"http://127.0.0.1:{server.server_port}"
        work.join(10)


def events(*values: object) -> bytes:
    lines = [f"data: {json.dumps(value)}\n\n" for value in values]
    return "".join([*lines, "data: [DONE]\n\n"]).encode()


def news(ids: list[int], total: int) -> dict[str, object]:
    meta = {"completion_tokens": total, "prompt_tokens": 3, "cached_tokens": 2}
    return {"text": "", "output_ids": ids, "meta_info": meta}


@pytest.mark.parametrize(
    "said",
    [
        events(news([8], 1), news([8, 9, 10], 3), news([8, 9, 10, 11], 4)),
        events(news([8], 1), news([9, 10], 3), news([11], 4)),
    ],
    ids=["whole", "incremental"],
)
def test_tokens_come_with_their_times(said: bytes) -> None:
    with server_that_says(200, said) as url:
        answer = generate(url, IDS, 4)
    assert answer.output_ids == (8, 9, 10, 11)
    assert answer.seconds == tuple(sorted(answer.seconds))
    assert answer.seconds[1] == answer.seconds[2]  # they came in one event
    assert (answer.prompt_tokens, answer.cached_tokens) == (3, 2)


@pytest.mark.parametrize(
    ("status", "said", "reason"),
    [
        (400, b"the prompt is too long", "answered 400: the prompt is too long"),
        (200, events({"error": {"message": "no memory"}}), "no memory"),
        (200, b"", "without a token"),
    ],
)
def test_errors_are_told(status: int, said: bytes, reason: str) -> None:
    with server_that_says(status, said) as url, pytest.raises(RuntimeError, match=reason):
        generate(url, IDS, 4)


def test_rates_and_gaps() -> None:
    answer = Answer((1, 2, 3), (1.0, 1.5, 3.0), 10, 0)
    assert answer.ttft_s == 1.0
    assert answer.decode_tokens_per_s == pytest.approx(1.0)
    assert answer.longest_gap_s == pytest.approx(1.5)
    one = Answer((1,), (1.0,), 10, 0)
    assert (one.decode_tokens_per_s, one.longest_gap_s) == (None, 0)


def test_ids_travel_in_three_ways() -> None:
    body, headers = encode_request(IDS, 4, "json")
    assert json.loads(body)["input_ids"] == [5, 6, 7]
    assert headers["Content-Type"] == "application/json"
    body, _ = encode_request(IDS, 4, "base64")
    assert base64.b64decode(json.loads(body)["input_ids_b64"]) == IDS.tobytes()
    body, headers = encode_request(IDS, 4, "binary")
    assert body == IDS.tobytes()
    assert json.loads(headers["X-Generate-Fields"])["sampling_params"]["max_new_tokens"] == 4
    with pytest.raises(ValueError, match="no way to send"):
        encode_request(IDS, 4, "pigeon")
