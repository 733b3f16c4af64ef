"""A server shared by the tests of a module, whose fake service starts clean for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from srt.entrypoints.fake_service import ANSWER, CONTEXT_LENGTH, CharTokenizer, LiveServer


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(
        tmp_path_factory.mktemp("model"), enable_metrics=True, enable_cache_report=True
    ) as server:
        yield server


@pytest.fixture
def server(shared_server: LiveServer) -> LiveServer:
    service = shared_server.service
    service.requests.clear()
    service.templates.clear()
    service.aborts.clear()
    service.hold_at.clear()
    service.refusals.clear()
    service.fail_at.clear()
    service.progress.clear()
    service.answer = ANSWER
    service.context_length = CONTEXT_LENGTH
    service.tokenizer = CharTokenizer()
    service.healthy = service.flushable = True
    service.state_error = None
    for mailbox in (service.started, service.ended):
        while not mailbox.empty():
            mailbox.get_nowait()
    return shared_server
