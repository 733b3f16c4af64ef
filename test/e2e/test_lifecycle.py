"""Start, end and death of the server's processes; nothing may be left behind."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from e2e.server_process import (
    ServerProcess,
    Traces,
    demo_model,
    gone,
    running_server,
    started_server,
    wait_until,
)
from e2e.test_long_prefill import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is there at once: of how processes end, its size tells nothing."""
    return tiny_model(tmp_path_factory.mktemp("tiny"))


TINY_FLAGS = ("--load-format", "dummy", "--skip-tokenizer-init")


def start(tmp: Path, tiny: str) -> ServerProcess:
    return started_server("--model-path", tiny, *TINY_FLAGS, tmp=tmp)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_polite_end_is_clean(short_tmp: Path, tiny: str, signum: signal.Signals) -> None:
    """Of a server with all that it can have, and of one without a tokenizer."""
    if signum == signal.SIGTERM:
        server = started_server("--model-path", demo_model(), tmp=short_tmp)
    else:
        server = start(short_tmp, tiny)
    try:
        traces = Traces.of(server, short_tmp)
        assert len(traces.processes) >= 3
        server.process.send_signal(signum)
        assert server.wait_exit() == 0, server.text
        traces.assert_gone()
        assert "Traceback" not in server.text
    finally:
        server.close()


@pytest.mark.parametrize("victim", ["scheduler", "detokenizer"])
def test_a_dead_child_ends_the_server_and_is_named(short_tmp: Path, tiny: str, victim: str) -> None:
    server = start(short_tmp, tiny)
    try:
        traces = Traces.of(server, short_tmp)
        server.child(victim).kill()
        assert server.wait_exit() != 0
        assert victim in server.text
        assert "SIGKILL" in server.text
        traces.assert_gone()
    finally:
        server.close()


def test_children_do_not_outlive_a_killed_server(short_tmp: Path, tiny: str) -> None:
    server = start(short_tmp, tiny)
    try:
        children = server.children()
        server.process.kill()
        server.wait_exit()
        assert wait_until(lambda: gone(children))
    finally:
        server.close()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model-path", "/no/such/model"), "/no/such/model"),
        (("--context-length", "10M"), "greater than"),
        (("--kv-memory-budget", "4KiB"), "cannot hold"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(
    tiny: str, flags: tuple[str, ...], said: str
) -> None:
    server = ServerProcess("--model-path", tiny, *TINY_FLAGS, *flags)
    try:
        assert server.wait_exit(60) != 0
        assert said in server.text
        assert "Traceback" not in server.text
    finally:
        server.close()


def test_ten_million_tokens_of_context_cost_nothing_at_start(tiny: str) -> None:
    resident = {}
    for context in ("8192", "10000000"):
        with running_server(
            *("--model-path", tiny, *TINY_FLAGS, "--kv-memory-budget", "256MiB"),
            *("--context-length", context),
            env={"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"},
        ) as server:
            resident[context] = server.resident_bytes()
            info = server.server_info()["memory"]
            models = server.get("/v1/models").json()["data"]
    assert resident["10000000"] < 1.05 * resident["8192"]
    assert isinstance(info, dict)
    assert info["context_length_requested"] == 10_000_000
    effective = info["context_length"]
    assert models[0]["max_model_len"] == effective < 10_000_000
    assert f"{effective:,}" in server.text, "the warning states both numbers"
    assert "10,000,000" in server.text
