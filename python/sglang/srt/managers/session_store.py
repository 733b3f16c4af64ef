"""Sessions: requests whose token ids are kept, so that later ones go on from them.

A session is a tree. A request of it is a prompt and its output, behind so many ids of an earlier
request; only the ids that it added are kept. K and V are the prefix cache's: a session holds none.
Pure but for its own state, one event loop's; `SessionRunner` is the caller.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang.srt.errors import RequestError
from sglang.srt.managers.generate_request import IdArray, SessionParams

SESSION_STORE_BYTES = 256 << 20
# What a session or a request takes beside its ids, about.
ENTRY_BYTES = 1 << 10
ID_BYTES = 4
SWEEP_S = 1.0


@dataclass(eq=False)
class SessionRequest:
    """A request that ended: the ids [start, ...) that it added, behind `start` of its parent's.

    `prompt_len` counts the ids up to its output. No parent: `start` is 0.
    """

    rid: str
    parent: SessionRequest | None = field(repr=False)
    start: int
    ids: IdArray = field(repr=False)
    prompt_len: int

    @property
    def num_ids(self) -> int:
        """Ids from the session's first to the output's last."""
        return self.start + len(self.ids)

    @property
    def num_bytes(self) -> int:
        return ENTRY_BYTES + ID_BYTES * len(self.ids)

    def prefix(self, length: int) -> list[IdArray]:
        """The first `length` ids up to its end, in parts."""
        parts: list[IdArray] = []
        request: SessionRequest | None = self
        while request is not None:
            if length > request.start:
                parts.append(request.ids[: length - request.start])
                length = request.start
            request = request.parent
        return parts[::-1]


@dataclass(eq=False)
class Session:
    """One session. `running` are the ids of requests under way, `last` the one that ended last.

    `timeout_s` None: it stays open until it is closed. `touched` is when it was last used.
    `replica` computed the request that ended last, and has its prefix; None: there is only one.
    `requests` are in the order in which they ended, so whoever is gone on from comes first.
    """

    id: str
    streaming: bool
    timeout_s: float | None
    touched: float
    requests: dict[str, SessionRequest] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)
    last: SessionRequest | None = None
    replica: int | None = None
    num_bytes: int = ENTRY_BYTES

    def forget_behind(self, parent: SessionRequest | None) -> None:
        """Forget all requests that go on from `parent`, directly or not; None: all there are."""
        gone: set[SessionRequest | None] = {parent}
        for request in list(self.requests.values()):
            if parent is None or request.parent in gone:
                gone.add(request)
                del self.requests[request.rid]
                self.num_bytes -= request.num_bytes

    def is_over(self, now: float) -> bool:
        """Whether it was idle for its time."""
        limit_s = self.timeout_s
        return limit_s is not None and not self.running and now - self.touched >= limit_s


@dataclass(frozen=True, eq=False)
class SessionTurn:
    """A request of a session under way: it goes on from the first `start` ids of `parent`."""

    session: Session
    rid: str
    parent: SessionRequest | None
    start: int
    replaces: bool

    def prompt(self, new_ids: IdArray) -> IdArray:
        """The whole prompt, of which the request brings `new_ids`; int32 [n]."""
        if self.parent is None:
            return new_ids
        return np.concatenate([*self.parent.prefix(self.start), new_ids], dtype=np.int32)


class SessionStore:
    """All open sessions, with at most `limit` bytes of ids and `ENTRY_BYTES` for each object.

    Only what requests under way generate may go beyond. `now` is in seconds, of any clock that
    never goes back; sessions whose time is over are closed when one of them is used, others at most
    `SWEEP_S` later.
    """

    def __init__(self, limit: int = SESSION_STORE_BYTES) -> None:
        self._limit = limit
        self._sessions: dict[str, Session] = {}
        self._swept = float("-inf")
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._sessions)

    def open(
        self, session_id: str | None, streaming: bool, timeout_s: float | None, now: float
    ) -> str:
        """Open a session and give its id, a new one unless named. Raises RequestError 400, 503."""
        self._close_idle(now)
        if session_id is not None and self._look_up(session_id, now) is not None:
            raise RequestError(f"There is a session {session_id!r} already.")
        session = Session(session_id or uuid.uuid4().hex, streaming, timeout_s, now)
        self._check_room(session.num_bytes)
        self._sessions[session.id] = session
        self.num_bytes += session.num_bytes
        return session.id

    def close(self, session_id: str, now: float) -> None:
        """Forget a session; its requests under way go on and are not kept. RequestError 400."""
        self._close_idle(now)
        self._drop(self._find(session_id, now))

    def begin(self, wanted: SessionParams, rid: str, now: float) -> SessionTurn:
        """Start a request of a session, to be ended by `end`. Raises RequestError 400, 503."""
        self._close_idle(now)
        session = self._find(wanted.id or "", now)
        if rid in session.requests or rid in session.running:
            raise RequestError(f"The session has a request {rid!r} already.")
        self._check_room(ENTRY_BYTES)
        parent = _parent(session, wanted)
        start = 0
        if parent is not None:
            length = parent.prompt_len if wanted.drop_previous_output else parent.num_ids
            # As a slice of a list is cut: from the end if below zero, never beyond either end.
            start = len(range(length)[: wanted.offset or length])
        session.running.add(rid)
        session.touched = now
        return SessionTurn(session, rid, parent, start, bool(wanted.replace))

    def keep(self, turn: SessionTurn, new_ids: IdArray, output_ids: Sequence[IdArray]) -> None:
        """Make a request that came to its own end one that others go on from.

        Nothing is kept when its session was closed meanwhile, or what it goes on from replaced.
        """
        session, parent = turn.session, turn.parent
        if self._sessions.get(session.id) is not session:
            return
        if parent is not None and session.requests.get(parent.rid) is not parent:
            return
        before = session.num_bytes
        if turn.replaces:
            session.forget_behind(parent)
        ids = np.concatenate([new_ids, *output_ids], dtype=np.int32)
        request = SessionRequest(turn.rid, parent, turn.start, ids, turn.start + len(new_ids))
        session.requests[turn.rid] = session.last = request
        session.num_bytes += request.num_bytes
        self.num_bytes += session.num_bytes - before

    def end(self, turn: SessionTurn, now: float) -> None:
        """A request that `begin` started is over, however it ended."""
        turn.session.running.discard(turn.rid)
        turn.session.touched = now
        self._close_idle(now)

    def check_room(self, num_ids: int) -> None:
        """Raise RequestError 503 unless so many more ids may be kept."""
        self._check_room(ID_BYTES * num_ids)

    def _check_room(self, num_bytes: int) -> None:
        if self.num_bytes + num_bytes > self._limit:
            raise RequestError(
                f"The sessions have {self.num_bytes} bytes of at most {self._limit}: "
                "close some of them.",
                503,
            )

    def _find(self, session_id: str, now: float) -> Session:
        session = self._look_up(session_id, now)
        if session is None:
            raise RequestError(f"There is no session {session_id!r}: it was closed or never open.")
        return session

    def _look_up(self, session_id: str, now: float) -> Session | None:
        session = self._sessions.get(session_id)
        if session is None or not session.is_over(now):
            return session
        self._drop(session)
        return None

    def _drop(self, session: Session) -> None:
        del self._sessions[session.id]
        self.num_bytes -= session.num_bytes

    def _close_idle(self, now: float) -> None:
        if now - self._swept < SWEEP_S:
            return
        self._swept = now
        for session in [one for one in self._sessions.values() if one.is_over(now)]:
            self._drop(session)


def _parent(session: Session, wanted: SessionParams) -> SessionRequest | None:
    """The request that one goes on from; None: it is the session's first, or a fresh one."""
    if session.streaming:
        if wanted.replace or wanted.drop_previous_output or wanted.offset:
            raise RequestError(
                "A streaming session is only added to: leave out replace, drop_previous_output "
                "and offset."
            )
        if session.running:
            raise RequestError("A request of this streaming session has not ended yet.")
        if wanted.rid is not None and (session.last is None or wanted.rid != session.last.rid):
            raise RequestError("A streaming session goes on from its last request only.")
        return session.last
    if wanted.rid is None:
        return None
    found = session.requests.get(wanted.rid)
    if found is None:
        raise RequestError(
            f"The session has no request {wanted.rid!r} that came to its end and was not replaced."
        )
    return found
