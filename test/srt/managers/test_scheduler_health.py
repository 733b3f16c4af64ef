"""Signs of life: beats while the main thread computes; a watchdog that knows slow from stuck."""

from __future__ import annotations

import queue

from sglang.srt.managers.io_struct import Heartbeat
from sglang.srt.managers.scheduler_health import HeartbeatThread, WatchdogThread


def test_beats_carry_what_is_read_at_that_moment() -> None:
    beats: queue.Queue[Heartbeat] = queue.Queue()
    count = 0

    def read() -> Heartbeat:
        nonlocal count
        count += 1
        return Heartbeat(count, True, 1, 2, 4096)

    thread = HeartbeatThread(read, beats.put, interval_s=0.001)
    thread.start()
    seen = [beats.get(timeout=10).progress for _ in range(3)]
    thread.close()
    assert seen == [1, 2, 3]
    assert count == 3 + beats.qsize()


class Scene:
    """A watchdog whose clock and scheduler the test moves."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self.now = 100.0
        self.progress = 5
        self.busy = True
        self.stalls: list[float] = []
        self.dog = WatchdogThread(
            lambda: (self.progress, self.busy), timeout_s, lambda: self.now, self.stalls.append
        )

    def after(self, seconds: float) -> bool:
        self.now += seconds
        return self.dog.check()


def test_a_long_step_that_progresses_is_left_alone() -> None:
    scene = Scene()
    for _ in range(50):
        scene.progress += 1
        assert not scene.after(9.0)
    assert scene.stalls == []


def test_idle_is_not_a_stall() -> None:
    scene = Scene()
    scene.busy = False
    for _ in range(5):
        assert not scene.after(1000.0)
    scene.busy = True
    assert not scene.after(9.0), "the clock starts when work arrives"
    assert scene.after(10.0)


def test_work_without_progress_is_reported_once_with_its_length() -> None:
    scene = Scene()
    assert not scene.after(0.0)
    assert not scene.after(9.0)
    assert scene.after(2.0)
    assert scene.stalls == [11.0]


def test_the_thread_ends_after_its_report() -> None:
    scene = Scene(timeout_s=0.004)
    scene.dog.check()
    scene.now += 1.0
    scene.dog.start()
    scene.dog._thread.join(10)
    assert not scene.dog._thread.is_alive()
    assert scene.stalls == [1.0]
