"""Our servers behind the real sglang-router.

The package is 89 MB and no dependency of the tests: it may be installed here, or in an environment
of its own whose Python the variable SGLANG_ROUTER_PYTHON names. Skipped where there is neither.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import httpx
import openai
import pytest

from e2e.server_process import ServerProcess, running_server, wait_until
from sglang.srt.utils.network import get_free_port

ROUTER_PYTHON = os.environ.get("SGLANG_ROUTER_PYTHON") or (
    sys.executable if find_spec("sglang_router") else None
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ROUTER_PYTHON is None, reason="sglang-router is not installed"),
]


@contextlib.contextmanager
def router(*servers: ServerProcess) -> Iterator[httpx.Client]:
    """A router in front of the servers that goes by their caches."""
    assert ROUTER_PYTHON is not None
    port = get_free_port()
    command = [ROUTER_PYTHON, "-m", "sglang_router.launch_router", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--prometheus-port", str(get_free_port())]
    command += ["--policy", "cache_aware", "--worker-urls", *(server.url for server in servers)]
    command += ["--health-check-interval-secs", "1", "--health-failure-threshold", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            assert wait_until(lambda: len(healthy(client)) == len(servers), 60)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def healthy(client: httpx.Client) -> list[str]:
    try:
        workers = client.get("/workers").json()["workers"]
    except httpx.HTTPError:
        return []
    return [worker["url"] for worker in workers if worker["is_healthy"]]


def ask(client: httpx.Client, text: str) -> dict[str, Any]:
    params = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
    reply = client.post("/generate", json={"text": text, "sampling_params": params})
    assert reply.status_code == 200, reply.text
    info: dict[str, Any] = reply.json()["meta_info"]
    return info


def test_prompts_go_to_the_server_that_has_their_beginning() -> None:
    flags = ("--cpu-threads", "1")
    with running_server(*flags) as one, running_server(*flags) as two, router(one, two) as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
        assert "SmolLM2" in name, "the router knows the model by /model_info and /server_info"
        beginnings = [f"{word} " * 300 for word in ("river", "stone")]
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda text: ask(client, text), beginnings))
        for number in range(2):
            for text in beginnings:
                assert ask(client, f"{text} {number}")["cached_tokens"] >= 256

        loads = client.get("/get_loads").json()["workers"]
        assert [load["load"] for load in loads] == [0, 0], "by /get_load"
        with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none") as api:
            chat = api.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Hi"}], max_tokens=3
            )
            assert chat.usage is not None
            assert chat.usage.completion_tokens == 3
        assert client.post("/flush_cache").json()["status"] == "success"

        two.process.kill()
        assert wait_until(lambda: healthy(client) == [one.url], 30), "the router marks it"
        for number in range(4):
            assert ask(client, f"after it, {number}")["completion_tokens"] == 4
