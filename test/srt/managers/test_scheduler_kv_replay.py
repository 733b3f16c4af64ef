from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from sglang.srt.managers.scheduler_kv_replay import KVEventReplay, ReplayBuffer, parse_start
from srt.managers.kv_event_clients import ANY_PORT, END, ReplayClient


class Pair:
    """A replay socket and a client of it."""

    def __init__(self, endpoint: str, steps: int) -> None:
        self.now = 0.0
        self.replay = KVEventReplay(endpoint, steps, clock=lambda: self.now)
        self.client = ReplayClient(self.replay.endpoint)

    def fill(self, first: int, end: int, size: int = 3) -> list[tuple[int, bytes]]:
        batches = [(number, bytes([number % 251]) * size) for number in range(first, end)]
        for number, payload in batches:
            self.replay.add(number, payload)
        return batches

    def close(self) -> None:
        self.client.close()
        self.replay.close()


@pytest.fixture(params=["tcp", "ipc"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    made = Pair(ANY_PORT if request.param == "tcp" else f"ipc://{tmp_path}/replay", steps=8)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("request_frames", "start"),
    [
        ([b"", (5).to_bytes(8, "big")], 5),
        ([(5).to_bytes(8, "big")], 5),
        ([b"", bytes(8)], 0),
        ([b"", b"\xff" * 8], None),
        ([b"", b"\0" * 7], None),
        ([b"", b"\0" * 9], None),
        ([b"x", bytes(8)], None),
        ([b"", bytes(8), b""], None),
        ([b""], None),
        ([], None),
    ],
)
def test_a_request_is_a_number_after_an_empty_frame_or_alone(
    request_frames: list[bytes], start: int | None
) -> None:
    assert parse_start(request_frames) == start


def test_the_buffer_keeps_the_last_batches_and_knows_what_comes_next() -> None:
    buffer = ReplayBuffer(3)
    assert buffer.since(0) == []
    assert buffer.since(1) is None
    for number in (0, 1, 4, 5):  # 2 and 3 were dropped before they were sent
        buffer.add(number, b"%d" % number)
    assert buffer.since(0) == [(1, b"1"), (4, b"4"), (5, b"5")]
    assert buffer.since(2) == buffer.since(4) == [(4, b"4"), (5, b"5")]
    assert buffer.since(6) == []
    assert buffer.since(7) is None


def test_every_batch_from_the_number_on_and_an_end(pair: Pair) -> None:
    assert pair.client.replay(0) == []
    batches = pair.fill(0, 5)
    assert pair.client.replay(0) == batches
    assert pair.client.replay(3) == batches[3:]
    assert pair.client.replay(5) == []


def test_an_older_start_than_the_buffer_shows_in_the_first_number(pair: Pair) -> None:
    batches = pair.fill(0, 20)
    assert pair.client.replay(2) == batches[-8:]


def test_frames_are_those_of_a_dealer_without_an_empty_frame_and_of_a_req(pair: Pair) -> None:
    pair.fill(0, 1)
    pair.client.ask(bytes(8))
    assert pair.client.socket.recv_multipart() == [b"", bytes(8), b"\0\0\0"]
    assert pair.client.socket.recv_multipart() == [b"", b"\xff" * 8, b""]
    with pair.client.context.socket(zmq.REQ) as req:
        req.connect(pair.replay.endpoint)
        req.send(bytes(8))
        assert req.recv_multipart() == [bytes(8), b"\0\0\0"]


def test_a_bad_request_gets_the_end_and_one_line_a_minute(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    pair.fill(0, 3)
    with caplog.at_level(logging.WARNING):
        for number in (b"", b"\0" * 7, b"\xff" * 8, (4).to_bytes(8, "big"), b"\x7f" * 8):
            pair.client.ask(b"", number)
            assert pair.client.message() == END
        assert len(caplog.records) == 1
        pair.now = 61.0
        pair.client.ask(b"", b"")
        assert pair.client.message() == END
        assert [r.getMessage()[-17:] for r in caplog.records] == [
            "(and 0 unlogged).",
            "(and 4 unlogged).",
        ]
        assert len(pair.client.replay(3)) == 0, "up to date is no mistake"
        assert len(caplog.records) == 2
    assert len(pair.client.replay(0)) == 3


def test_many_answers_in_a_row_are_whole(pair: Pair) -> None:
    batches = pair.fill(0, 8)
    for _ in range(50):
        assert pair.client.replay(0) == batches


def test_a_client_that_never_reads_holds_up_nobody(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    dead = ReplayClient(pair.replay.endpoint, receive_hwm=1)
    batches = pair.fill(0, 8, size=1 << 20)  # more than the socket's buffers take
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            dead.ask_from(0)
        for _ in range(1000):  # its requests are read between these
            assert pair.client.replay(7) == batches[7:]
            if caplog.records:
                break
    assert "does not read" in caplog.text
    assert pair.client.replay(0) == batches
    pair.fill(8, 9)
    assert [number for number, _ in pair.client.replay(8)] == [8]
    closer = threading.Thread(target=pair.replay.close)
    closer.start()
    closer.join(10)
    assert not closer.is_alive()
    dead.close()


def test_a_client_that_leaves_before_its_answer_harms_nobody(pair: Pair) -> None:
    batches = pair.fill(0, 8)
    for _ in range(20):
        gone = ReplayClient(pair.replay.endpoint)
        gone.ask_from(0)
        gone.close()
    assert pair.client.replay(0) == batches


def test_a_huge_request_cuts_off_its_sender_only(pair: Pair) -> None:
    batches = pair.fill(0, 2)
    loud = ReplayClient(pair.replay.endpoint)
    loud.ask(b"", bytes(1 << 20))
    assert pair.client.replay(0) == batches
    assert loud.message(200) is None
    loud.close()


def test_close_frees_the_address_and_may_be_called_twice() -> None:
    replay = KVEventReplay(ANY_PORT, 2)
    endpoint = replay.endpoint
    with pytest.raises(ValueError, match=r"--kv-events-config: replay .*in use"):
        KVEventReplay(endpoint, 2)
    assert endpoint in repr(replay)
    replay.close()
    replay.close()
    KVEventReplay(endpoint, 2).close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_close_returns_when_the_thread_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = threading.Event()

    def fail(self: KVEventReplay, frames: object) -> None:
        reached.set()
        raise RuntimeError("a bug")

    monkeypatch.setattr(KVEventReplay, "_serve", fail)
    replay = KVEventReplay(ANY_PORT, 2)
    client = ReplayClient(replay.endpoint)
    client.ask_from(0)
    assert reached.wait(10)
    replay.close()
    client.close()
