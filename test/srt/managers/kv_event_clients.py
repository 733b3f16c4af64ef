"""A router's side of the replay socket, for tests."""

from __future__ import annotations

import zmq

END = (-1, b"")


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
