"""Whatever a client sends, it gets a clear 4xx and the server lives on."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from sglang.srt.entrypoints.generate_request_body import GENERATE_FIELDS
from sglang.srt.entrypoints.openai.protocol import CHAT_FIELDS, COMPLETION_FIELDS
from sglang.srt.entrypoints.sampling_fields import SAMPLING_FIELDS
from sglang.srt.errors import RequestError
from srt.entrypoints.fake_service import ANSWER, LiveServer, http_post

ENDPOINTS = {
    "/generate": {"text": "x"},
    "/v1/completions": {"model": "m", "prompt": "x"},
    "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "x"}]},
}


def message_of(reply: httpx.Response) -> str:
    """The error's message, whose place tells that the endpoint's own shape was used."""
    body = reply.json()
    if reply.url.path.startswith("/v1/"):
        assert set(body) == {"object", "message", "type", "param", "code"}
        assert body["code"] == reply.status_code
        return str(body["message"])
    assert set(body) == {"error"}
    return str(body["error"]["message"])


def assert_alive(server: LiveServer) -> None:
    assert server.post("/generate", {"text": "x"}).json()["text"] == ANSWER


@pytest.mark.parametrize("path", [*ENDPOINTS, "/tokenize", "/detokenize", "/abort_request"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"5",
        b'{"text": "x"} trailing',
        b'{"text": NaN}',
        b'{"text": Infinity}',
        b'{"text": -Infinity}',
        b"{'text': 'x'}",
        b'{"text": "x",}',
        b'{"text": "\xff\xfe"}',
        b'{"\xff": 1}',
        b'{"prompt": "\xc3\x28", "text": "\xc3\x28", "messages": "\xc3\x28"}',
        b'{"text": "\\ud800", "prompt": "\\ud800", "messages": "\\ud800"}',
        b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\x00" * 10,
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_bodies_that_are_no_object(server: LiveServer, path: str, body: bytes) -> None:
    reply = server.post_raw(path, body)
    assert reply.status_code == 400
    assert message_of(reply)
    assert_alive(server)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_openai_wants_json_as_content_type(server: LiveServer, path: str, kind: str) -> None:
    reply = server.post_raw(path, json.dumps(ENDPOINTS[path]).encode(), kind)
    assert reply.status_code == 400
    assert reply.json()["type"] == "Bad Request"
    assert "application/json" in message_of(reply)


WRONG_VALUES = [
    ({"text": 5}, "text"),
    ({"text": True}, "text"),
    ({"text": ""}, "text"),
    ({"text": []}, "text"),
    ({"text": ["a", ""]}, "text"),
    ({"text": ["a", 5]}, "text"),
    ({"text": None}, "text"),
    ({"text": "a", "input_ids": [1]}, "text"),
    ({"input_ids": []}, "input_ids"),
    ({"input_ids": [[]]}, "input_ids"),
    ({"input_ids": [[1], []]}, "input_ids"),
    ({"input_ids": [1, [2]]}, "input_ids"),
    ({"input_ids": [[1], 2]}, "input_ids"),
    ({"input_ids": [[[1]]]}, "input_ids"),
    ({"input_ids": ["a"]}, "input_ids"),
    ({"input_ids": [1.0]}, "input_ids"),
    ({"input_ids": [True]}, "input_ids"),
    ({"input_ids": [None]}, "input_ids"),
    ({"input_ids": "1,2"}, "input_ids"),
    ({"input_ids": {"a": 1}}, "input_ids"),
    ({"input_ids": 5}, "input_ids"),
    ({"input_ids": [-1]}, "-1"),
    ({"input_ids": [4096]}, "4096"),
    ({"input_ids": [2**31]}, "2147483648"),
    ({"input_ids": [2**64]}, "out of range"),
    ({"input_ids": [2**200]}, "out of range"),
    ({"input_ids": [5] * 600}, "600 tokens"),
    ({"sampling_params": 5}, "sampling_params"),
    ({"sampling_params": "x"}, "sampling_params"),
    ({"sampling_params": [{}]}, "sampling_params"),
    ({"sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
    ({"sampling_params": {"temperature": -1}}, "temperature"),
    ({"sampling_params": {"temperature": True}}, "temperature"),
    ({"sampling_params": {"top_p": 0}}, "top_p"),
    ({"sampling_params": {"top_p": 1.1}}, "top_p"),
    ({"sampling_params": {"top_k": 0}}, "top_k"),
    ({"sampling_params": {"top_k": 1.5}}, "top_k"),
    ({"sampling_params": {"min_p": 2}}, "min_p"),
    ({"sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
    ({"sampling_params": {"max_new_tokens": 2**40}}, "context length"),
    ({"sampling_params": {"max_new_tokens": 2**70}}, "max_new_tokens"),
    ({"sampling_params": {"max_new_tokens": 511}}, "context length"),
    ({"sampling_params": {"min_new_tokens": 2**63}}, "min_new_tokens"),
    ({"sampling_params": {"n": 0}}, "n must be"),
    ({"sampling_params": {"n": -(2**62)}}, "n must be"),
    ({"sampling_params": {"n": 2**62}}, "n must be"),
    ({"sampling_params": {"stop": 5}}, "stop"),
    ({"sampling_params": {"stop": ["a", 1]}}, "stop"),
    ({"sampling_params": {"stop": ""}}, "stop"),
    ({"sampling_params": {"stop_token_ids": ["a"]}}, "stop_token_ids"),
    ({"sampling_params": {"stop_token_ids": [-1]}}, "stop_token_ids"),
    ({"sampling_params": {"logit_bias": {"x": 1}}}, "logit_bias"),
    ({"sampling_params": {"logit_bias": {"5": "x"}}}, "logit_bias"),
    ({"sampling_params": {"logit_bias": {"9" * 30: 1}}}, "logit_bias"),
    ({"sampling_params": {"logit_bias": {"-1": 1}}}, "logit_bias"),
    ({"sampling_params": {"sampling_seed": 2**64}}, "sampling_seed"),
    ({"sampling_params": {"ignore_eos": 1}}, "ignore_eos"),
    ({"sampling_params": {"no_such_field": 1}}, "sampling_params.no_such_field"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"rid": 5}, "rid"),
    ({"rid": ""}, "rid"),
    ({"rid": ["a", "b"]}, "rid"),
    ({"text": ["a", "b"], "rid": ["x"]}, "rid"),
    ({"text": ["a", "b"], "rid": ["x", "x"]}, "rid"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params"),
    ({"text": ["a", "b"], "return_logprob": [True]}, "return_logprob"),
    ({"return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num"),
    ({"return_logprob": True, "top_logprobs_num": 2**40}, "top_logprobs_num"),
    ({"return_logprob": True, "logprob_start_len": -2}, "logprob_start_len"),
    ({"return_logprob": True, "logprob_start_len": 99}, "logprob_start_len"),
    ({"return_logprob": True, "token_ids_logprob": [-1]}, "token_ids_logprob"),
    ({"return_logprob": True, "token_ids_logprob": [2**62]}, "token_ids_logprob"),
    ({"return_logprob": True, "token_ids_logprob": [1, [2]]}, "token_ids_logprob"),
    ({"extra_key": 5}, "extra_key"),
    ({"priority": 2**70}, "priority"),
    ({"no_such_field": None}, "no_such_field"),
]


@pytest.mark.parametrize(("fields", "named"), WRONG_VALUES, ids=lambda v: repr(v)[:40])
def test_wrong_values_are_named(server: LiveServer, fields: dict[str, Any], named: str) -> None:
    body = dict(fields) if "input_ids" in fields else {"text": "x", **fields}
    reply = server.post("/generate", body)
    assert reply.status_code == 400
    assert named in message_of(reply)


def test_numbers_too_large_for_a_float(server: LiveServer) -> None:
    for text in (b"1e400", b"-1e400", b"1" * 400):
        body = b'{"text": "x", "sampling_params": {"temperature": ' + text + b"}}"
        assert "temperature" in message_of(server.post_raw("/generate", body))
        body = b'{"model": "m", "prompt": "x", "temperature": ' + text + b"}"
        assert "temperature" in message_of(server.post_raw("/v1/completions", body))
    assert_alive(server)


def refused_fields() -> list[tuple[str, dict[str, Any], str]]:
    """Every refused field of every table, with a value that asks for something."""
    cases: list[tuple[str, dict[str, Any], str]] = []
    for path, table in (
        ("/generate", GENERATE_FIELDS),
        ("/v1/chat/completions", CHAT_FIELDS),
        ("/v1/completions", COMPLETION_FIELDS),
    ):
        cases += [(path, {name: {"ask": 1}}, name) for name in table.refused]
    for name in SAMPLING_FIELDS.refused:
        params = {"sampling_params": {name: "something"}}
        cases.append(("/generate", params, f"sampling_params.{name}"))
    return cases


@pytest.mark.parametrize(("path", "fields", "named"), refused_fields(), ids=lambda v: repr(v)[:40])
def test_refused_fields_are_named_and_their_neutral_values_pass(
    server: LiveServer, path: str, fields: dict[str, Any], named: str
) -> None:
    reply = server.post(path, {**ENDPOINTS[path], **fields})
    assert reply.status_code == 400
    assert f"'{named}'" in message_of(reply)
    tables = {"/generate": GENERATE_FIELDS, "/v1/chat/completions": CHAT_FIELDS}
    table = tables.get(path, COMPLETION_FIELDS)
    top, _, inner = named.partition(".")
    refusal = (SAMPLING_FIELDS.refused[inner]) if inner else table.refused[top]
    for neutral in (None, *refusal.neutral):
        value = {top: {inner: neutral}} if inner else {top: neutral}
        passed = server.post(path, {**ENDPOINTS[path], **value})
        assert passed.status_code == 200, passed.text


def test_paths_and_methods(server: LiveServer) -> None:
    assert server.request("GET", "/no/such/path").status_code == 404
    assert server.request("GET", "/generate").status_code == 405
    assert server.request("DELETE", "/v1/models").status_code == 405


def test_a_bug_is_a_500_in_the_endpoints_shape(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(server.service, "generate", broken)
    for path, body in ENDPOINTS.items():
        reply = server.post(path, body)
        assert reply.status_code == 500
        assert message_of(reply) == "Internal server error: ZeroDivisionError"
    monkeypatch.undo()
    assert_alive(server)


# ---- size --------------------------------------------------------------------------------------


def read_reply(connection: socket.socket) -> bytes:
    """A whole reply with a content-length, on a connection that stays open."""
    data = b""
    while True:
        head, found, body = data.partition(b"\r\n\r\n")
        if found and len(body) >= int(head.lower().split(b"content-length: ")[1].split()[0]):
            return data
        piece = connection.recv(65536)
        assert piece, f"the server closed after {data!r}"
        data += piece


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with LiveServer(tmp_path_factory.mktemp("small"), max_request_bytes="100KiB") as server:
        yield server


@pytest.mark.parametrize("path", [*ENDPOINTS, "/tokenize", "/detokenize", "/abort_request"])
def test_announced_length_above_the_limit(small: LiveServer, path: str) -> None:
    head = http_post(path, b"").replace(b"content-length: 0", b"content-length: 102401")
    with small.raw(head) as connection:  # not one byte of the body is sent
        assert read_reply(connection).startswith(b"HTTP/1.1 413 ")
    assert_alive(small)


def test_chunked_body_above_the_limit_is_cut_while_reading(small: LiveServer) -> None:
    head = http_post("/generate", b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
    with small.raw(head) as connection:
        piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        connection.sendall(piece * 2)  # no end: the reply must come before one
        reply = read_reply(connection)
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"102400 bytes" in reply
    assert_alive(small)


def test_whole_client_uploads_get_their_413(small: LiveServer) -> None:
    text = "x" * 3_000_000
    assert small.post("/generate", {"text": text}).status_code == 413
    reply = small.post("/v1/completions", {"model": "m", "prompt": text})
    assert reply.json()["code"] == 413


def test_a_body_just_below_the_limit_passes(small: LiveServer) -> None:
    body = b'{"text": "x"' + b" " * (102_400 - 13) + b"}"
    assert len(body) == 102_400
    assert small.post_raw("/generate", body).status_code == 200
    assert small.post_raw("/generate", body + b" ").status_code == 413


@pytest.mark.parametrize(("path", "name"), [("/tokenize", "tokens"), ("/detokenize", "prompt")])
def test_a_long_value_of_another_door_is_unknown_here(
    server: LiveServer, path: str, name: str
) -> None:
    value = "x" * 200_000 if name == "prompt" else [1] * 100_000
    reply = server.post(path, {"tokens": [1], "prompt": "x", name: value})
    assert reply.status_code == 400
    assert "Unknown field" in reply.json()["error"]["message"]


def test_a_long_list_with_a_wrong_element_names_it(server: LiveServer) -> None:
    body = b'{"prompt": [' + b"1, " * 50_000 + b'2.5], "model": "m"}'
    reply = server.post_raw("/v1/completions", body)
    assert reply.status_code == 400
    assert reply.json()["message"] == (
        "Invalid value for 'prompt': element 50000 is 2.5, but token ids must be integers."
    )
    reply = server.post_raw("/generate", body.replace(b"prompt", b"input_ids"))
    assert reply.status_code == 400
    assert "'input_ids': element 50000 is 2.5" in reply.json()["error"]["message"]


def test_a_long_chunked_body_is_put_together(server: LiveServer) -> None:
    ids = ",".join(["7"] * 500)

    def pieces() -> Any:
        yield b'{"input_ids": ['
        yield ids.encode()
        yield b'], "sampling_params": {"max_new_tokens": 1}}'

    reply = server.request("POST", "/generate", content=pieces())
    assert reply.json()["meta_info"]["prompt_tokens"] == 500


# ---- key and phases ----------------------------------------------------------------------------


def test_the_key_guards_all_but_health(tmp_path: Any) -> None:
    with LiveServer(tmp_path, api_key="se cret", enable_metrics=True) as server:
        for path in ("/health", "/health_generate", "/ready", "/ping"):
            assert server.request("GET", path).status_code == 200, path
        for path in (
            "/",
            "/v1/models",
            "/server_info",
            "/metrics",
            "/docs",
            "/no/such",
            "/health/x",
        ):
            for header in ({}, {"authorization": "Bearer secret"}, {"authorization": "se cret"}):
                reply = server.request("GET", path, headers=header)
                assert (reply.status_code, reply.json()) == (401, {"error": "Unauthorized"})
        key = {"authorization": "Bearer se cret"}
        assert server.request("GET", "/v1/models", headers=key).status_code == 200
        odd = {"authorization": b"Bearer \xff\xfe"}
        assert server.request("GET", "/v1/models", headers=odd).status_code == 401
        refused = server.post("/generate", {"text": "x"})
        assert refused.status_code == 401
        assert "se cret" not in server.request("GET", "/server_info", headers=key).text


def test_while_starting_everything_answers_503(tmp_path: Any) -> None:
    with LiveServer(tmp_path, ready=False) as server:
        for path in ("/health", "/health_generate", "/ready"):
            assert server.request("GET", path).status_code == 503
        for path in ("/", "/v1/models", "/server_info", "/flush_cache"):
            reply = server.request("GET", path)
            assert reply.status_code == 503
            assert "starting" in message_of(reply)
        for path, body in ENDPOINTS.items():
            reply = server.post(path, body)
            assert reply.status_code == 503
            assert "starting" in message_of(reply)
        server.on_loop(server.service.make_ready)
        server.on_loop(lambda: server.context.attach(server.service))
        assert server.request("GET", "/health").status_code == 503
        server.on_loop(server.context.open)
        assert server.request("GET", "/health").status_code == 200
        server.on_loop(server.context.close)
        assert "shutting down" in message_of(server.post("/generate", {"text": "x"}))
        assert server.request("GET", "/health").status_code == 503


def test_a_silent_scheduler_is_a_503(server: LiveServer) -> None:
    server.service.state_error = RequestError("The scheduler did not answer.", 503)
    reply = server.request("GET", "/server_info")
    assert reply.status_code == 503
    assert message_of(reply) == "The scheduler did not answer."
