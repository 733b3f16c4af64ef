"""What the text side knows of its schedulers' health: their readiness, heartbeats, end.

Fed by the TokenizerManager, read by /health and the request checks. Reads the clock that it was
given and decides; it sends nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from sglang.srt.managers.io_struct import Heartbeat, SchedulerReady


class _Replica:
    """When one scheduler was last heard, and when it last got on."""

    def __init__(self) -> None:
        self.last: Heartbeat | None = None
        self.heard_at = 0.0
        self.progress_at = 0.0
        self.idle_since_asked = False


class SchedulerPulse:
    """Health of the schedulers, one for each replica; lives on one event loop.

    `limit_s`: seconds without a heartbeat, or busy without progress, that count as unhealthy.
    `ready` is None while starting, `failure` the reason once one died or the server stops.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float], num_replicas: int = 1) -> None:
        self.ready: SchedulerReady | None = None
        self.failure: str | None = None
        self._replicas = [_Replica() for _ in range(num_replicas)]
        self._limit_s = limit_s
        self._clock = clock
        self._idle = asyncio.Event()
        self._failed = asyncio.Event()

    @property
    def last_heartbeat(self) -> Heartbeat | None:
        """The last one; of several replicas the sum, with the least context. None before."""
        beats = [replica.last for replica in self._replicas if replica.last is not None]
        if len(beats) <= 1:
            return beats[0] if beats else None
        return Heartbeat(
            progress=sum(beat.progress for beat in beats),
            busy=any(beat.busy for beat in beats),
            num_running=sum(beat.num_running for beat in beats),
            num_waiting=sum(beat.num_waiting for beat in beats),
            context_length=min(beat.context_length for beat in beats),
        )

    @property
    def context_length(self) -> int:
        """The effective context length in tokens, as last heard; 0 before ready.

        Of several replicas the shortest: a request may come to any of them.
        """
        beats = [replica.last for replica in self._replicas if replica.last is not None]
        if beats:
            return min(beat.context_length for beat in beats)
        return 0 if self.ready is None else self.ready.context_length

    def scheduler_ready(self, ready: SchedulerReady) -> None:
        """All schedulers have loaded their model; `ready` is what the first one says."""
        self.ready = ready
        for replica in self._replicas:
            replica.heard_at = replica.progress_at = self._clock()

    def scheduler_failed(self, reason: str) -> None:
        """It is over; the first reason stays. Wakes those who wait for idleness."""
        if self.failure is None:
            self.failure = reason
        self._failed.set()
        self._idle.set()

    async def wait_failed(self) -> str:
        """Wait for the end and give its reason."""
        await self._failed.wait()
        return self.failure or ""

    def beat(self, heartbeat: Heartbeat) -> None:
        """Take a heartbeat, received now."""
        now = self._clock()
        replica = self._replicas[heartbeat.dp_rank]
        last = replica.last
        if last is None or not last.busy or heartbeat.progress != last.progress:
            replica.progress_at = now
        replica.heard_at = now
        replica.last = heartbeat
        replica.idle_since_asked = not heartbeat.busy
        if all(one.idle_since_asked for one in self._replicas):
            self._idle.set()
        else:
            self._idle.clear()

    def note_context_length(self, context_length: int, dp_rank: int = 0) -> None:
        """The scheduler said that the effective context is another one now."""
        replica = self._replicas[dp_rank]
        if replica.last is not None:
            replica.last = msgspec.structs.replace(replica.last, context_length=context_length)
        elif self.ready is not None:
            self.ready = msgspec.structs.replace(self.ready, context_length=context_length)

    def is_healthy(self, now: float | None = None) -> bool:
        """Ready, and every replica heard within the limit, and idle or with progress within it."""
        now = self._clock() if now is None else now
        if self.ready is None or self.failure is not None:
            return False
        return all(self._is_well(replica, now) for replica in self._replicas)

    def _is_well(self, replica: _Replica, now: float) -> bool:
        if now - replica.heard_at > self._limit_s:
            return False
        busy = replica.last is not None and replica.last.busy
        return not busy or now - replica.progress_at <= self._limit_s

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait for next heartbeats that all say idle (or the end); False after `timeout_s`."""
        self._idle.clear()
        for replica in self._replicas:
            replica.idle_since_asked = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
