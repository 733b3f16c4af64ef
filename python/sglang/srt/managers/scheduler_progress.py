"""How far long prefills have come: what is logged, listed and told to clients that ask.

Fed with computed steps by the scheduler, on its clock. Everything is throttled here, so a step
costs a few operations for each prompt in it, whatever the length of the prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang.srt.managers.io_struct import BatchProgressOut, PrefillProgress
from sglang.srt.managers.schedule_batch import Req, ReqState, ScheduledReq

logger = logging.getLogger(__name__)

# A prefill is logged once it has taken this long, and then this often.
LOG_INTERVAL_S = 5.0
# A client that asked is told no more often than this.
TELL_INTERVAL_S = 0.5
# The rate is the one of the last seconds: attention costs more the further a prompt has come.
RATE_WINDOW_S = 10.0


@dataclass(slots=True)
class _Track:
    """One prompt under way: seconds of the scheduler's clock, tokens computed at those times."""

    total: int
    began_s: float
    mark: tuple[float, int]  # where the present rate is measured from
    next_mark: tuple[float, int]  # where it will be, half a window later
    done: int
    now_s: float
    logged_s: float
    told_s: float

    def move(self, done: int, now: float) -> None:
        self.done, self.now_s = done, now
        if now - self.next_mark[0] >= RATE_WINDOW_S / 2:
            self.mark, self.next_mark = self.next_mark, (now, done)

    def describe(self, rid: str) -> PrefillProgress:
        seconds = self.now_s - self.mark[0]
        rate = (self.done - self.mark[1]) / seconds if seconds > 0 else 0.0
        eta = (self.total - self.done) / rate if rate > 0 else None
        return PrefillProgress(rid, self.done, self.total, rate, eta)


class PrefillProgressLog:
    """Follows every prompt that takes more than one step.

    `send` gets the messages for clients that asked. The rate is in tokens/s over the last
    `RATE_WINDOW_S` seconds, the ETA in seconds at that rate: as attention grows with the context
    it is a lower bound.
    """

    def __init__(self, send: Callable[[BatchProgressOut], None]) -> None:
        self._send = send
        self._tracks: dict[str, _Track] = {}

    def admitted(self, req: Req, now: float) -> None:
        """A request took its place; its prefix hit counts as done."""
        at = (now, req.num_scheduled)
        self._tracks[req.rid] = _Track(
            req.known, now, at, at, req.num_scheduled, now, now, now - TELL_INTERVAL_S
        )

    def computed(self, items: Sequence[ScheduledReq], now: float) -> None:
        """A step was computed and its requests have moved on."""
        news = []
        for item in items:
            track = self._tracks.get(item.req.rid)
            if track is None:
                continue
            track.move(item.start + item.num_tokens, now)
            if item.req.state is not ReqState.PREFILL:
                self._finish(item.req.rid, track)
                continue
            if now - track.logged_s >= LOG_INTERVAL_S:
                track.logged_s = now
                _log(track.describe(item.req.rid))
            if item.req.include_progress and now - track.told_s >= TELL_INTERVAL_S:
                track.told_s = now
                news.append(track.describe(item.req.rid))
        if news:
            self._send(BatchProgressOut(news))

    def gone(self, req: Req) -> None:
        """A request gave up its place, for now or for good."""
        self._tracks.pop(req.rid, None)

    def of(self, req: Req) -> PrefillProgress | None:
        """Where a request's prefill stands; None when none is under way."""
        track = self._tracks.get(req.rid)
        return None if track is None else track.describe(req.rid)

    def _finish(self, rid: str, track: _Track) -> None:
        del self._tracks[rid]
        if track.logged_s > track.began_s:
            seconds = track.now_s - track.began_s
            logger.info("Prefill of %s: all %d tokens in %.1f s", rid, track.total, seconds)


def _log(state: PrefillProgress) -> None:
    eta = "unknown" if state.eta_s is None else f"{state.eta_s:.0f} s"
    logger.info(
        "Prefill of %s: %d of %d tokens (%.1f %%), %.0f tokens/s, ETA %s",
        state.rid,
        state.done_tokens,
        state.total_tokens,
        100 * state.done_tokens / state.total_tokens,
        state.tokens_per_s,
        eta,
    )
