"""The GPU backing with a host tier: a segment's range holds the device's memory, or the host's.

Either way it lies at the same addresses, so kernels, block tables and captured graphs do not know
which; what is on the host is read over the bus. Called by the segment manager only. Not yet run on
hardware; every path, failures included, is tested with a driver that checks the rules. See
docs/kv_segments.md, Note [The tier below].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypedDict, Unpack

import torch

from sglang.srt.errors import BackingError, InvariantError
from sglang.srt.mem_cache.kv_layout import GroupId, KVCacheSpec, SegmentId, SegmentLayout
from sglang.srt.mem_cache.segment_backing.cuda_driver import HostVmmDriver
from sglang.srt.mem_cache.segment_backing.cuda_vmm import CudaVmmBacking, Piece
from sglang.srt.utils.host_memory import read_host_memory
from sglang.srt.utils.sizes import format_bytes

HOST_MARGIN_BYTES: Final = 1 << 30  # left to the rest of the host when its memory is pinned


class CudaVmmOptions(TypedDict, total=False):
    """The options of `CudaVmmBacking`."""

    handle_bytes: int | None
    margin_bytes: int
    make_tensor: Callable[[int, int], torch.Tensor] | None
    pause: Callable[[float], None]


class CudaVmmHostBacking(CudaVmmBacking):
    """`CudaVmmBacking` whose segments may also lie in pinned memory of the host.

    `host_available_bytes` replaces the system's figure of what the host has left, of which
    `host_margin_bytes` are never taken. Raises BackingError when the device can't map the host's
    memory, or only in sizes that do not fit the granule.
    """

    lower_tier = "host"
    promotes = True

    def __init__(
        self,
        driver: HostVmmDriver,
        *,
        host_available_bytes: Callable[[], int] | None = None,
        host_margin_bytes: int = HOST_MARGIN_BYTES,
        **options: Unpack[CudaVmmOptions],
    ) -> None:
        super().__init__(driver, **options)
        host_granule = driver.host_granularity()
        if self.granule_bytes % host_granule:
            raise BackingError(
                f"the host's memory comes in {host_granule} bytes, of which the device's granule "
                f"of {self.granule_bytes} is no multiple"
            )
        self._host_driver = driver
        self._host_available = host_available_bytes or _available_on_host
        self._host_margin_bytes = host_margin_bytes
        self._on_host: set[Piece] = set()  # of those prepared and mapped
        self._copies: dict[Piece, tuple[int, bool]] = {}  # handle and whether it is the host's
        self._scratch: tuple[int, int] | None = None  # addresses where a segment's copy is filled

    @property
    def held_bytes(self) -> int:
        """Bytes of all handles that are held, on the device and on the host."""
        with self._lock:
            copies = sum(piece.length for piece in self._copies)
        return super().held_bytes + copies

    def reserve(self, spec: KVCacheSpec, layouts: tuple[SegmentLayout, ...]) -> None:
        """See SegmentBacking. Takes addresses for one segment's copy beside."""
        super().reserve(spec, layouts)
        length = max(layout.segment_bytes for layout in layouts)
        try:
            self._scratch = (self._driver.reserve_address(length, self.granule_bytes), length)
        except BackingError:
            self.close()
            raise

    def prepare_lower(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See StagedTieredBacking: pins the host's memory, after a look at what it has left."""
        pieces = self._pieces(group, segments)
        self._check_host(pieces, len(segments))
        self._create(pieces, self._host_driver.create_host_handle)
        with self._lock:
            self._on_host.update(pieces)

    def map_lower(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See TieredBacking. What new memory reads is the driver's choice."""
        self.prepare_lower(group, segments)
        self.commit(group, segments)

    def commit(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See StagedBacking, for either tier."""
        try:
            super().commit(group, segments)
        except BackingError:
            self._forget(group, segments)
            raise

    def discard(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See StagedBacking, for either tier."""
        super().discard(group, segments)
        self._forget(group, segments)

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See SegmentBacking, for either tier."""
        super().unmap(group, segments)
        self._forget(group, segments)

    def unmap_lower(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See TieredBacking."""
        self.unmap(group, segments)

    def prepare_move(
        self, group: GroupId, segments: Sequence[SegmentId], *, to_lower: bool
    ) -> None:
        """See StagedTieredBacking: new handles, filled at addresses that nobody else uses."""
        pieces = self._pieces(group, segments)
        with self._lock:
            if any((piece in self._on_host) is to_lower for piece in pieces):
                raise InvariantError(f"group {group}: some of {tuple(segments)} are there already")
        if to_lower:
            self._check_host(pieces, len(segments))
            handles = self._new_handles(pieces, self._host_driver.create_host_handle)
        else:
            self._check_free(pieces, len(segments))
            handles = self._new_handles(pieces, self._driver.create_handle)
        of_piece = dict(zip(pieces, handles, strict=True))
        try:
            for segment in segments:  # one after another: the scratch range holds one
                places = self._pieces(group, (segment,))
                self._fill([(piece, of_piece[piece]) for piece in places])
        except BackingError:
            self._release([(h, p.length) for h, p in zip(handles, pieces, strict=True)])
            raise
        with self._lock:
            self._copies.update({piece: (of_piece[piece], to_lower) for piece in pieces})

    def commit_move(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See StagedTieredBacking. Raises InvariantError when not even what was there can be
        restored: then memory is gone that callers count on."""
        pieces = self._pieces(group, segments)
        with self._lock:
            old = [self._mapped[piece] for piece in pieces]
            new = {piece: self._copies[piece] for piece in pieces}
        gone: list[Piece] = []
        placed: list[Piece] = []
        try:
            self._await_readers()
            for piece in pieces:
                self._driver.unmap(*piece)
                gone.append(piece)
            for piece, (handle, _) in new.items():
                self._driver.map(*piece, handle)
                placed.append(piece)
            for address, length in self._ranges(group, segments):
                self._driver.set_access(address, length)
        except BackingError as error:
            self._undo(placed)
            self._restore(gone)
            self.discard_move(group, segments)
            raise BackingError(f"can't move {len(segments)} KV segments: {error}") from error
        with self._lock:
            for piece, (handle, is_host) in new.items():
                self._mapped[piece] = handle
                del self._copies[piece]
                (self._on_host.add if is_host else self._on_host.discard)(piece)
        self._release([(h, p.length) for h, p in zip(old, pieces, strict=True)])

    def discard_move(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See StagedTieredBacking."""
        with self._lock:
            copies = [(self._copies.pop(p)[0], p.length) for p in self._pieces(group, segments)]
        self._release(copies)

    def demote(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See TieredBacking."""
        self.prepare_move(group, segments, to_lower=True)
        self.commit_move(group, segments)

    def promote(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        """See TieredBacking."""
        self.prepare_move(group, segments, to_lower=False)
        self.commit_move(group, segments)

    def lower_bytes(self) -> int:
        """See TieredBacking: what is pinned under segments, prepared ones included."""
        with self._lock:
            return sum(piece.length for piece in self._on_host)

    def close(self) -> None:
        """See SegmentBacking."""
        scratch, self._scratch = self._scratch, None
        with self._lock:
            copies, self._copies = self._copies, {}
            self._on_host.clear()
        self._release([(handle, piece.length) for piece, (handle, _) in copies.items()])
        try:
            super().close()
        finally:
            if scratch is not None:
                self._driver.free_address(*scratch)

    # ---- inside --------------------------------------------------------------------------------

    def _forget(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        with self._lock:
            self._on_host.difference_update(self._pieces(group, segments))

    def _fill(self, handles: Sequence[tuple[Piece, int]]) -> None:
        """Copy what is mapped in a segment's places into new handles; BackingError: not all."""
        if self._scratch is None:
            raise InvariantError("the backing has not been reserved, or it was closed")
        at = self._scratch[0]
        mapped: list[Piece] = []
        parts: list[tuple[int, int, int]] = []
        try:
            for piece, handle in handles:
                self._driver.map(at, piece.length, handle)
                mapped.append(Piece(at, piece.length))
                parts.append((at, piece.address, piece.length))
                at += piece.length
            self._driver.set_access(self._scratch[0], at - self._scratch[0])
            self._host_driver.copy(parts)
        finally:
            self._undo(mapped)

    def _check_host(self, pieces: Sequence[Piece], num_segments: int) -> None:
        """Raise BackingError when the host has too little for handles in these places."""
        self._retry_stuck()
        wanted, free = sum(piece.length for piece in pieces), self._host_available()
        if wanted + self._host_margin_bytes > free:
            raise BackingError(
                f"can't pin {num_segments} KV segments: {format_bytes(wanted)} wanted, "
                f"{format_bytes(free)} available on the host, of which "
                f"{format_bytes(self._host_margin_bytes)} are left to the rest of it"
            )


def _available_on_host() -> int:
    return read_host_memory().available_bytes
