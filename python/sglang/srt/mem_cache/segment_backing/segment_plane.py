"""One plane of one layer in pieces: a tensor per segment and a table of their addresses.

What pools and attention read where memory has no common range (backing `segment_table`). The
backing attaches and detaches parts, readers take views and gather; a slot range never crosses a
segment border here. See docs/kv_segments.md, Note [Segment table].

Shape letters: S slots, G kv heads, D head dim, T rows, P pages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang.srt.errors import InvariantError


class SegmentPart(NamedTuple):
    """The rows of a list of slots (or pages) that lie in one segment.

    `rows` are positions in the list, `local` the places within the segment: int64 tensors, or
    (first, count) runs where both are one.
    """

    segment: int
    rows: torch.Tensor | tuple[int, int]
    local: torch.Tensor | tuple[int, int]


def round_to(x: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """`x` / `scale` in the KV dtype; what is beyond the largest number of fp8 becomes that number.

    NaN stays NaN. torch alone would make NaN or infinity of it, which one later query after another
    would spread. Of int8 x [*, D] becomes rows [*, D + 4], see `pack_int8`.
    """
    if scale != 1.0:
        x = x.float() * (1.0 / scale)
    if dtype is torch.int8:
        return x if x.dtype is torch.int8 else pack_int8(x)
    if x.dtype != dtype and dtype.itemsize == 1:
        most = torch.finfo(dtype).max
        x = x.clamp(-most, most)
    return x.to(dtype)


def pack_int8(x: torch.Tensor) -> torch.Tensor:
    """Heads [*, D] as int8 [*, D + 4]: multiples of their largest over 127, then that as float32.

    A head with a NaN is NaN as a whole; infinity is the largest finite number.
    """
    wide = x.float()
    most = torch.finfo(torch.float32).max
    scale = wide.abs().amax(-1, keepdim=True).clamp(max=most) / 127
    codes = (wide / scale).nan_to_num(0.0).round().clamp(-127, 127)
    codes = torch.where(scale > 0, codes, 0.0).to(torch.int8)
    return torch.cat([codes, scale.contiguous().view(torch.int8)], -1)


def widen(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of a plane in `dtype`: rows [*, D + 4] of int8 as [*, D], others as [*, D]."""
    if x.dtype is not torch.int8:
        return x.to(dtype)
    scale = x[..., -4:].contiguous().view(torch.float32)
    return (x[..., :-4].float() * scale).to(dtype)


def raw(x: torch.Tensor) -> torch.Tensor:
    """`x` as it is copied: fp8 and int8 as bytes, so that torch moves them and never rounds."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def split_by_segment(places: torch.Tensor, per_segment: int) -> list[SegmentPart]:
    """Cut int64 [T] slots (or pages) of a group's whole space by segment, lowest segment first."""
    if not len(places):
        return []
    segments = torch.div(places, per_segment, rounding_mode="floor")
    local = places - segments * per_segment
    parts = []
    for segment in torch.unique(segments).tolist():
        rows = torch.nonzero(segments == segment).flatten()
        inside = local.index_select(0, rows)
        if _is_run(rows) and _is_run(inside):
            count = len(rows)
            parts.append(SegmentPart(segment, (int(rows[0]), count), (int(inside[0]), count)))
        else:
            parts.append(SegmentPart(segment, rows, inside))
    return parts


def _is_run(places: torch.Tensor) -> bool:
    return bool((places[1:] - places[:-1] == 1).all())


