"""What the text side knows of the scheduler's health: its readiness, its heartbeats, its end.

Fed by the TokenizerManager, read by /health and the request checks. Reads the clock that it was
given and decides; it sends nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from sglang.srt.managers.io_struct import Heartbeat, SchedulerReady


class SchedulerPulse:
    """Health of one scheduler; lives on one event loop.

    `limit_s`: seconds without a heartbeat, or busy without progress, that count as unhealthy.
    `ready` is None while starting, `failure` the reason once it died or the server stops.
    """

    def __init__(self, limit_s: float, clock: Callable[[], float]) -> None:
        self.ready: SchedulerReady | None = None
        self.failure: str | None = None
        self.last_heartbeat: Heartbeat | None = None
        self._limit_s = limit_s
        self._clock = clock
        self._heard_at = 0.0
        self._progress_at = 0.0
        self._idle = asyncio.Event()
        self._failed = asyncio.Event()

    @property
    def context_length(self) -> int:
        """The effective context length in tokens, as last heard; 0 before ready."""
        if self.last_heartbeat is not None:
            return self.last_heartbeat.context_length
        return 0 if self.ready is None else self.ready.context_length

    def scheduler_ready(self, ready: SchedulerReady) -> None:
        """The scheduler has loaded its model."""
        self.ready = ready
        self._heard_at = self._progress_at = self._clock()

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
        last = self.last_heartbeat
        if last is None or not last.busy or heartbeat.progress != last.progress:
            self._progress_at = now
        self._heard_at = now
        self.last_heartbeat = heartbeat
        if heartbeat.busy:
            self._idle.clear()
        else:
            self._idle.set()

    def note_context_length(self, context_length: int) -> None:
        """The scheduler said that the effective context is another one now."""
        if self.last_heartbeat is not None:
            self.last_heartbeat = msgspec.structs.replace(
                self.last_heartbeat, context_length=context_length
            )
        elif self.ready is not None:
            self.ready = msgspec.structs.replace(self.ready, context_length=context_length)

    def is_healthy(self, now: float | None = None) -> bool:
        """Ready, heard within the limit, and idle or with progress within the limit."""
        now = self._clock() if now is None else now
        if self.ready is None or self.failure is not None or now - self._heard_at > self._limit_s:
            return False
        busy = self.last_heartbeat is not None and self.last_heartbeat.busy
        return not busy or now - self._progress_at <= self._limit_s

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait for the next heartbeat that says idle (or the end); False after `timeout_s`."""
        self._idle.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
