"""Answers routers that missed messages of the cache's events, on a ZeroMQ ROUTER socket.

The publisher's thread adds what it sends to a bounded buffer; requests are read and answered on a
thread of the replay's own. Made when `--kv-events-config` names a `replay_endpoint`. See
docs/kv_segments.md, Note [KV events].
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import zmq

logger = logging.getLogger(__name__)

_NUMBER_BYTES = 8
_END = ((-1).to_bytes(_NUMBER_BYTES, "big", signed=True), b"")
_LINGER_MS = 200
_LOG_INTERVAL_S = 60.0
_MAX_REQUEST_BYTES = 1024
"""A frame of more cuts the client off before it is read: a request has 8 bytes."""

Batch = tuple[int, bytes]


class ReplayBuffer:
    """The last `capacity` batches as (number, payload), numbers rising; safe between threads.

    Numbers may have gaps: what the publisher dropped from its queue was never here.
    """

    def __init__(self, capacity: int) -> None:
        self._kept: deque[Batch] = deque(maxlen=capacity)
        self._lock = threading.Lock()

    def add(self, number: int, payload: bytes) -> None:
        """Keep one batch; the oldest goes when there are too many."""
        with self._lock:
            self._kept.append((number, payload))

    def since(self, start: int) -> list[Batch] | None:
        """The kept batches from number `start` on; None when `start` is beyond the next number."""
        with self._lock:
            if start > (self._kept[-1][0] + 1 if self._kept else 0):
                return None
            newer = 0
            for number, _ in reversed(self._kept):
                if number < start:
                    break
                newer += 1
            return list(islice(self._kept, len(self._kept) - newer, None))


class KVEventReplay:
    """A request is [(empty,) number]; the answer is a message per kept batch and an end marker.

    Every message is [empty, number, payload]; numbers are 8 bytes, big-endian, and the marker has
    -1 and no payload. A bad request gets the marker only. Two whole answers wait for a client that
    does not read; the rest is dropped, without a marker. Raises ValueError when the endpoint can't
    be bound.
    """

    def __init__(
        self, endpoint: str, buffer_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._buffer = ReplayBuffer(buffer_steps)
        self._notes = _RareNotes(clock)
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        # ZeroMQ learns only after half a high-water mark that messages have been read, so twice an
        # answer is what leaves room for a whole one after a whole one was read.
        self._socket.setsockopt(zmq.SNDHWM, 2 * (buffer_steps + 1))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a full client is an error, not silence
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_REQUEST_BYTES)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.term()
            raise ValueError(f"--kv-events-config: replay {endpoint}: {error}") from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._stop = self._context.socket(zmq.PAIR)
        self._stop.bind("inproc://stop")
        self._stopped = self._context.socket(zmq.PAIR)
        self._stopped.connect("inproc://stop")
        self._thread = threading.Thread(target=self._run, name="kv-replay", daemon=True)
        self._thread.start()

    def add(self, number: int, payload: bytes) -> None:
        """Keep what is published under this number; never waits for a client."""
        self._buffer.add(number, payload)

    def close(self) -> None:
        """End the thread and the sockets; a second call does nothing."""
        if self._context.closed:
            return
        with suppress(zmq.Again):  # the thread has failed, nobody is there to be told
            self._stop.send(b"", zmq.NOBLOCK)
        self._thread.join()
        self._stop.close()
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._stopped, zmq.POLLIN)
        with self._stopped, self._socket:
            while self._stopped not in (ready := dict(poller.poll())):
                if self._socket in ready:
                    self._serve(self._socket.recv_multipart())

    def _serve(self, frames: Sequence[bytes]) -> None:
        client, *request = frames
        start = parse_start(request)
        batches = None if start is None else self._buffer.since(start)
        if batches is None:
            self._notes.warn("a request for no number that there is or comes next")
        answer = [(number.to_bytes(_NUMBER_BYTES, "big"), data) for number, data in batches or ()]
        try:
            for number, payload in (*answer, _END):
                self._socket.send_multipart((client, b"", number, payload), zmq.NOBLOCK)
        except zmq.Again:
            self._notes.warn("a client does not read what it asked for")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # it left: nobody waits for the rest
                raise

    def __repr__(self) -> str:
        return f"KVEventReplay({self.endpoint})"


def parse_start(request: Sequence[bytes]) -> int | None:
    """The number that a request, after the client's id, starts from; None for a bad request."""
    match request:
        case [number] | [b"", number] if len(number) == _NUMBER_BYTES:
            start = int.from_bytes(number, "big", signed=True)
            return start if start >= 0 else None
    return None


class _RareNotes:
    """Warnings that a client can cause: at most one line a minute, with a count of the others."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._next_s = float("-inf")
        self._num_silent = 0

    def warn(self, what: str) -> None:
        now = self._clock()
        if now < self._next_s:
            self._num_silent += 1
            return
        logger.warning("Replay of cache events: %s (and %d unlogged).", what, self._num_silent)
        self._next_s, self._num_silent = now + _LOG_INTERVAL_S, 0