class SegmentPlane:
    """K or V of one layer, [S, G, D] in the KV dtype, with memory only where a segment is mapped.

    `pointers` int64 [segments] are the parts' base addresses, 0 where there is none: what a kernel
    that reads scattered segments takes; `changes` grows after each change of them. Segment 0 holds
    page 0 alone. Touching a segment without memory raises InvariantError.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        slots_per_segment: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = shape
        self.slots_per_segment = slots_per_segment
        self.page_size = page_size
        self.dtype = dtype
        self.device = device
        self.pointers = torch.zeros(shape[0] // slots_per_segment, dtype=torch.int64)
        self.changes = 0
        self._parts: dict[int, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self._parts.values())

    def attach(self, segment: int, part: torch.Tensor) -> None:
        """Put [slots, G, D] under a segment (segment 0: the slots of page 0)."""
        if segment in self._parts:
            raise InvariantError(f"segment {segment} has memory already")
        self._parts[segment] = part
        self.pointers[segment] = part.data_ptr()
        self.changes += 1

    def detach(self, segment: int) -> None:
        """Take a segment's memory away; it is freed when no view holds it any more."""
        if self._parts.pop(segment, None) is None:
            raise InvariantError(f"segment {segment} has no memory to take away")
        self.pointers[segment] = 0
        self.changes += 1

    def part(self, segment: int) -> torch.Tensor:
        """The memory of a segment, [slots, G, D]."""
        part = self._parts.get(segment)
        if part is None:
            raise InvariantError(f"segment {segment} is read or written but has no memory")
        return part

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:
        """Slots [start, start + length) of one segment as a view, as `Tensor.narrow` gives it."""
        segment, first = divmod(start, self.slots_per_segment)
        if dim != 0 or first + length > self.slots_per_segment:
            raise InvariantError(f"slots {start}+{length} are not within one segment")
        return self.part(segment).narrow(0, first, length)

    def gather_pages(self, pages: torch.Tensor, target: torch.Tensor) -> None:
        """Copy pages int64 [P] into `target` [P, page size, G, D], segment by segment.

        The target says how many slots a page has: `page_size`, or 1 for slots one by one.
        """
        target, size = raw(target), target.shape[1]
        for segment, rows, local in split_by_segment(pages, self.slots_per_segment // size):
            paged = raw(self.part(segment)).view(-1, size, *self.shape[1:])
            if isinstance(rows, tuple) and isinstance(local, tuple):
                target.narrow(0, *rows).copy_(paged.narrow(0, *local))
            else:
                assert isinstance(rows, torch.Tensor)
                assert isinstance(local, torch.Tensor)
                rows, local = rows.to(self.device), local.to(self.device)
                target.index_copy_(0, rows, paged.index_select(0, local))

    def store(self, parts: list[SegmentPart], source: torch.Tensor) -> None:
        """Write `source` [T, G, D] of the KV dtype to the slots that `parts` were cut from."""
        rows_of = raw(source)
        for segment, rows, local in parts:
            target = raw(self.part(segment))
            if isinstance(rows, tuple) and isinstance(local, tuple):
                target.narrow(0, *local).copy_(rows_of.narrow(0, *rows))
            else:
                assert isinstance(rows, torch.Tensor)
                assert isinstance(local, torch.Tensor)
                target.index_copy_(0, local, rows_of.index_select(0, rows))

    def __getitem__(self, slots: torch.Tensor) -> torch.Tensor:
        """A copy of any slots int64 [T]: [T, G, D]. For tools and tests."""
        result = torch.empty((len(slots), *self.shape[1:]), dtype=self.dtype, device=self.device)
        target = raw(result)
        for segment, rows, local in split_by_segment(slots, self.slots_per_segment):
            part = raw(self.part(segment))
            if isinstance(rows, tuple) and isinstance(local, tuple):
                target.narrow(0, *rows).copy_(part.narrow(0, *local))
            else:
                target[rows] = part[local]
        return result

    def __setitem__(self, slots: torch.Tensor, source: torch.Tensor) -> None:
        """Write any slots int64 [T] from [T, G, D]. For tools and tests."""
        self.store(split_by_segment(slots, self.slots_per_segment), round_to(source, self.dtype))

    def __repr__(self) -> str:
        return f"SegmentPlane({self.shape}, {self.dtype}, {len(self._parts)} segments)"
