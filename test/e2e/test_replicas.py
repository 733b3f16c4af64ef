"""A real server with two replicas of the model behind one port."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from e2e.server_process import ServerProcess, Traces, started_server, wait_until
from sglang.srt.utils.network import get_free_port
from srt.models.hf_models import VOCAB, hf_greedy, make_hf_model, save

NEW_TOKENS = 10
FLAGS = ("--skip-tokenizer-init", "--dtype", "float32", "--kv-memory-budget", "64MiB")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    long = {"max_position_embeddings": 4096}
    return save(make_hf_model("llama", **long), tmp_path_factory.mktemp("llama"))


@contextlib.contextmanager
def replicas(model: str, tmp: Path, *flags: str) -> Iterator[ServerProcess]:
    server = started_server("--model-path", model, *FLAGS, "--dp-size", "2", *flags, tmp=tmp)
    try:
        yield server
    finally:
        server.close()


def ask(server: ServerProcess, prompt: list[int], **fields: Any) -> dict[str, Any]:
    params = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    params |= fields.pop("params", {})
    body = {"input_ids": prompt, "sampling_params": params, **fields}
    reply = server.post("/generate", body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def states(server: ServerProcess) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = server.get("/server_info").json()["internal_states"]
    return listed


def hear(ear: zmq.Socket[bytes]) -> Any:
    assert ear.poll(20_000)
    return msgspec.msgpack.decode(ear.recv_multipart()[2])


def test_two_replicas_answer_as_one_model_until_one_dies(model: str, short_tmp: Path) -> None:
    """One server for all, as its start is what takes the time."""
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (3, 90, 200, 700)]
    reference = make_hf_model("llama", max_position_embeddings=4096)
    expected = [hf_greedy(reference, prompt, NEW_TOKENS) for prompt in prompts]
    base = get_free_port(2)
    events = json.dumps({"publisher": "zmq", "endpoint": f"tcp://*:{base}"})
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ears = [context.socket(zmq.SUB) for _ in range(2)]
    for rank, ear in enumerate(ears):
        ear.setsockopt(zmq.LINGER, 0)
        ear.subscribe(b"")
        ear.connect(f"tcp://127.0.0.1:{base + rank}")
    flags = ("--enable-metrics", "--kv-events-config", events)
    with replicas(model, short_tmp, *flags) as server:
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda prompt: ask(server, prompt), prompts))
        assert [answer["output_ids"] for answer in answers] == expected
        ranks = Counter(answer["meta_info"]["dp_rank"] for answer in answers)
        assert ranks == {0: 2, 1: 2}, "they take turns"

        # each has a cache of its own; a request may say where it wants to go
        answers = [ask(server, prompts[3], routed_dp_rank=rank) for rank in (0, 1, 0, 1)]
        assert [answer["meta_info"]["dp_rank"] for answer in answers] == [0, 1, 0, 1]
        assert all(answer["meta_info"]["cached_tokens"] == 699 for answer in answers[2:])
        refused = server.post("/generate", {"input_ids": [1], "routed_dp_rank": 2})
        assert (refused.status_code, "routed_dp_rank 2" in refused.text) == (400, True)

        for rank, ear in enumerate(ears):
            assert hear(ear)[2] == rank, "a batch names its replica"
        pools = [state["memory"] for state in states(server)]
        assert [pool["budget_bytes"] for pool in pools] == [64 << 20] * 2
        metrics = server.get("/metrics").text
        for rank in "01":
            assert f'sglang:num_running_reqs{{dp_rank="{rank}",model_name=' in metrics

        check_sessions(server, prompts[2])
        check_operations(server)
        check_aborts(server, prompts[1])
        check_death(server, short_tmp)
    for ear in ears:
        ear.close()
    context.term()


def check_sessions(server: ServerProcess, prompt: list[int]) -> None:
    """A session's requests go where its prefix is."""
    for _ in range(2):
        session = server.post("/open_session", {}).json()
        first = ask(server, prompt, session_params={"id": session})["meta_info"]
        rank, rid = first["dp_rank"], first["id"]
        for turn in (1, 2):
            more = ask(server, [turn, 2], session_params={"id": session, "rid": rid})["meta_info"]
            assert more["dp_rank"] == rank
            assert more["cached_tokens"] >= (more["prompt_tokens"] - 3) // 64 * 64  # whole pages
            rid = more["id"]
        prompt = prompt[1:]


