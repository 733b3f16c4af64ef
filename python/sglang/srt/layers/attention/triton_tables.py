"""Block tables on the device, kept in step with the host's: only new page ids are uploaded.

A host table is a view of a range that is only ever appended to (docs/kv_segments.md, Note [Block
tables]), so what was uploaded of a range stays true while the range lives. Each range that the
batches of late name has one of the device's buffer. Owned by the triton backend, called on the
worker's thread; never changes a host table. See docs/gpu.md, Note [Device tables].
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from sglang.srt.model_executor.forward_batch_info import BlockTableView

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_FIRST_IDS: Final = 64  # the smallest range
_ID_BYTES: Final = 4


@dataclass(slots=True)
class _Mirror:
    """Ids [begin, end) of a host range, which stand on the device from `place` on.

    `source` is the array that owns the range; there is room for `room` ids.
    """

    source: weakref.ref[Int32Array]
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
        self._fresh = 0

    def update(self, views: Sequence[BlockTableView]) -> Int64Array:
        """Upload what of the tables is new; where each table's first id stands, int64 [B]."""
        for mirror in self._leaving:
            self._free.setdefault(mirror.room, []).append(mirror.place)
        self._leaving.clear()
        upload = _Upload()
        starts = np.fromiter((self._locate(view.page_ids, upload) for view in views), np.int64)
        self._send(upload)
        return starts

    def _locate(self, ids: Int32Array, upload: _Upload) -> int:
        if not len(ids):
            return 0
        owner = ids if ids.base is None or not isinstance(ids.base, np.ndarray) else ids.base
        begin = (ids.ctypes.data - owner.ctypes.data) // _ID_BYTES
        end = begin + len(ids)
        mirror = self._mirrors.get(id(owner))
        if mirror is not None and mirror.source() is not owner:
            self._forget(id(owner))  # the range is gone, another array has its number
            mirror = None
        if mirror is None:
            mirror = self._take(owner, begin, len(ids))
        if not mirror.begin <= begin <= mirror.end or end - mirror.begin > mirror.room:
            self._leaving.append(mirror)
            mirror = self._take(owner, begin, len(ids))
        first = mirror.end
        if end > first:
            upload.ids.append(ids[first - begin :])
            upload.places.append(mirror.place + first - mirror.begin)
            mirror.end = end
        return mirror.place + begin - mirror.begin

    def _take(self, owner: Int32Array, begin: int, count: int) -> _Mirror:
        room = _FIRST_IDS
        while room < 2 * count:  # twice, so that what is copied is paid for by what was appended
            room *= 2
        place = self._place(room)
        mirror = _Mirror(weakref.ref(owner), place, room, begin, begin)
        self._mirrors[id(owner)] = mirror
        return mirror

    def _place(self, room: int) -> int:
        if not self._free.get(room) and self._fresh + room > len(self.pages):
            self._collect()
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
        for number in [n for n, mirror in self._mirrors.items() if mirror.source() is None]:
            self._forget(number)

    def _forget(self, number: int) -> None:
        mirror = self._mirrors.pop(number)
        self._free.setdefault(mirror.room, []).append(mirror.place)

    def _send(self, upload: _Upload) -> None:
        if not upload.ids:
            return
        counts = np.array([len(ids) for ids in upload.ids])
        self.uploaded_ids += int(counts.sum())
        ids = torch.from_numpy(np.concatenate(upload.ids))
        if len(counts) == 1:
            place = upload.places[0]
            self.pages[place : place + len(ids)].copy_(self._moved(ids), non_blocking=True)
            return
        shifts = np.array(upload.places) - (np.cumsum(counts) - counts)
        places = torch.from_numpy(np.repeat(shifts, counts) + np.arange(len(ids)))
        self.pages.index_copy_(0, self._moved(places), self._moved(ids))

    def _moved(self, host: torch.Tensor) -> torch.Tensor:
        if self.pages.device.type == "cpu":
            return host
        return host.pin_memory().to(self.pages.device, non_blocking=True)
