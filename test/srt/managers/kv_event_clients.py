"""A router's side of the sockets of cache events, for tests."""

from __future__ import annotations

import msgspec
import numpy as np
import zmq

from sglang.srt.managers.scheduler_kv_events import KVEventPublisher
from sglang.srt.mem_cache.kv_events import BlockRemoved, Cleared, KVEventBatch, Removed
from srt.mem_cache.event_mirror import Mirror

ANY_PORT = "tcp://127.0.0.1:*"
END = (-1, b"")
NOTHING = Removed(np.empty(0, np.int64))


class Subscriber:
    """A router's side: topic, number and batch of each message."""

    def __init__(self, endpoint: str | None = None, topic: str = "") -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.SUB)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt_string(zmq.SUBSCRIBE, topic)
        if endpoint is None:
            self.socket.bind(ANY_PORT)
            self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        else:
            self.socket.connect(endpoint)

    def receive(self, timeout_ms: int = 10_000) -> tuple[str, int, list[object]] | None:
        if not self.socket.poll(timeout_ms):
            return None
        topic, number, payload = self.socket.recv_multipart()
        return topic.decode(), int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)

    def join(self, publisher: KVEventPublisher) -> int:
        """Publish until the first message arrives; its number. A subscription takes a moment."""
        for _ in range(1000):
            publisher.publish([Cleared()])
            message = self.receive(20)
            if message is not None:
                return message[1]
        raise AssertionError("never connected")

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class ReplayClient:
    """A DEALER that asks as SGLang's router does: an empty frame, then the number."""

    def __init__(self, endpoint: str, receive_hwm: int = 1000) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, receive_hwm)
        self.socket.connect(endpoint)

    def ask(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames)

    def ask_from(self, start: int) -> None:
        self.ask(b"", start.to_bytes(8, "big", signed=True))

    def message(self, timeout_ms: int = 10_000) -> tuple[int, bytes] | None:
        """Number and payload of the next message, None when none comes in time."""
        if not self.socket.poll(timeout_ms):
            return None
        empty, number, payload = self.socket.recv_multipart()
        assert empty == b""
        assert len(number) == 8
        return int.from_bytes(number, "big", signed=True), payload

    def answer(self) -> list[tuple[int, bytes]]:
        """What comes before the end marker."""
        batches = []
        while (message := self.message()) != END:
            assert message is not None, "no end marker"
            batches.append(message)
        return batches

    def replay(self, start: int) -> list[tuple[int, bytes]]:
        self.ask_from(start)
        return self.answer()

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class Follower:
    """A router: hears live messages and asks the replay for those that it missed."""

    def __init__(self, publisher: KVEventPublisher) -> None:
        assert publisher.replay is not None
        self._publisher = publisher
        self._subscriber: Subscriber | None = None
        self._client = ReplayClient(publisher.replay.endpoint)
        self.mirror = Mirror()
        self.next = 0
        self.replayed: list[int] = []

    def connect(self) -> None:
        """Publish batches that change nothing until one arrives, and catch up to it."""
        self._subscriber = Subscriber(self._publisher.endpoint)
        for _ in range(1000):
            self._publisher.publish([NOTHING])
            if self._hear(20) is not None:
                return
        raise AssertionError("never connected")

    def lose_connection(self) -> None:
        """Hear nothing of what is published until `connect`."""
        assert self._subscriber is not None
        self._subscriber.close()
        self._subscriber = None

    def wait_for_replay(self, end: int) -> None:
        """Ask until every number below `end` can be had."""
        for _ in range(10_000):
            if self._client.replay(end - 1):
                return
        raise AssertionError("never published")

    def finish(self) -> None:
        """Hear everything that is published up to now."""
        self._publisher.publish([NOTHING, NOTHING])
        while (batch := self._hear(10_000)) is not None:
            if batch.events == [BlockRemoved([], "GPU")] * 2:
                return
        raise AssertionError("the last message never came")

    def _hear(self, timeout_ms: int) -> KVEventBatch | None:
        assert self._subscriber is not None
        message = self._subscriber.receive(timeout_ms)
        if message is None:
            return None
        _, number, values = message
        if number > self.next:
            for missed, payload in self._client.replay(self.next):
                self.replayed.append(missed)
                self._apply(missed, msgspec.msgpack.decode(payload, type=KVEventBatch))
        batch = msgspec.convert(values, KVEventBatch)
        if number >= self.next:  # else it came with the replay
            self._apply(number, batch)
        return batch

    def _apply(self, number: int, batch: KVEventBatch) -> None:
        assert number == self.next, "a gap"
        self.mirror.hear(batch)
        self.next += 1

    def close(self) -> None:
        if self._subscriber is not None:
            self._subscriber.close()
        self._client.close()
