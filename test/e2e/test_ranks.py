"""A real server whose model is computed by two processes over gloo."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from e2e.server_process import ServerProcess, Traces, started_server, wait_until
from srt.models.hf_models import VOCAB, hf_greedy, make_hf_model, save

TIMEOUT_S = 5
NEW_TOKENS = 12
LONG = {"max_position_embeddings": 2048}
SMALL = ("--skip-tokenizer-init", "--dtype", "float32", "--kv-memory-budget", "64MiB")
RANKS = ("--tp-size", "2", "--dist-timeout", str(TIMEOUT_S))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_hf_model("llama", **LONG), tmp_path_factory.mktemp("llama"))


def start(model: str, tmp: Path, *flags: str) -> ServerProcess:
    return started_server("--model-path", model, *SMALL, *flags, tmp=tmp)


@pytest.fixture
def server(model: str, short_tmp: Path) -> Iterator[ServerProcess]:
    made = start(model, short_tmp, *RANKS)
    yield made
    made.close()


def ask(server: ServerProcess, prompt: list[int], count: int = NEW_TOKENS) -> list[int]:
    params = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
    reply = server.post("/generate", {"input_ids": prompt, "sampling_params": params})
    assert reply.status_code == 200, reply.text
    ids: list[int] = reply.json()["output_ids"]
    return ids


def test_two_processes_answer_as_transformers_until_one_is_killed(
    model: str, server: ServerProcess, short_tmp: Path
) -> None:
    """One server for all, as its start is what takes the time."""
    rng = np.random.default_rng(4)
    # the second prompt is more than one frame of the broadcast
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (3, 1100, 90)]
    reference = make_hf_model("llama", **LONG)
    expected = [hf_greedy(reference, prompt, NEW_TOKENS) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        assert list(threads.map(lambda prompt: ask(server, prompt), prompts)) == expected
    assert ask(server, prompts[1]) == expected[1], "from the cache, too"

    budget = server.post("/set_kv_budget", {"bytes": 32 << 20})
    assert budget.status_code == 200, budget.text
    assert server.post("/flush_cache", {}).status_code == 200
    assert ask(server, prompts[2]) == expected[2]

    second = server.child("scheduler TP1")
    before = sum(second.cpu_times()[:2])
    assert not wait_until(lambda: server.process.poll() is not None, 1.5)
    assert sum(second.cpu_times()[:2]) - before < 0.5, "an idle rank sleeps"

    traces = Traces.of(server, short_tmp)
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(ask, server, prompts[0], 2000)
        assert wait_until(lambda: bool(server.requests()))
        second.kill()
        assert server.wait_exit(TIMEOUT_S + 10) != 0
        assert reply.exception() is not None
    assert "scheduler TP1" in server.text
    assert "rank 1" in server.text or "SIGKILL" in server.text
    traces.assert_gone()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_hangs_ends_the_server_in_time(
    server: ServerProcess, short_tmp: Path, victim: int
) -> None:
    assert len(ask(server, [1, 2, 3])) == NEW_TOKENS
    traces = Traces.of(server, short_tmp)
    server.child(f"scheduler TP{victim}").send_signal(signal.SIGSTOP)
    # the timeout, a meeting's interval, and the grace that a stopped process gets
    assert server.wait_exit(TIMEOUT_S + 8) != 0
    assert f"rank {victim} has not come to" in server.text
    traces.assert_gone()


@pytest.mark.slow
def test_a_polite_end_is_clean(server: ServerProcess, short_tmp: Path) -> None:
    traces = Traces.of(server, short_tmp)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_exit() == 0, server.text
    assert "Traceback" not in server.text
    traces.assert_gone()


@pytest.mark.slow
def test_a_model_that_can_not_be_divided_is_one_clear_line(tmp_path: Path) -> None:
    odd = make_hf_model("llama", hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    server = ServerProcess(
        *("--model-path", save(odd, tmp_path), "--skip-tokenizer-init", "--tp-size", "2")
    )
    try:
        assert server.wait_exit(60) != 0
        assert "attention heads (3) cannot be divided by tp_size 2" in server.text
        assert "Traceback" not in server.text
    finally:
        server.close()
