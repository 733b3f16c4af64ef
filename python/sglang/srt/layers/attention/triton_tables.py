"""Block tables on the device, kept in step with the host's: only new page ids are uploaded.

A host table is a view of a range that is only ever appended to (docs/kv_segments.md, Note [Block
tables]), so what was uploaded of a range stays true while the range lives. Each range that the
batches of late name has one of the device's buffer. Owned by the triton backend, called on the
worker's thread; never changes a host table. See docs/gpu.md, Note [Device tables].
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.model_executor.forward_batch_info import BlockTableView
from sglang.srt.utils.device import upload

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_FIRST_IDS: Final = 64  # the smallest range
_ID_BYTES: Final = 4


class _Owner(weakref.ref[Int32Array]):
    """A host range's array, which it does not keep; `number` is the array's id."""

    __slots__ = ("number",)

    number: int


@dataclass(slots=True)
class _Mirror:
    """Ids [begin, end) of a host range, which stand on the device from `place` on.

    `source` is the array that owns the range, from `address` on; there is room for `room` ids.
    """

    source: _Owner
    address: int
    place: int
    room: int
    begin: int
    end: int


@dataclass(slots=True)
class _Upload:
    ids: list[Int32Array] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class DeviceTables:
    """One group's tables: `pages` int32 on the device, in which each table has a range.

    `pages` stays where it is until more than `capacity` ids are held, then it moves to twice the
    room and `moves` counts up: what was recorded with the old one is worthless.
    """

    def __init__(self, device: torch.device, capacity: int = 1 << 24) -> None:
        self.pages = torch.empty(capacity, dtype=torch.int32, device=device)
        self.moves = 0
        self.uploaded_ids = 0  # ever, for tests and reports
        self._mirrors: dict[int, _Mirror] = {}
        self._free: dict[int, list[int]] = {}  # places of returned ranges, by their room
        self._leaving: list[_Mirror] = []  # returned in this update, which may have named them
        self._ended: deque[_Owner] = deque()  # arrays that are no more; any thread ends one
        self._fresh = 0

    def update(self, views: Sequence[BlockTableView]) -> Int64Array:
        """Upload what of the tables is new; where each table's first id stands, int64 [B]."""
        for mirror in self._leaving:
            self._free.setdefault(mirror.room, []).append(mirror.place)
        self._leaving.clear()
        self._collect()
        new = _Upload()
        starts = np.fromiter((self._locate(view.page_ids, new) for view in views), np.int64)
        self._send(new)
        return starts

    def _locate(self, ids: Int32Array, new: _Upload) -> int:
        if not len(ids):
            return 0
        base = ids.base
        owner = base if isinstance(base, np.ndarray) else ids
        address = ids.ctypes.data
        mirror = self._mirrors.get(id(owner))
        if mirror is None or mirror.source() is not owner:  # or another array had this number
            begin = (address - owner.ctypes.data) // _ID_BYTES
            mirror = self._take(owner, begin, len(ids))
        else:
            begin = (address - mirror.address) // _ID_BYTES
        end = begin + len(ids)
        if not mirror.begin <= begin <= mirror.end or end - mirror.begin > mirror.room:
            mirror = self._take(owner, begin, len(ids))
        first = mirror.end
        if end > first:
            new.ids.append(ids[first - begin :])
            new.places.append(mirror.place + first - mirror.begin)
            mirror.end = end
        return mirror.place + begin - mirror.begin

    def _take(self, owner: Int32Array, begin: int, count: int) -> _Mirror:
        room = _FIRST_IDS
        while room < 2 * count:  # twice, so that what is copied is paid for by what was appended
            room *= 2
        place = self._place(room)
        source = _Owner(owner, self._ended.append)
        source.number = id(owner)
        mirror = _Mirror(source, owner.ctypes.data, place, room, begin, begin)
        if source.number in self._mirrors:
            self._leaving.append(self._mirrors[source.number])
        self._mirrors[source.number] = mirror
        return mirror

    def _place(self, room: int) -> int:
        returned = self._free.get(room)
        if returned:
            return returned.pop()
        if self._fresh + room > len(self.pages):
            larger = self.pages.new_empty(max(2 * len(self.pages), self._fresh + room))
            larger[: self._fresh] = self.pages[: self._fresh]
            self.pages = larger
            self.moves += 1
        self._fresh += room
        return self._fresh - room

    def _collect(self) -> None:
        """Take back the ranges of host ranges that are no more."""
        while self._ended:
            owner = self._ended.popleft()
            mirror = self._mirrors.get(owner.number)
            if mirror is not None and mirror.source is owner:
                del self._mirrors[owner.number]
                self._free.setdefault(mirror.room, []).append(mirror.place)

    def holds(self, views: Sequence[BlockTableView]) -> bool:
        """Whether `update` with these finds room without moving, whatever of them is here."""
        wanted = sum(max(_FIRST_IDS, 4 * len(view.page_ids)) for view in views)
        return self._fresh + wanted <= len(self.pages)

    def _send(self, new: _Upload) -> None:
        if not new.ids:
            return
        counts = np.array([len(ids) for ids in new.ids])
        self.uploaded_ids += int(counts.sum())
        ids = torch.from_numpy(np.concatenate(new.ids))
        shifts = np.array(new.places) - (np.cumsum(counts) - counts)
        places = torch.from_numpy(np.repeat(shifts, counts) + np.arange(len(ids)))
        there, moved = upload([places, ids], self.pages.device)
        self.pages.index_copy_(0, there, moved)
