"""A server whose requests are larger than its memory: what it answers, and what it gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e2e.server_process import ServerProcess, running_server, wait_until

FLAGS = ("--dtype", "float32", "--context-length", "4096", "--kv-segment-size", "64")
IDLE = ("--kv-idle-release-seconds", "0.5", "--prefix-cache-idle-seconds", "10")
PROMPT = " ".join(f"Item {n} costs {n * 7 % 31} coins." for n in range(60)) + " Item 3 costs"


def ask(server: ServerProcess) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    reply = server.post("/generate", {"text": PROMPT, "sampling_params": params})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def memory(server: ServerProcess) -> dict[str, Any]:
    found: Any = server.server_info()["memory"]
    return found


def test_a_request_larger_than_the_pool_gets_the_same_tokens(
    server: ServerProcess, tmp_path: Path
) -> None:
    expected = ask(server)  # all in memory, also in float32
    disk = ("--kv-memory-budget", "6MiB", "--kv-disk-path", str(tmp_path))
    with running_server(*FLAGS, *IDLE, *disk, "--kv-disk-size", "256MiB") as small:
        assert memory(small)["context_length"] == 4096
        answer = ask(small)
        assert answer["output_ids"] == expected["output_ids"]
        held = memory(small)
        tokens = answer["meta_info"]["prompt_tokens"] + 24
        assert tokens * held["bytes_per_token"] > 4 * held["budget_bytes"]
        assert held["mapped_bytes"] <= held["budget_bytes"]
        assert held["disk_bytes"] > 3 * held["budget_bytes"]
        assert list(tmp_path.iterdir()) == [], "the file has no name"
        again = ask(small)  # from the cache, on disk as it is
        assert again["meta_info"]["cached_tokens"] > 0.9 * answer["meta_info"]["prompt_tokens"]
        assert again["output_ids"] == expected["output_ids"]
        assert wait_until(lambda: memory(small)["disk_bytes"] == 0, timeout_s=60)
        assert wait_until(lambda: memory(small)["mapped_bytes"] == 0, timeout_s=60)
