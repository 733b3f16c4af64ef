"""Drives a real KVMemory beside a plain dict model, contents included; for tests only.

Every computed token writes a fingerprint of its whole prefix (namespace, tokens, position) into K
and V of its slots, in every layer. Reading it back through the block tables then proves that no
page is shared, freed, moved or overwritten that should not be.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.allocation import KVLease, KVMemory, PageNeed
from sglang.srt.mem_cache.kv_layout import (
    GroupId,
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    SegmentId,
    StateShape,
)
from sglang.srt.mem_cache.segment_backing.base import layer_planes
from sglang.srt.mem_cache.state_pool import LayerState
from sglang.srt.mem_cache.window_rule import window_rules
from srt.mem_cache.fake_backing import FakeBacking


class PoisonedBacking(FakeBacking):
    """What was unmapped reads NaN, so that a read of memory that is gone can't go unseen."""

    def unmap(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        super().unmap(group, segments)
        self._fill(group, segments, float("nan"))

    def map(self, group: GroupId, segments: Sequence[SegmentId]) -> None:
        super().map(group, segments)
        self._fill(group, segments, 0.0)

    def _fill(self, group: int, segments: Sequence[SegmentId], value: float) -> None:
        assert self._spec is not None
        layout = self._layouts[group]
        size = layout.slots_per_segment
        for layer in self._spec.plane_layers(GroupId(group)):
            for plane in layer_planes(self._spec, layout, layer):
                view = self.view(layer, plane)
                for segment in segments:
                    view[segment * size : (segment + 1) * size] = value


Window = tuple[GroupKind, int | None]
FULL: Window = (GroupKind.FULL, None)
STATES: Window = (GroupKind.STATE, None)
STATE = StateShape(1, 2, 3, 2, 3)  # as many numbers as a page of four tokens in one layer


def tiny_spec(
    num_groups: int = 1,
    page_size: int = 4,
    layers_per_group: int = 1,
    windows: Sequence[Window] = (),
    latent: bool = False,
) -> KVCacheSpec:
    """Heads of width 2 and 1, float32: 12 bytes per token and layer. `windows` empty: all full.

    `latent`: keys are 2 wide, of which the first number is the value, and index keys 1.
    """
    kinds = windows or (FULL,) * num_groups
    groups = tuple(
        KVGroupSpec(
            tuple(range(g, num_groups * layers_per_group, num_groups)),
            kind,
            window,
            state=STATE if kind is GroupKind.STATE else None,
        )
        for g, (kind, window) in enumerate(kinds)
    )
    spec = KVCacheSpec(groups, 1, 2, 1, "float32", page_size, latent)
    if not latent:
        return spec
    return replace(spec, index_dim=1, index_layers=tuple(range(spec.num_layers)))


def make_memory(
    *,
    num_groups: int = 1,
    page_size: int = 4,
    pages_per_segment: int = 4,
    budget_segments: int = 6,
    max_segments: int = 16,
    max_requests: int = 8,
    backing: FakeBacking | None = None,
    windows: Sequence[Window] = (),
    disk_segments: int = 0,
    latent: bool = False,
    **options: object,
) -> tuple[KVMemory, FakeBacking]:
    """A memory of tiny segments; the budget holds `budget_segments` of every group.

    `disk_segments`: how many of them fit on disk, over all groups. `windows`: kind and window of
    every group, empty: `num_groups` full ones. `latent` is that of `tiny_spec`.
    """
    num_groups = len(windows) or num_groups
    spec = tiny_spec(num_groups, page_size, windows=windows, latent=latent)
    backing = backing or FakeBacking()
    segment_bytes = 12 * page_size * pages_per_segment
    memory = KVMemory.create(
        spec,
        backing,
        budget_bytes=budget_segments * segment_bytes * num_groups,
        machine_bytes=(max_segments - 1) * segment_bytes,
        max_requests=max_requests,
        slots_per_segment=page_size * pages_per_segment,
        lower_budget_bytes=disk_segments * segment_bytes,
        **options,  # type: ignore[arg-type]
    )
    return memory, backing


def tokens_of(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def finish_background(memory: KVMemory) -> None:
    """Let every map and unmap that has begun end and take over its outcome."""
    for ticket in memory.manager.pending():
        with contextlib.suppress(InvariantError):  # an unmap that waits for a forward
            memory.manager.wait(ticket)
    memory.ladder.settle_finished()


@dataclass
class Request:
    """The model of one request: its tokens, and how many have been computed."""

    lease: KVLease
    tokens: list[int]
    extra_key: str | None
    num_computed: int
    last_start: int = 0  # first position of the newest step

    _marks: list[int] = field(default_factory=list)

    def array(self) -> np.ndarray:
        return np.array(self.tokens, np.int32)

    def fingerprints(self) -> torch.Tensor:
        """One exact float per computed token, of the namespace and of every token up to it."""
        marks = self._marks
        for token in self.tokens[len(marks) : self.num_computed]:
            before = marks[-1] if marks else zlib.crc32((self.extra_key or "").encode())
            marks.append(zlib.crc32(token.to_bytes(4, "little"), before))
        return torch.tensor([float(mark >> 10) for mark in marks], dtype=torch.float32)


@dataclass
class Reader:
    """What a forward under way may still read of one request: slots per layer, and their marks."""

    epoch: int
    request: Request
    slots: list[torch.Tensor]
    marks: list[torch.Tensor]


@dataclass(eq=False)
class Write:
    """Slots of one group that a step of a request writes, and the forward in which it does."""

    epoch: int
    request: Request
    group: int
    slots: np.ndarray
    decode: bool


@dataclass
class MemoryDriver:
    """Moves requests and memory together and checks after each move.

    With `in_background`, maps and unmaps may be under way when pages are asked for, so that no
    pages is a right answer while a segment is being given back.
    """

    memory: KVMemory
    backing: FakeBacking
    requests: list[Request] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    now: float = 0.0
    num_none: int = 0
    num_copied: int = 0
    in_background: bool = False

    def __post_init__(self) -> None:
        self.rules = window_rules(self.memory.spec)

    def open(
        self,
        tokens: list[int],
        extra_key: str | None = None,
        priority: int = 0,
        *,
        copies: bool = False,
    ) -> Request | None:
        """`copies`: let the hit go on inside a page, if a cached one begins alike."""
        predicted = self.memory.match_len(np.array(tokens[:-1], np.int32), extra_key)
        free_rows = self.memory.rows.available_size()
        array = np.array(tokens, np.int32)
        lease = self.memory.open(
            array, extra_key=extra_key, priority=priority, max_prefix=len(tokens) - 1
        )
        if lease is None:
            assert free_rows == 0
            return None
        assert free_rows > 0
        assert lease.num_cached_tokens == lease.num_tokens == predicted
        if copies:
            copied = self.memory.copy_rest(lease, array, len(tokens) - 1)
            assert lease.num_cached_tokens == lease.num_tokens == predicted + copied
            self.num_copied += copied
        request = Request(lease, list(tokens), extra_key, lease.num_tokens, lease.num_tokens)
        self.requests.append(request)
        return request

    def extend(self, wants: list[tuple[Request, int]]) -> bool:
        """Place and compute `count` prompt tokens of each request, all or none."""
        return self._place([PageNeed(r.lease, n) for r, n in wants], wants, decode=False)

    def decode(self, wants: list[tuple[Request, int]]) -> bool:
        """Append one sampled token to each request and compute it, all or none."""
        tokens = [(request, 1) for request, _ in wants]
        grown = [request for request, _ in wants if request.num_computed == len(request.tokens)]
        for request, token in wants:
            if request in grown:
                request.tokens.append(token)
        done = self._place([PageNeed(r.lease, 1) for r, _ in wants], tokens, decode=True)
        if not done:
            for request in grown:
                request.tokens.pop()
        return done

    def cache_prefix(self, request: Request, num_tokens: int) -> None:
        ends = num_tokens == len(request.tokens)
        self.memory.cache_prefix(request.lease, request.array(), num_tokens, keep_window=ends)

    def close(self, request: Request, *, insert: bool) -> None:
        tokens = request.array() if insert else None
        self.memory.close(request.lease, tokens, request.num_computed)
        self.requests.remove(request)
        self.readers = [reader for reader in self.readers if reader.request is not request]
        self.writes = [write for write in self.writes if write.request is not request]

    def launch(self, epoch: int) -> None:
        """A forward reads, from now on, what the newest step of every request may see."""
        self.memory.note_launched(epoch)
        for request in self.requests:
            layers = range(self.memory.spec.num_layers)
            seen = [self._seen(request, layer, reading=True) for layer in layers]
            slots = [slot for slot, _ in seen]
            self.readers.append(Reader(epoch, request, slots, [marks for _, marks in seen]))

    def complete(self, epoch: int) -> None:
        self.memory.note_completed(epoch)
        self.readers = [reader for reader in self.readers if reader.epoch > epoch]
        self.writes = [write for write in self.writes if write.epoch > epoch]

    def boundary(self, seconds: float, expected: int = 0, *, finish: bool = True) -> None:
        """A step boundary, and (`finish`) the end of the background work that it began."""
        self.now += seconds
        self.memory.on_step_boundary(self.now, (expected,) * len(self.memory.allocators))
        if finish:
            finish_background(self.memory)

    def check(self) -> None:
        """Audit, and read every request's whole content back."""
        self.memory.audit()
        for request in self.requests:
            assert request.lease.num_tokens == request.num_computed
            for layer in range(self.memory.spec.num_layers):
                self._check_contents(request, layer, *self._seen(request, layer))
        for reader in self.readers:
            for layer, seen in enumerate(zip(reader.slots, reader.marks, strict=True)):
                self._check_contents(reader.request, layer, *seen)

    # ---- inside -----------------------------------------------------------------------------

    def _place(
        self, needs: list[PageNeed], wants: list[tuple[Request, int]], *, decode: bool
    ) -> bool:
        memory = self.memory
        each = [memory.pages_needed(need) for need in needs]
        everywhere = [sum(need[group] for need in each) for group in _each(memory)]
        could = memory.can_hold(everywhere)
        for request, _ in wants:  # a refused step, too, may recycle what came before it
            request.last_start = request.num_computed
        # where no forward was launched for a prompt's last chunk, that has ended: it was computed
        launched, stepping = memory.manager.launched_epoch, {id(request) for request, _ in wants}
        self.writes = [
            one
            for one in self.writes
            if one.epoch <= launched or one.decode or id(one.request) not in stepping
        ]
        refused = sum(stats.refused_count for stats in memory.manager.stats())
        leaving = self.in_background and memory.num_pending_growths > 0
        alloc = memory.alloc_for_decode if decode else memory.alloc_for_extend
        placement = alloc(needs)
        if placement is None:
            now_refused = sum(stats.refused_count for stats in memory.manager.stats())
            could = memory.can_hold(everywhere)
            # Where needs differ by group, pages left scattered over segments can be in the way.
            scattered = any(self.rules) and not any(
                map(memory.cache.evictable_pages, _each(memory))
            )
            excused = now_refused > refused or leaving or scattered
            assert not could or excused, "pages were to be had"
            self.num_none += 1
            return False
        assert could or any(self.rules)
        row = 0
        for request, count in wants:
            locs = [loc[row : row + count] for loc in placement.out_cache_loc]
            self._check_source(request)
            request.num_computed += count
            self._note_writes(request, locs, decode=decode)
            self._write(request, locs, count)
            row += count
        assert all(len(loc) == row for loc in placement.out_cache_loc)
        return True

    def _note_writes(self, request: Request, locs: list[np.ndarray], *, decode: bool) -> None:
        """Of decode steps no more than two are ever under way beside the one being placed."""
        epoch = self.memory.manager.launched_epoch + 1
        for group, slots in enumerate(locs):
            self.writes.append(Write(epoch, request, group, slots, decode))
            own = [w for w in self.writes if w.request is request and w.group == group]
            decodes = [write for write in own if write.decode]
            for old in decodes[:-2]:
                self.writes.remove(old)

    def check_not_written(self, group: int, segments: Sequence[int]) -> None:
        """No forward under way writes to these segments."""
        size = self.memory.manager.layouts[group].slots_per_segment
        for write in self.writes:
            if write.group == group:
                assert not set((write.slots // size).tolist()) & set(segments), "a write is lost"

    def _write(self, request: Request, locs: list[np.ndarray], count: int) -> None:
        marks = request.fingerprints()[request.num_computed - count :]
        pool = self.memory.kv_pool
        for layer in range(self.memory.spec.num_layers):
            group = pool.group_of_layer(layer)
            if self._holds_states(group):
                self._leave_states(request, layer, request.num_computed - count)
                continue
            loc = torch.from_numpy(pool.share.write_slots(group, locs[group]).copy())
            k, v = (marks + layer)[:, None, None].repeat(1, 1, 2), (marks - layer)[:, None, None]
            if pool.spec.values_in_keys:
                k = torch.cat((v, k[..., :1]), -1)
                pool.index_planes.store(layer, loc, -marks[:, None])
            pool.set_kv_buffer(layer, loc, k, v)

    # A state's mark is that of the last token before it; all of its numbers are the mark.

    def _holds_states(self, group: int) -> bool:
        return self.memory.manager.layouts[group].holds_states

    def _state_pages(self, request: Request, ends: list[int]) -> list[int]:
        """The page of the state after so many tokens, for each of `ends`; it must be there."""
        (group,) = (g for g in _each(self.memory) if self._holds_states(g))
        table, size = request.lease.tables[group], self.memory.page_size
        pages = [int(table.page_ids[(end - 1) // size - table.first_page]) for end in ends]
        assert all(pages), "a state that is needed is not kept"
        return pages

    def _check_source(self, request: Request) -> None:
        """What a step is about to begin from is the state after the tokens that were computed."""
        for layer in range(self.memory.spec.num_layers):
            if request.num_computed and self._holds_states(
                self.memory.kv_pool.group_of_layer(layer)
            ):
                pages = torch.tensor(self._state_pages(request, [request.num_computed]))
                self._check_states(layer, pages, request.fingerprints()[-1:])

    def _leave_states(self, request: Request, layer: int, start: int) -> None:
        pool = self.memory.kv_pool.states
        assert pool is not None
        border = (request.num_computed - 1) // self.memory.page_size * self.memory.page_size
        ends = [end for end in (border, request.num_computed) if end > start]
        values = request.fingerprints()[[end - 1 for end in ends]] + layer
        rows = values[:, None, None]
        state = LayerState(rows[..., None].expand(-1, 1, 2, 3), rows.expand(-1, 2, 3))
        pages = torch.tensor(self._state_pages(request, ends), dtype=torch.int64)
        pool.store(layer, pages, state)

    def _check_states(self, layer: int, pages: torch.Tensor, marks: torch.Tensor) -> None:
        pool = self.memory.kv_pool.states
        assert pool is not None
        state = pool.load(layer, pages)
        rows = (marks + layer)[:, None, None]
        assert torch.equal(state.matrix, rows[..., None].expand_as(state.matrix))
        assert torch.equal(state.inputs, rows.expand_as(state.inputs))

    def _seen_states(self, request: Request, *, reading: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages and marks of the newest state and of what lies at borders that a step passed.

        `reading`: only whole pages, which later steps of the request leave as they are.
        """
        size, end = self.memory.page_size, request.num_computed
        border = (end - 1) // size * size
        ends = {border} if border > request.last_start else set()
        if request.last_start % size == 0:
            ends.add(request.last_start)
        if not reading or end % size == 0:
            ends.add(end)
        wanted = sorted(ends - {0})
        pages = torch.tensor(self._state_pages(request, wanted), dtype=torch.int64)
        return pages, request.fingerprints()[[end - 1 for end in wanted]]

    def _seen(
        self, request: Request, layer: int, *, reading: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots and marks of all that the newest step of a request may see in one layer.

        Of states pages and marks, see `_seen_states`.
        """
        group = self.memory.kv_pool.group_of_layer(layer)
        if self._holds_states(group):
            return self._seen_states(request, reading=reading)
        rule, snapshot = self.rules[group], request.lease.tables[group].snapshot()
        first = 0 if rule is None else rule.visible_start(request.last_start)
        if first == request.num_computed:
            return torch.empty(0, dtype=torch.int64), torch.empty(0)
        assert snapshot.first_position <= first, "a page that can be attended was dropped"
        slots = [torch.arange(start, start + count) for start, count in snapshot.runs]
        index = torch.cat(slots) if slots else torch.empty(0, dtype=torch.int64)
        skipped = first - snapshot.first_position
        count = request.num_computed - first
        return index[skipped : skipped + count], request.fingerprints()[first:]

    def _check_contents(
        self, request: Request, layer: int, slots: torch.Tensor, marks: torch.Tensor
    ) -> None:
        """Contents of the slots of which this rank has the memory."""
        pool = self.memory.kv_pool
        group = pool.group_of_layer(layer)
        if self._holds_states(group):
            self._check_states(layer, slots, marks)
            return
        marks = marks[torch.from_numpy(pool.share.owns(group, slots.numpy() // pool.page_size))]
        slots = torch.from_numpy(pool.share.own_slots(group, slots.numpy()))
        keys, values = pool.get_key_buffer(layer)[slots], pool.get_value_buffer(layer)[slots]
        if pool.spec.values_in_keys:
            assert torch.equal(pool.index_planes[layer][slots], -marks[:, None, None]), request
            keys = keys[..., 1:].repeat(1, 1, 2)
        assert torch.equal(keys, (marks + layer)[:, None, None].repeat(1, 1, 2)), request
        assert torch.equal(values, (marks - layer)[:, None, None]), request


def _each(memory: KVMemory) -> range:
    return range(memory.spec.num_groups)
