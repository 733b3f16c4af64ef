"""The board of several machines over a store of this process."""

from __future__ import annotations

import threading

from sglang.srt.distributed.store_board import StoreBoard

INTERVAL_S = 0.02


class Store:
    """Keys of a dict; `gone` makes every call fail as a lost server does."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.gone = False
        self.posted = threading.Condition()

    def set(self, key: str, value: bytes) -> None:
        if self.gone:
            raise RuntimeError("connection closed")
        with self.posted:
            self.values[key] = value
            self.posted.notify_all()

    def check(self, keys: list[str]) -> bool:
        if self.gone:
            raise RuntimeError("connection closed")
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key]


def board(store: Store, who: int, server: int | None = 0) -> StoreBoard:
    return StoreBoard(lambda: store, who, server, INTERVAL_S)


def test_who_is_behind_and_who_is_silent_is_told() -> None:
    store = Store()
    boards = [board(store, who) for who in range(2)]
    boards[0].begin(0, 1)
    boards[0].begin(0, 1)
    boards[1].begin(1, 1)
    assert boards[0].missing(1, 2, range(2)) == ([1], [])
    boards[1].begin(1, 1)
    assert boards[0].missing(1, 2, range(2)) == ([], [])
    assert boards[0].missing(1, 2, range(3)) == ([2], [2]), "it has never posted"
    store.values["board/2"] = store.values["board/1"]  # posted once, never again
    assert boards[1].missing(1, 2, range(3)) == ([], [2])


def test_a_store_that_is_gone_stands_for_its_server() -> None:
    store = Store()
    boards = [board(store, who) for who in range(2)]
    store.gone = True
    assert boards[1].missing(0, 1, range(2)) == ((), [0])
    assert boards[0].missing(0, 1, range(2)) == ((), [])
    assert board(Store(), 1, server=None).missing(0, 0, [1]) == ([], [])
