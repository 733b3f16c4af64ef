"""Signs of life: a heartbeat that long steps do not silence, and a watchdog on progress.

Both are threads that only read: torch releases the interpreter lock inside its operations, so
they run while a step computes. The watchdog measures time without progress, never the length of
a request: a 10M-token prefill that ticks every layer is healthy.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Callable

from sglang.srt.managers.io_struct import Heartbeat

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 0.25
WATCHDOG_EXIT_CODE = 75


class HeartbeatThread:
    """Calls `send(read())` every `interval_s` until closed; a failed send ends it quietly."""

    def __init__(
        self,
        read: Callable[[], Heartbeat],
        send: Callable[[Heartbeat], None],
        interval_s: float = HEARTBEAT_INTERVAL_S,
    ) -> None:
        self._read = read
        self._send = send
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop after at most one interval."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._send(self._read())


class WatchdogThread:
    """Ends the process when work is pending and nothing advanced for `timeout_s`.

    `read` gives (progress count, busy). `on_stall` is called once with the seconds stalled; the
    default writes every thread's stack to stderr and exits, so that the parent reports it.
    """

    def __init__(
        self,
        read: Callable[[], tuple[int, bool]],
        timeout_s: float,
        clock: Callable[[], float],
        on_stall: Callable[[float], None] | None = None,
    ) -> None:
        self._read = read
        self._timeout_s = timeout_s
        self._clock = clock
        self._on_stall = on_stall or _die
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._last_count = -1
        self._last_change = clock()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> bool:
        """Look once; True when the stall was reported (and nothing more will be watched)."""
        count, busy = self._read()
        now = self._clock()
        if count != self._last_count or not busy:
            self._last_count, self._last_change = count, now
            return False
        stalled = now - self._last_change
        if stalled < self._timeout_s:
            return False
        self._on_stall(stalled)
        return True

    def _run(self) -> None:
        while not self._stop.wait(min(1.0, self._timeout_s / 4)):
            if self.check():
                return


def _die(stalled_s: float) -> None:
    logger.error("No progress for %.0f s while work is pending: giving up", stalled_s)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stderr.flush()
    os._exit(WATCHDOG_EXIT_CODE)
