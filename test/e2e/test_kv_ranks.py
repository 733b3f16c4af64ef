"""A real server whose requests' KV is spread over processes, over gloo."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from e2e.server_process import ServerProcess
from e2e.test_ranks import LONG, NEW_TOKENS, ask
from srt.models.hf_models import VOCAB, hf_greedy, make_hf_model, save

# Of one rank: 12 segments of 256 tokens, of which it holds 128 each.
TOKEN_BYTES = 4 * 2 * 2 * 16 * 3  # float32, K and V, 2 heads of 16, 3 layers
BUDGET = 12 * 128 * TOKEN_BYTES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_hf_model("llama", **LONG), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def server(model: str, short_tmp: Path) -> Iterator[ServerProcess]:
    flags = ("--skip-tokenizer-init", "--dtype", "float32", "--page-size", "16")
    memory = ("--kv-memory-budget", str(BUDGET), "--kv-segment-size", "256")
    ranks = ("--kv-parallel-size", "2", "--dist-timeout", "20")
    made = ServerProcess(
        "--model-path", model, *flags, *memory, *ranks, env={"TMPDIR": str(short_tmp)}
    )
    try:
        made.wait_ready()
        yield made
    finally:
        made.close()


def test_two_processes_share_a_context_that_neither_could_hold(
    model: str, server: ServerProcess
) -> None:
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (3, 1900, 90)]
    reference = make_hf_model("llama", **LONG)
    expected = [hf_greedy(reference, prompt, NEW_TOKENS) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(lambda prompt: ask(server, prompt), prompts)) == expected
    assert ask(server, prompts[1]) == expected[1], "from the cache, too"

    memory = server.get("/server_info").json()["memory"]
    assert memory["budget_bytes"] == BUDGET
    assert 1900 * TOKEN_BYTES > memory["budget_bytes"] >= memory["mapped_bytes"]
    assert memory["groups"][0]["segment_tokens"] == 256
    assert memory["groups"][0]["segment_bytes"] == 128 * TOKEN_BYTES

    smaller = server.post("/set_kv_budget", {"bytes": BUDGET // 3})
    assert smaller.status_code == 200, smaller.text
    assert ask(server, prompts[2]) == expected[2]
    assert server.get("/server_info").json()["memory"]["mapped_bytes"] <= BUDGET // 3
    server.post("/flush_cache", {})
    assert ask(server, prompts[0]) == expected[0]
