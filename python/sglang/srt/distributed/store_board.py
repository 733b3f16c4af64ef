"""The board of schedulers on several machines: each tells the common store how far it has come.

Stands in for `RankBoard` where no file is common to all. A thread posts this process's counts; they
are read only when somebody waits in vain, so that the missing rank can be named.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.utils.rendezvous import RankBoard

POST_INTERVAL_S = 0.5
LOOK_TIMEOUT_S = 2.0


class StoreBoard:
    """Counts of `who`; those of the others come from the store.

    `connect` makes a client of the store. `server` is who serves the store,
    None for somebody outside: when the store is gone, so is its server. A store's server must not
    leave while others may still look, so it takes longer to answer.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        who: int,
        server: int | None,
        interval_s: float = POST_INTERVAL_S,
    ) -> None:
        self._who = who
        self._server = server
        self._interval_s = interval_s
        self._counts = [0] * RankBoard.NUM_GROUPS
        self._format = struct.Struct(f"<{1 + len(self._counts)}q")
        self._connect = connect
        self._store = connect()
        self._pause = threading.Event()
        threading.Thread(target=self._post, name="rank-board", daemon=True).start()

    def begin(self, who: int, group: int) -> int:
        """See `RankBoard`; `who` is the owner."""
        assert who == self._who
        self._counts[group] += 1
        return self._counts[group]

    def missing(
        self, group: int, number: int, among: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """See `RankBoard`; takes as long as everyone that lives needs to post again."""
        looks: list[dict[int, Sequence[int]]] = []
        # A server that is stopped, not gone, lets its clients wait for ever.
        looker = threading.Thread(target=self._look, args=(among, looks), daemon=True)
        looker.start()
        looker.join(3 * self._interval_s + LOOK_TIMEOUT_S)
        if len(looks) < 2:
            return (), [] if self._server in (None, self._who) else [self._server]
        before, now = looks
        if self._server == self._who:
            self._pause.wait(2 * self._interval_s)
        others = [who for who in among if who != self._who]
        behind = [who for who in others if now[who][1 + group] < number]
        return behind, [who for who in others if now[who][0] == before[who][0]]

    def _look(self, among: Sequence[int], looks: list[dict[int, Sequence[int]]]) -> None:
        """Read everyone's numbers twice, as long apart as everyone that lives needs to post."""
        try:
            store = self._connect()
            looks.append({who: self._read(store, who) for who in among})
            self._pause.wait(3 * self._interval_s)
            looks.append({who: self._read(store, who) for who in among})
        except RuntimeError:
            return

    def _read(self, store: Any, who: int) -> Sequence[int]:
        """How often `who` has posted, and its counts as posted last; -1 for each before."""
        if not store.check([_key(who)]):
            return [-1] * (1 + len(self._counts))
        numbers: Sequence[int] = self._format.unpack(store.get(_key(who)))
        return numbers

    def _post(self) -> None:
        try:
            for turn in itertools.count():
                self._store.set(_key(self._who), self._format.pack(turn, *self._counts))
                self._pause.wait(self._interval_s)
        except RuntimeError:
            return  # the store is gone; whoever waits for its server will say so


def _key(who: int) -> str:
    return f"board/{who}"
