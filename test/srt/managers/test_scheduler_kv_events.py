from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from sglang.srt.configs.kv_events_config import KVEventsConfig
from sglang.srt.managers.scheduler_kv_events import KVEventPublisher, open_publisher
from sglang.srt.mem_cache.kv_events import (
    BlockRemoved,
    Cleared,
    KVEventBatch,
    Removed,
    Stored,
)
from srt.managers import scheduler_harness
from srt.managers.kv_event_clients import ANY_PORT, Subscriber
from srt.managers.scheduler_harness import Harness
from srt.mem_cache.event_mirror import PAGE, Mirror, blocks_of, live
from srt.mem_cache.memory_driver import MemoryDriver, make_memory


@pytest.fixture
def closing() -> Iterator[list[object]]:
    things: list[object] = []
    yield things
    for thing in things:
        thing.close()  # type: ignore[attr-defined]


def config(**values: object) -> KVEventsConfig:
    return KVEventsConfig.from_json(json.dumps({"publisher": "zmq", **values}))


def test_batches_arrive_numbered_in_order_as_arrays(closing: list[object]) -> None:
    publisher = KVEventPublisher(config(endpoint=ANY_PORT, topic="kv"), clock=lambda: 12.5)
    subscriber = Subscriber(publisher.endpoint, "kv")
    closing += [publisher, subscriber]
    last = subscriber.join(publisher)
    hashes = np.array([-5, 7], np.int64)
    tokens = np.array([1, 2, 3, 4], np.int32)
    publisher.publish([Stored(hashes, None, tokens, 2, "tenant"), Removed(hashes[:1])])
    publisher.publish([Stored(hashes, 9, tokens, 2, "tenant")])
    publisher.publish([Stored(hashes, None, tokens, 2, None)])
    found = []
    while len(found) < 3:
        message = subscriber.receive()
        assert message is not None
        if message[2][1] != [["AllBlocksCleared"]]:
            found.append(message)
    topics, numbers, batches = zip(*found, strict=True)
    assert set(topics) == {"kv"}
    assert list(numbers) == list(range(numbers[0], numbers[0] + 3))
    assert numbers[0] > last
    base = ["BlockStored", [-5, 7]]
    tail = [[1, 2, 3, 4], 2, None, "GPU", None]
    assert list(batches) == [
        [12.5, [[*base, None, *tail, [["tenant"], None]], ["BlockRemoved", [-5], "GPU"]], None],
        [12.5, [[*base, 9, *tail, None]], None],
        [12.5, [[*base, None, *tail, None]], None],
    ]


def test_it_connects_to_an_address_that_is_not_its_own(closing: list[object]) -> None:
    subscriber = Subscriber()
    publisher = KVEventPublisher(config(endpoint=subscriber.endpoint))
    closing += [publisher, subscriber]
    subscriber.join(publisher)


def test_close_sends_what_is_queued_and_may_be_called_twice(closing: list[object]) -> None:
    publisher = KVEventPublisher(config(endpoint=ANY_PORT))
    subscriber = Subscriber(publisher.endpoint)
    closing.append(subscriber)
    last = subscriber.join(publisher)
    for _ in range(50):
        publisher.publish([Cleared()])
    publisher.close()
    publisher.close()
    numbers = []
    while (message := subscriber.receive(500)) is not None:
        numbers.append(message[1])
    assert numbers[-50:] == list(range(numbers[-1] - 49, numbers[-1] + 1))
    assert numbers[0] == last + 1


class Held:
    """An event that keeps the thread busy until it may go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go = threading.Event()

    def to_wire(self) -> object:
        self.reached.set()
        self.go.wait()
        return Cleared().to_wire()


def test_a_full_queue_drops_the_oldest_and_the_numbers_tell(closing: list[object]) -> None:
    publisher = KVEventPublisher(config(endpoint=ANY_PORT, max_queue_size=2))
    subscriber = Subscriber(publisher.endpoint)
    closing += [publisher, subscriber]
    subscriber.join(publisher)
    held = Held()
    publisher.publish([held])  # type: ignore[list-item]
    held.reached.wait()
    dropped = publisher.num_dropped
    for _ in range(5):
        publisher.publish([Cleared()])
    assert publisher.num_dropped == dropped + 3
    held.go.set()
    publisher.close()
    numbers = []
    while (message := subscriber.receive(500)) is not None:
        numbers.append(message[1])
    assert [b - a for a, b in zip(numbers[-3:], numbers[-2:], strict=False)] == [4, 1]
    assert "dropped=" in repr(publisher)


def test_a_mirror_over_a_socket_holds_what_the_cache_holds(closing: list[object]) -> None:
    publisher = KVEventPublisher(config(endpoint=ANY_PORT))
    subscriber = Subscriber(publisher.endpoint)
    closing += [publisher, subscriber]
    last = subscriber.join(publisher)
    memory, backing = make_memory(
        page_size=PAGE, event_sink=publisher.publish, budget_segments=3, max_cached_tokens=24
    )
    driver, mirror = MemoryDriver(memory, backing), Mirror()
    for turn in range(12):
        live(driver, [1] * 4 + [turn % 3] * 4 + [turn] * 5, "b" if turn % 4 == 3 else None)
        driver.boundary(1.0)
    publisher.publish([Removed(np.empty(0, np.int64))])  # the end of the stream
    while True:
        message = subscriber.receive()
        assert message is not None
        assert message[1] == last + 1, "no gap"
        last = message[1]
        batch = msgspec.convert(message[2], KVEventBatch)
        if batch.events == [BlockRemoved([], "GPU")]:
            break
        mirror.hear(batch)
    assert set(mirror.blocks.values()) == blocks_of(memory) != set()
    assert "BlockRemoved" in mirror.kinds


def test_the_flag_opens_a_publisher_or_none(closing: list[object]) -> None:
    assert open_publisher(None) is None
    assert open_publisher('{"publisher": "null"}') is None
    assert open_publisher('{"publisher": "zmq", "enable_kv_cache_events": false}') is None
    publisher = open_publisher(json.dumps({"publisher": "zmq", "endpoint": ANY_PORT}))
    assert publisher is not None
    closing.append(publisher)
    with pytest.raises(ValueError, match=r"--kv-events-config: .*in use"):
        KVEventPublisher(config(endpoint=publisher.endpoint.replace("127.0.0.1", "0.0.0.0")))


@pytest.mark.parametrize("overlap", [True, False])
def test_a_scheduler_publishes_what_it_caches_at_its_step_boundaries(overlap: bool) -> None:
    mirror = Mirror()
    memory = scheduler_harness.make_memory(page_size=4, event_sink=mirror)
    harness = Harness(memory, page_size=4, overlap=overlap)
    harness.send("one", list(range(100, 140)), max_new=4)
    harness.run()
    harness.turn(2)
    assert len(mirror.blocks) == memory.cache.num_pages >= 10
    assert (None, tuple(range(100, 140))) in mirror.blocks.values()
    assert set(mirror.kinds) == {"BlockStored"}
