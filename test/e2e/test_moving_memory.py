"""The demo model while its memory moves: same tokens, and every door follows at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from e2e.server_process import ServerProcess, running_server, wait_until

SEGMENT = 64  # tokens
KEY = {"authorization": "Bearer administrator"}


@pytest.fixture(scope="module")
def moving() -> Iterator[ServerProcess]:
    """Small segments, float32 so that tokens are exact, the canary on."""
    flags = ("--dtype", "float32", "--kv-segment-size", str(SEGMENT), "--page-size", "16")
    keys = ("--admin-api-key", "administrator", "--kv-canary", "chain")
    with running_server(*flags, *keys) as server:
        yield server


def generate(server: ServerProcess, number: int) -> list[int]:
    body = {
        "text": f"Story {number}: " + "once upon a time " * 20,
        "sampling_params": {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True},
    }
    reply = server.post("/generate", body)
    assert reply.status_code == 200, reply.text
    ids: list[int] = reply.json()["output_ids"]
    return ids


def admin(server: ServerProcess, path: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = httpx.post(f"{server.url}{path}", json=body, headers=KEY, timeout=120)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def memory(server: ServerProcess) -> dict[str, Any]:
    found: Any = server.server_info()["memory"]
    return found


def test_requests_keep_their_tokens_while_the_budget_moves(moving: ServerProcess) -> None:
    alone = [generate(moving, number) for number in range(3)]
    before = memory(moving)["budget_bytes"]
    segment = memory(moving)["groups"][0]["segment_bytes"]
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(generate, moving, number) for number in range(3)]
        assert wait_until(lambda: memory(moving)["pages"]["used"] > 0)
        cuts = [
            admin(moving, "/set_kv_budget", {"bytes": count * segment}) for count in (5, 3, 6, 4)
        ]
        packed = admin(moving, "/compact_kv", {})
        together = [future.result() for future in running]
    assert together == alone
    assert [cut["reached_bytes"] for cut in cuts] == [count * segment for count in (5, 3, 6, 4)]
    assert all(cut["aborted"] == 0 for cut in cuts)
    assert any(cut["retracted"] + cut["moved_tokens"] + cut["evicted_tokens"] for cut in cuts)
    assert packed.keys() >= {"moved_pages", "moved_tokens", "emptied_segments", "released_bytes"}
    assert memory(moving)["mapped_bytes"] <= 4 * segment
    admin(moving, "/set_kv_budget", {"bytes": before})


def test_every_door_follows_the_budget_at_once(moving: ServerProcess) -> None:
    before, context = memory(moving)["budget_bytes"], memory(moving)["context_length"]
    segment = memory(moving)["groups"][0]["segment_bytes"]
    for count in (2, 1, 3):
        done = admin(moving, "/set_kv_budget", {"bytes": count * segment})
        assert done["context_length"] == count * SEGMENT
        card = moving.get("/v1/models").json()["data"][0]
        assert card["max_model_len"] == count * SEGMENT
        info = moving.server_info()
        assert info["max_total_num_tokens"] == count * SEGMENT
        assert info["max_req_input_len"] == count * SEGMENT - 1
        assert memory(moving)["context_length"] == count * SEGMENT
        assert memory(moving)["mapped_bytes"] <= count * segment
        too_long = moving.post("/generate", {"input_ids": [5] * (count * SEGMENT)})
        assert too_long.status_code == 400
        assert f"{count * SEGMENT} tokens" in too_long.text
    for body, key, status in (
        ({"bytes": segment - 1}, KEY, 400),
        ({"bytes": 2 * segment}, {}, 401),
    ):
        reply = httpx.post(f"{moving.url}/set_kv_budget", json=body, headers=key, timeout=60)
        assert reply.status_code == status, reply.text
    admin(moving, "/set_kv_budget", {"bytes": before})
    assert memory(moving)["context_length"] == context
