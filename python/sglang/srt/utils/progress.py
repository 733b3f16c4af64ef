"""A counter that long computations advance, so that others can tell slow from stuck.

The scheduler owns one, models tick it once a layer and attention once a block; the heartbeat
thread and the watchdog only read it. An int attribute is enough: one thread writes.
"""

from __future__ import annotations


class Progress:
    """Counts steps of work; monotonic, never reset."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def tick(self) -> None:
        """Note one more piece of finished work (a layer, a block of rows, a scheduler turn)."""
        self.count += 1

    def __repr__(self) -> str:
        return f"Progress({self.count})"