def check_operations(server: ServerProcess) -> None:
    """What is asked of the server is done by every replica."""
    assert any(state["memory"]["pages"]["cached"] for state in states(server))
    assert server.post("/flush_cache?timeout=10", {}).status_code == 200
    assert [state["memory"]["pages"]["cached"] for state in states(server)] == [0, 0]
    changed = server.post("/set_kv_budget", {"bytes": 32 << 20})
    assert changed.status_code == 200, changed.text
    assert len(changed.json()["replicas"]) == 2
    assert [state["memory"]["budget_bytes"] for state in states(server)] == [32 << 20] * 2
    assert server.get("/health").status_code == 200
    assert server.get("/health_generate").status_code == 200


def check_aborts(server: ServerProcess, prompt: list[int]) -> None:
    """One request by its id, wherever it runs, and all at once."""
    for body in ({"rid": "long-1"}, {"abort_all": True}):
        with ThreadPoolExecutor(2) as threads:
            runs = [
                threads.submit(
                    ask, server, prompt, rid=f"long-{rank}", routed_dp_rank=rank,
                    params={"max_new_tokens": 3000},
                )
                for rank in (0, 1)
            ]  # fmt: skip
            assert wait_until(lambda: [len(s["requests"]) for s in states(server)] == [1, 1])
            assert server.post("/abort_request", body).status_code == 200
            ended = runs[1].result()["meta_info"]["finish_reason"]["type"]
            assert ended == "abort"
            if "rid" in body:
                assert wait_until(lambda: [len(s["requests"]) for s in states(server)] == [1, 0])
                server.post("/abort_request", {"rid": "long-0"})
            assert runs[0].result()["meta_info"]["finish_reason"]["type"] == "abort"


def check_death(server: ServerProcess, tmp: Path) -> None:
    """A dead replica ends the server, and is named."""
    traces = Traces.of(server, tmp)
    server.child("scheduler DP1").kill()
    assert server.wait_exit() != 0
    assert "scheduler DP1" in server.text
    assert "SIGKILL" in server.text
    traces.assert_gone()


@pytest.mark.slow
def test_replicas_of_two_ranks_each(model: str, short_tmp: Path) -> None:
    prompt = list(range(2, 40))
    reference = make_hf_model("llama", max_position_embeddings=4096)
    with replicas(model, short_tmp, "--tp", "2", "--dist-timeout", "60") as server:
        answers = [ask(server, prompt) for _ in range(2)]
        expected = hf_greedy(reference, prompt, NEW_TOKENS)
        assert [answer["output_ids"] for answer in answers] == [expected] * 2
        assert [answer["meta_info"]["dp_rank"] for answer in answers] == [0, 1]
        traces = Traces.of(server, short_tmp)
        server.child("scheduler DP1 TP1").kill()
        assert server.wait_exit() != 0
        assert "scheduler DP1 TP1" in server.text
        traces.assert_gone()


@pytest.mark.slow
def test_replicas_find_one_budget(model: str, short_tmp: Path) -> None:
    flags = ("--model-path", model, *FLAGS[:3], "--dp-size", "2", "--mem-fraction-static", "0.1")
    server = started_server(*flags, tmp=short_tmp)
    try:
        budgets = [state["memory"]["budget_bytes"] for state in states(server)]
        assert budgets[0] == budgets[1] > 0
    finally:
        server.close()


@pytest.mark.slow
def test_prefixes_are_followed(model: str, short_tmp: Path) -> None:
    prompts = [[start + i % 40 for i in range(300)] for start in (2, 60)]
    with replicas(model, short_tmp, "--load-balance-method", "cache_aware") as server:
        first = [ask(server, prompt)["meta_info"]["dp_rank"] for prompt in prompts]
        assert sorted(first) == [0, 1]
        for _ in range(2):
            for prompt, rank in zip(prompts, first, strict=True):
                info = ask(server, [*prompt, 7])["meta_info"]
                assert info["dp_rank"] == rank
                assert info["cached_tokens"] >= 256
