"""Routers that join late or miss messages, against a publisher with a replay socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sglang.srt.managers.scheduler_kv_events import KVEventPublisher, open_publisher
from sglang.srt.mem_cache.kv_events import Cleared, Stored
from srt.managers import scheduler_harness
from srt.managers.kv_event_clients import ANY_PORT, Follower, ReplayClient, Subscriber
from srt.managers.scheduler_harness import Harness
from srt.mem_cache.event_mirror import PAGE, blocks_of, live
from srt.mem_cache.memory_driver import MemoryDriver, make_memory


class Stage:
    """A publisher, a cache that it tells of, and followers of it."""

    def __init__(self, publisher: KVEventPublisher) -> None:
        self.publisher = publisher
        self._followers: list[Follower] = []
        self.memory, backing = make_memory(
            page_size=PAGE, event_sink=publisher.publish, budget_segments=3, max_cached_tokens=24
        )
        self._driver = MemoryDriver(self.memory, backing)
        self._turn = 0

    def follower(self) -> Follower:
        made = Follower(self.publisher)
        self._followers.append(made)
        return made

    def live(self, num_turns: int) -> None:
        for turn in range(self._turn, self._turn + num_turns):
            tokens = [1] * 4 + [turn % 3] * 4 + [turn] * 5
            live(self._driver, tokens, "b" if turn % 4 == 3 else None)
            self._driver.boundary(1.0)
        self._turn += num_turns

    def close(self) -> None:
        for follower in self._followers:
            follower.close()
        self.publisher.close()


@pytest.fixture(params=["tcp", "ipc"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(open_with_replay(tmp_path if request.param == "ipc" else None))
    yield made
    made.close()


def open_with_replay(directory: Path | None = None, **values: object) -> KVEventPublisher:
    first, second = (ANY_PORT, ANY_PORT)
    if directory is not None:
        first, second = f"ipc://{directory}/events", f"ipc://{directory}/replay"
    config = {"publisher": "zmq", "endpoint": first, "replay_endpoint": second, **values}
    publisher = open_publisher(json.dumps(config))
    assert publisher is not None
    return publisher


def test_who_joins_late_knows_what_a_follower_from_the_start_knows(stage: Stage) -> None:
    early = stage.follower()
    early.connect()
    stage.live(9)
    late = stage.follower()
    late.wait_for_replay(early.next + 9)
    late.connect()
    stage.live(9)
    early.finish()
    late.finish()
    assert late.mirror.blocks == early.mirror.blocks
    assert set(late.mirror.blocks.values()) == blocks_of(stage.memory) != set()
    assert "BlockRemoved" in late.mirror.kinds
    assert late.mirror.kinds.count("BlockStored") == early.mirror.kinds.count("BlockStored") >= 18
    assert late.replayed[:9] == list(range(9))


def test_lost_messages_are_asked_for_again(stage: Stage) -> None:
    follower = stage.follower()
    follower.connect()
    stage.live(4)
    follower.finish()
    for _ in range(3):
        known, already = follower.next, len(follower.replayed)
        follower.lose_connection()
        stage.live(5)
        follower.wait_for_replay(known + 5)
        follower.connect()
        missed = follower.replayed[already:]
        # The last one may be kept and not sent yet when the follower is back.
        assert missed[:4] == list(range(known, known + 4)), "only what was missed"
        stage.live(2)
        follower.finish()
        assert set(follower.mirror.blocks.values()) == blocks_of(stage.memory) != set()


def test_both_sockets_say_the_same_under_the_same_number() -> None:
    publisher = open_with_replay(topic="kv")
    assert publisher.replay is not None
    subscriber, client = Subscriber(publisher.endpoint), ReplayClient(publisher.replay.endpoint)
    number = subscriber.join(publisher) + 1
    for _ in range(5):
        publisher.publish([Cleared()])
    heard = []
    while not heard or heard[-1][0] < number + 4:
        assert subscriber.socket.poll(10_000)
        _, frame, payload = subscriber.socket.recv_multipart()
        heard.append((int.from_bytes(frame, "big"), payload))
    assert client.replay(number) == [(n, payload) for n, payload in heard if n >= number]
    for thing in (subscriber, client, publisher):
        thing.close()


def test_a_late_joiner_sees_that_the_buffer_is_too_short() -> None:
    publisher = open_with_replay(buffer_steps=4)
    assert publisher.replay is not None
    client = ReplayClient(publisher.replay.endpoint)
    for _ in range(10):
        publisher.publish([Cleared()])
    while not client.replay(9):
        pass
    assert [number for number, _ in client.replay(0)] == [6, 7, 8, 9]
    client.close()
    publisher.close()


def test_a_client_that_never_reads_delays_neither_publishing_nor_the_end() -> None:
    publisher = open_with_replay(buffer_steps=50)
    assert publisher.replay is not None
    dead = ReplayClient(publisher.replay.endpoint, receive_hwm=1)
    client = ReplayClient(publisher.replay.endpoint)
    tokens = np.zeros(100_000, np.int32)  # answers of 5 MB, more than the sockets' buffers take
    stored = Stored(np.zeros(1, np.int64), None, tokens, len(tokens), None)
    for number in range(100):
        publisher.publish([stored])
        dead.ask_from(max(0, number - 50))
    while not client.replay(99):
        pass
    assert [number for number, _ in client.replay(0)] == list(range(50, 100))
    closer = threading.Thread(target=publisher.close)
    closer.start()
    closer.join(20)
    assert not closer.is_alive()
    dead.close()
    client.close()


def test_an_address_in_use_leaves_no_socket_behind() -> None:
    first, free = open_with_replay(), open_with_replay()
    assert first.replay is not None
    assert free.replay is not None
    free.close()
    taken = first.endpoint.replace("127.0.0.1", "0.0.0.0")
    with pytest.raises(ValueError, match="in use"):
        open_with_replay(endpoint=taken, replay_endpoint=free.replay.endpoint)
    with pytest.raises(ValueError, match=r"--kv-events-config: replay .*in use"):
        open_with_replay(replay_endpoint=first.replay.endpoint)
    again = open_with_replay(replay_endpoint=free.replay.endpoint)
    assert free.replay.endpoint in repr(again)
    again.close()
    first.close()


@pytest.mark.parametrize("overlap", [True, False])
def test_a_schedulers_cache_is_known_from_the_replay_alone(overlap: bool) -> None:
    publisher = open_with_replay()
    assert publisher.replay is not None
    memory = scheduler_harness.make_memory(page_size=PAGE, event_sink=publisher.publish)
    harness = Harness(memory, page_size=PAGE, overlap=overlap)
    for name, first in (("one", 100), ("two", 300), ("three", 100)):
        harness.send(name, list(range(first, first + 40)), max_new=4)
        harness.run()
        harness.turn(2)
    late = Follower(publisher)
    late.connect()
    late.finish()
    assert set(late.mirror.blocks.values()) == blocks_of(memory)
    assert len(late.mirror.blocks) == memory.cache.num_pages >= 20
    late.close()
    publisher.close()
