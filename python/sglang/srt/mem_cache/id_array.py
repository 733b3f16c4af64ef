"""`IdArray`: an int32 array that grows at its end in amortised constant time.

Block tables and the edges of the radix tree are made of it. Nothing else of a buffer is shared:
an `IdArray` is the only writer of its buffer, and it writes only past its end (`overwrite` apart),
so a view taken earlier stays true while the array grows, also on another thread.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]

_MIN_CAPACITY = 16
# Ids that `is_run` compares at a time: no temporary is larger, whatever the array.
_RUN_BLOCK = 1 << 16
_ONE_BLOCK = np.arange(_RUN_BLOCK, dtype=np.int32)
_ONE_BLOCK.setflags(write=False)


def is_run(ids: Int32Array | npt.NDArray[np.int64]) -> bool:
    """Whether `ids` (at least one) are consecutive ascending numbers; most often O(1) when not."""
    first = int(ids[0])
    if int(ids[-1]) - first != len(ids) - 1:
        return False
    for start in range(0, len(ids), _RUN_BLOCK):
        block = ids[start : start + _RUN_BLOCK]
        if (block - (first + start) != _ONE_BLOCK[: len(block)]).any():
            return False
    return True


class IdArray:
    """Ids in order; `view()` is the live part, everything else of the buffer is spare room."""

    __slots__ = ("_buffer", "_end", "_start")

    def __init__(self, ids: Int32Array | None = None) -> None:
        self._buffer: Int32Array = np.empty(0, np.int32) if ids is None else ids.astype(np.int32)
        self._start = 0
        self._end = len(self._buffer)

    def __len__(self) -> int:
        return self._end - self._start

    def __getitem__(self, index: int) -> int:
        """One id; negative counts from the end. Raises IndexError outside the live part."""
        size = self._end - self._start
        if not -size <= index < size:
            raise IndexError(index)
        return int(self._buffer[(self._end if index < 0 else self._start) + index])

    @property
    def capacity(self) -> int:
        """Ids that the buffer has room for, dead parts included."""
        return len(self._buffer)

    def view(self, first: int = 0, end: int | None = None) -> Int32Array:
        """Zero-copy ids [first, end) of the live part; stays true while the array grows."""
        stop = self._end if end is None else min(self._end, self._start + end)
        return self._buffer[self._start + first : stop]

    def append(self, ids: Int32Array) -> None:
        """Add `ids` at the end; the buffer is replaced, at double size, when it is full."""
        end = self._end + len(ids)
        if end > len(self._buffer):
            size = len(self) + len(ids)
            self._replace_buffer(max(_MIN_CAPACITY, size + max(len(self), len(ids) // 2)))
            end = self._end + len(ids)
        self._buffer[self._end : end] = ids
        self._end = end

    def append_one(self, id_: int) -> None:
        """Add one id, without making an array of it."""
        if self._end == len(self._buffer):
            self._replace_buffer(max(_MIN_CAPACITY, 2 * len(self) + 1))
        self._buffer[self._end] = id_
        self._end += 1

    def drop_head(self, count: int) -> Int32Array:
        """Drop the first `count` ids and return them (a copy); amortised O(count)."""
        head = self._buffer[self._start : self._start + count].copy()
        self._start += count
        self._shed_dead_room()
        return head

    def overwrite(self, first: int, ids: Int32Array) -> None:
        """Replace the ids from `first` on. Only where nobody keeps a view taken earlier."""
        begin = self._start + first
        if first < 0 or begin + len(ids) > self._end:
            raise IndexError(first)
        self._buffer[begin : begin + len(ids)] = ids

    def cut_tail(self, count: int) -> Int32Array:
        """Drop the last `count` ids and return them (a copy). Later appends reuse their room."""
        tail = self._buffer[self._end - count : self._end].copy()
        self._end -= count
        self._shed_dead_room()
        return tail

    def split_head(self, count: int) -> IdArray:
        """Move the first `count` ids into a new array; costs a copy of the smaller part only."""
        head = IdArray()
        middle = self._start + count
        if count <= self._end - middle:
            head._buffer, head._end = self._buffer[self._start : middle].copy(), count
            self._start = middle
        else:
            head._buffer, head._start, head._end = self._buffer, self._start, middle
            self._buffer = self._buffer[middle : self._end].copy()
            self._start, self._end = 0, len(self._buffer)
        head._shed_dead_room()
        self._shed_dead_room()
        return head

    def _shed_dead_room(self) -> None:
        if len(self._buffer) > 4 * max(len(self), _MIN_CAPACITY):
            self._replace_buffer(max(len(self), _MIN_CAPACITY))

    def _replace_buffer(self, capacity: int) -> None:
        size = len(self)
        buffer = np.empty(capacity, np.int32)
        buffer[:size] = self._buffer[self._start : self._end]
        self._buffer, self._start, self._end = buffer, 0, size

    def __repr__(self) -> str:
        return f"IdArray({len(self)}/{len(self._buffer)})"
