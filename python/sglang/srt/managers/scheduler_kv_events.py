"""Publishes the prefix cache's events on a ZeroMQ PUB socket, from a thread of its own.

The scheduler only appends to a bounded queue; spelling out, encoding and sending happen on the
thread. Made when `--kv-events-config` asks for it; with a `replay_endpoint`, what was sent can be
asked for again. See docs/kv_segments.md, Note [KV events].
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq

from sglang.srt.configs.kv_events_config import KVEventsConfig
from sglang.srt.managers.scheduler_kv_replay import KVEventReplay
from sglang.srt.mem_cache.kv_events import KVEvent, KVEventBatch
from sglang.srt.utils.rendezvous import ALONE, RankPlace

logger = logging.getLogger(__name__)

_LINGER_MS = 200


class KVEventPublisher:
    """Each `publish` is one message of three frames: topic, number, batch in msgpack.

    Numbers count from 0, 8 bytes, big-endian. A batch that finds the queue full pushes out the
    oldest one, and a slow subscriber misses messages: the gap in the numbers tells, and whoever
    sees one has to ask the replay, which goes by the same numbers, or forget what it knows. What
    the queue dropped, the replay lacks too. Raises ValueError when an endpoint can't be used.
    """

    def __init__(
        self,
        config: KVEventsConfig,
        clock: Callable[[], float] = time.time,
        dp_rank: int | None = None,
    ) -> None:
        self._clock = clock
        self._dp_rank = dp_rank  # told with every batch; None: there are no replicas
        self._topic = config.topic.encode()
        self._queue: deque[tuple[int, Sequence[KVEvent]]] = deque()
        self._max_queued = config.max_queue_size
        self._changed = threading.Condition()
        self._closing = False
        self._next_number = 0
        self.num_dropped = 0
        self._encoder = msgspec.msgpack.Encoder()
        self.replay: KVEventReplay | None = None
        if config.replay_endpoint is not None:
            self.replay = KVEventReplay(config.replay_endpoint, config.buffer_steps)
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.setsockopt(zmq.SNDHWM, config.hwm)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        try:
            (self._socket.bind if config.binds else self._socket.connect)(config.endpoint)
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.term()
            if self.replay is not None:
                self.replay.close()
            raise ValueError(f"--kv-events-config: {config.endpoint}: {error}") from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def publish(self, events: Sequence[KVEvent]) -> None:
        """Queue one batch; never blocks."""
        with self._changed:
            if len(self._queue) >= self._max_queued:
                self._queue.popleft()
                self.num_dropped += 1
            self._queue.append((self._next_number, events))
            self._next_number += 1
            self._changed.notify()

    def close(self) -> None:
        """Send what is queued and end the thread; a second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self.replay is not None:
            self.replay.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
                number, events = self._queue.popleft()
            batch = KVEventBatch(
                self._clock(), [event.to_wire() for event in events], self._dp_rank
            )
            payload = self._encoder.encode(batch)
            if self.replay is not None:  # before it is sent: who hears of it can ask for it
                self.replay.add(number, payload)
            self._socket.send_multipart((self._topic, number.to_bytes(8, "big"), payload))
        self._socket.close()
        self._context.term()

    def __repr__(self) -> str:
        return (
            f"KVEventPublisher({self.endpoint}, sent={self._next_number - len(self._queue)}, "
            f"dropped={self.num_dropped}, replay={self.replay})"
        )


def open_publisher(config_json: str | None, place: RankPlace = ALONE) -> KVEventPublisher | None:
    """The publisher of cache events that the flag asks for, None when it asks for none.

    Each replica has its own, at ports that follow the first one's. Raises ValueError when an
    endpoint can't be used.
    """
    config = KVEventsConfig.from_json(config_json or "{}")
    if not config.enabled:
        return None
    dp_rank = place.dp_rank if place.dp_size > 1 else None
    publisher = KVEventPublisher(config.for_replica(place.dp_rank), dp_rank=dp_rank)
    logger.info("Publishing cache events: %r", publisher)
    return publisher
