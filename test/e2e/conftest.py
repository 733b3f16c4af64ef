"""One real server with the demo model for all tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from e2e.server_process import ServerProcess, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """SmolLM2 with short idle times, so that memory comes back within a test.

    In float32: what shares a batch changes the rounding, and in bfloat16 that can flip a token.
    """
    with running_server(
        "--dtype",
        "float32",
        "--kv-idle-release-seconds",
        "0.5",
        "--prefix-cache-idle-seconds",
        "1",
        "--enable-metrics",
    ) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as made:
        yield made
