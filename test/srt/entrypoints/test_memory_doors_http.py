"""/set_kv_budget and /compact_kv over a real socket: values, keys and statuses."""

from __future__ import annotations

from typing import Any

import pytest

from sglang.srt.managers.io_struct import ControlReply
from srt.entrypoints.fake_service import LiveServer

DONE = {"requested_bytes": 8 << 30, "reached_bytes": 8 << 30, "evicted_tokens": 64}


@pytest.fixture
def pool(server: LiveServer) -> LiveServer:
    server.service.pool_replies = {
        "set_kv_budget": ControlReply(1, True, "The KV budget holds.", DONE),
        "compact_kv": ControlReply(1, True, "Compacted.", {"moved_pages": 3}),
    }
    server.service.pool_asked.clear()
    return server


@pytest.mark.parametrize("size", [8 << 30, "8GiB", "8589934592"])
def test_a_budget_in_numbers_and_in_words(pool: LiveServer, size: Any) -> None:
    reply = pool.post("/set_kv_budget", {"bytes": size, "timeout_s": 2})
    assert reply.status_code == 200
    assert reply.json() == {"message": "The KV budget holds.", **DONE}
    ((op, timeout_s, args),) = pool.service.pool_asked
    assert (op, args) == ("set_kv_budget", {"budget_bytes": 8 << 30, "time_limit_s": 2.0})
    assert timeout_s > 2, "the door waits longer than the operation may take"


def test_the_usual_time_is_thirty_seconds(pool: LiveServer) -> None:
    pool.post("/set_kv_budget", {"bytes": 5})
    pool.request("POST", "/compact_kv")
    assert [args["time_limit_s"] for _, _, args in pool.service.pool_asked] == [30.0, 30.0]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"bytes": None},
        {"bytes": -1},
        {"bytes": 1 << 62},
        {"bytes": 1.5},
        {"bytes": True},
        {"bytes": "much"},
        {"bytes": "-1GiB"},
        {"bytes": 1, "timeout_s": -1},
        {"bytes": 1, "timeout_s": 1e9},
        {"bytes": 1, "timeout_s": "x"},
        {"bytes": 1, "timeout": 5},
        {"byte": 1},
    ],
)
def test_bad_values_name_their_field(pool: LiveServer, body: dict[str, Any]) -> None:
    reply = pool.post("/set_kv_budget", body)
    assert reply.status_code == 400
    assert any(name in reply.json()["error"]["message"] for name in ("byte", "timeout"))
    assert pool.service.pool_asked == []


def test_the_scheduler_s_refusal_is_the_reply(pool: LiveServer) -> None:
    for op, status in (("set_kv_budget", 400), ("compact_kv", 409)):
        data = {"status_code": status}
        pool.service.pool_replies[op] = ControlReply(1, False, "No: 5 and 7 bytes.", data)
        reply = pool.post(f"/{op}", {"bytes": 1} if op == "set_kv_budget" else {})
        assert (reply.status_code, reply.json()) == (
            status,
            {"error": {"message": "No: 5 and 7 bytes."}},
        )


def test_time_that_was_too_short_is_told_with_200(pool: LiveServer) -> None:
    reached = {"requested_bytes": 5, "reached_bytes": 9}
    pool.service.pool_replies["set_kv_budget"] = ControlReply(1, False, "Too late.", reached)
    reply = pool.post("/set_kv_budget", {"bytes": 5})
    assert (reply.status_code, reply.json()) == (200, {"message": "Too late.", **reached})


def test_compact_takes_a_body_or_none(pool: LiveServer) -> None:
    assert pool.request("POST", "/compact_kv").json() == {"message": "Compacted.", "moved_pages": 3}
    assert pool.post("/compact_kv", {"timeout_s": 1}).status_code == 200
    assert pool.post("/compact_kv", {"x": 1}).status_code == 400
    assert pool.request("GET", "/compact_kv").status_code == 405


ADMIN = (("POST", "/set_kv_budget"), ("POST", "/compact_kv"), ("POST", "/flush_cache"))


def statuses(server: LiveServer, key: str | None) -> tuple[set[int], int]:
    """Of the administrator's doors, and of one of everybody's."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    admin = {
        server.request(method, path, headers=headers, json={"bytes": 1} if "set" in path else None)
        for method, path in ADMIN
    }
    return {reply.status_code for reply in admin}, server.request(
        "GET", "/v1/models", headers=headers
    ).status_code


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {None: (200, 200)}),
        ({"api_key": "a"}, {None: (401, 401), "a": (200, 200)}),
        ({"admin_api_key": "b"}, {None: (401, 200), "a": (401, 200), "b": (200, 200)}),
        (
            {"api_key": "a", "admin_api_key": "b"},
            {None: (401, 401), "a": (401, 200), "b": (200, 401)},
        ),
    ],
)
def test_who_may(tmp_path: Any, keys: dict[str, str], expected: dict[str | None, Any]) -> None:
    with LiveServer(tmp_path, **keys) as server:
        for op in ("set_kv_budget", "compact_kv"):
            server.service.pool_replies[op] = ControlReply(1, True)
        for key, (admin, everybody) in expected.items():
            assert statuses(server, key) == ({admin}, everybody), key


def test_server_info_follows_the_budget(server: LiveServer) -> None:
    before = server.service.state, server.service.context_length
    server.service.state = {"memory": {"capacity_tokens": 77}}
    server.service.context_length = 70
    info = server.request("GET", "/server_info").json()
    assert (info["max_total_num_tokens"], info["max_req_input_len"]) == (77, 69)
    assert "admin_api_key" not in info
    server.service.state, server.service.context_length = before
