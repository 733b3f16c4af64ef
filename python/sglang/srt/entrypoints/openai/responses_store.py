"""Responses that clients may come back to, in the server's memory and under a bound of bytes.

Each turn of a conversation is kept once, however many responses go on from it: a turn knows the
one before, and counts who holds it. When the bound is passed the oldest responses go. The server
that made a response is the only one to know it, and only until it ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

RESPONSE_STORE_BYTES = 64 << 20
# What the objects of a response take beside its text, about.
ENTRY_BYTES = 1 << 10


@dataclass(eq=False)
class Turn:
    """The messages of one turn as JSON (input and answer, no instructions), behind `previous`.

    `holders`: the responses and kept turns that refer to it; the store's to change.
    """

    messages: bytes
    previous: Turn | None = field(repr=False)
    holders: int = 0

    def chain(self) -> Iterator[Turn]:
        """This turn and those before it, newest first."""
        turn: Turn | None = self
        while turn is not None:
            yield turn
            turn = turn.previous


@dataclass(frozen=True)
class StoredResponse:
    """A response as JSON, and the conversation up to its end."""

    body: bytes
    turn: Turn


class ResponseStore:
    """At most `limit` bytes of responses and turns, the texts counted with `ENTRY_BYTES` each."""

    def __init__(self, limit: int = RESPONSE_STORE_BYTES) -> None:
        self._limit = limit
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._responses)

    def get(self, response_id: str) -> StoredResponse | None:
        """The response; None: never kept, or dropped."""
        return self._responses.get(response_id)

    def put(self, response_id: str, body: bytes, turn: Turn) -> bool:
        """Keep a response under a new id, and drop the oldest for it.

        False, and nothing is kept or dropped, when it is larger than the store with its turns.
        """
        whole = len(body) + sum(len(one.messages) + ENTRY_BYTES for one in turn.chain())
        if whole + ENTRY_BYTES > self._limit:
            return False
        self._responses[response_id] = StoredResponse(body, turn)
        self.num_bytes += len(body) + ENTRY_BYTES
        self._hold(turn)
        while self.num_bytes > self._limit:
            self.drop(next(iter(self._responses)))
        return True

    def drop(self, response_id: str) -> bool:
        """Forget a response, and the turns that no other goes on from; False: it isn't there."""
        stored = self._responses.pop(response_id, None)
        if stored is None:
            return False
        self.num_bytes -= len(stored.body) + ENTRY_BYTES
        self._release(stored.turn)
        return True

    def _hold(self, turn: Turn) -> None:
        for one in turn.chain():
            one.holders += 1
            if one.holders > 1:  # it holds the ones before already
                return
            self.num_bytes += len(one.messages) + ENTRY_BYTES

    def _release(self, turn: Turn) -> None:
        for one in turn.chain():
            one.holders -= 1
            if one.holders:
                return
            self.num_bytes -= len(one.messages) + ENTRY_BYTES
