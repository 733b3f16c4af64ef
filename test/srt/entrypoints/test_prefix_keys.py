"""`extra_key` and `cache_salt` become, at every door, the one key that keeps prefixes apart."""

from __future__ import annotations

from typing import Any

import pytest

from srt.entrypoints.fake_service import LiveServer

PAIRS: list[dict[str, Any]] = [
    {},
    {"extra_key": "ab"},
    {"cache_salt": "ab"},
    {"cache_salt": "a", "extra_key": "b"},
    {"cache_salt": "b", "extra_key": "a"},
    {"cache_salt": "2:ab"},
    {"extra_key": "2:ab"},
]
DOORS: dict[str, dict[str, Any]] = {
    "/generate": {"text": "a"},
    "/v1/completions": {"model": "m", "prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {
        "model": "m",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 1,
    },
}


def keys_at(server: LiveServer, door: str, pairs: list[dict[str, Any]]) -> list[str | None]:
    server.service.requests.clear()
    for pair in pairs:
        reply = server.post(door, {**DOORS[door], **pair})
        assert reply.status_code == 200, reply.text
    return [request.extra_key for request in server.service.requests]


@pytest.mark.parametrize("door", DOORS)
def test_different_pairs_are_different_keys(server: LiveServer, door: str) -> None:
    keys = keys_at(server, door, PAIRS)
    assert keys[0] is None
    assert None not in keys[1:]
    assert len(set(keys)) == len(PAIRS)
    assert keys_at(server, door, PAIRS) == keys, "the same pair is the same key, always"


def test_a_tenant_is_the_same_at_every_door(server: LiveServer) -> None:
    first, *others = (keys_at(server, door, PAIRS) for door in DOORS)
    assert [others] == [[first] * len(others)]


@pytest.mark.parametrize("door", DOORS)
def test_empty_is_none(server: LiveServer, door: str) -> None:
    empty = [{"cache_salt": "", "extra_key": ""}, {"cache_salt": None}, {"extra_key": None}]
    assert keys_at(server, door, empty) == [None] * 3


def test_each_prompt_of_a_batch_has_its_own_key(server: LiveServer) -> None:
    server.post(
        "/generate",
        {
            "input_ids": [[5], [6], [7]],
            "extra_key": ["x", None, "x"],
            "cache_salt": [None, "s", "s"],
            "sampling_params": {"n": 2, "max_new_tokens": 1},
        },
    )
    found = [(list(one.input_ids), one.extra_key) for one in server.service.requests]
    assert sorted(found) == sorted([([5], "0:x"), ([6], "1:s"), ([7], "1:sx")] * 2)
    server.service.requests.clear()
    server.post("/generate", {"text": ["a", "b"], "cache_salt": "s"})
    assert [request.extra_key for request in server.service.requests] == ["1:s"] * 2


@pytest.mark.parametrize("name", ["extra_key", "cache_salt"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("value", [5, {"a": 1}, True])
def test_a_key_that_is_no_text_is_refused(
    server: LiveServer, door: str, name: str, value: object
) -> None:
    reply = server.post(door, {**DOORS[door], name: value})
    assert reply.status_code == 400
    assert name in reply.text
    assert server.service.requests == []
