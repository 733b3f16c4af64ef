"""A server whose requests are larger than its memory: what it answers, and what it gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from e2e.server_process import ServerProcess, running_server, wait_until
from srt.models.hf_models import VOCAB, hf_greedy, make_hf_model, save

NEW_TOKENS = 24
FLAGS = ("--skip-tokenizer-init", "--dtype", "float32", "--context-length", "4096")
IDLE = ("--kv-idle-release-seconds", "0.5", "--prefix-cache-idle-seconds", "10")
PROMPT = [(7 * number * number + 3 * number) % VOCAB for number in range(900)]
SEGMENT = 64  # tokens


def ask(server: ServerProcess) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    reply = server.post("/generate", {"input_ids": PROMPT, "sampling_params": params})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def memory(server: ServerProcess) -> dict[str, Any]:
    found: Any = server.server_info()["memory"]
    return found


def test_a_request_larger_than_the_pool_gets_the_same_tokens(tmp_path: Path) -> None:
    model = make_hf_model("llama", max_position_embeddings=4096)
    (tmp_path / "model").mkdir()
    path = save(model, tmp_path / "model")
    expected = hf_greedy(model, PROMPT, NEW_TOKENS)
    assert len(set(expected)) > 5
    token_bytes = 3 * 2 * 2 * 16 * 4  # layers, K and V, heads, numbers, bytes
    (disk := tmp_path / "disk").mkdir()
    flags = (
        *("--model-path", path, *FLAGS, *IDLE, "--kv-segment-size", str(SEGMENT)),
        *("--kv-memory-budget", str(3 * SEGMENT * token_bytes)),
        *("--kv-disk-path", str(disk), "--kv-disk-size", "16MiB"),
    )
    with running_server(*flags) as server:
        assert memory(server)["context_length"] == 4096
        answer = ask(server)
        assert answer["output_ids"] == expected
        held = memory(server)
        assert held["bytes_per_token"] == token_bytes
        tokens = len(PROMPT) + NEW_TOKENS
        assert tokens * token_bytes > 4 * held["budget_bytes"]
        assert held["mapped_bytes"] <= held["budget_bytes"]
        assert held["disk_bytes"] > 3 * held["budget_bytes"]
        assert list(disk.iterdir()) == [], "the file has no name"
        again = ask(server)  # from the cache, on disk as it is
        assert again["meta_info"]["cached_tokens"] > 0.9 * len(PROMPT)
        assert again["output_ids"] == expected
        assert wait_until(lambda: memory(server)["disk_bytes"] == 0, timeout_s=60)
        assert wait_until(lambda: memory(server)["mapped_bytes"] == 0, timeout_s=60)
