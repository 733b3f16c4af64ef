"""What the scheduler calls: leases on memory, slots for new tokens, and the answer "no pages".

`KVMemory` is the one door to the memory floor of a rank. It knows leases, never requests; it
computes nothing and reads no clock. Only here and in the ladder below it is scarcity answered
(with None). See docs/kv_segments.md, Note [The ladder] and Note [A running prefill is shared].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.allocator import PageAllocator, granted
from sglang.srt.mem_cache.base_prefix_cache import BasePrefixCache, HeldWindow
from sglang.srt.mem_cache.canary import KVCanary
from sglang.srt.mem_cache.cold_segments import (
    RecentWrites,
    SegmentHeat,
    coldest_segments,
    segment_heats,
)
from sglang.srt.mem_cache.decode_steps import DecodeSteps
from sglang.srt.mem_cache.group_parts import (
    make_allocators,
    make_ladder,
    make_manager,
    make_prefix_cache,
)
from sglang.srt.mem_cache.integrity import audit
from sglang.srt.mem_cache.kv_events import EventSink, KVEventRecorder
from sglang.srt.mem_cache.kv_layout import (
    ONE_KV_RANK,
    GroupId,
    KVCacheSpec,
    KVRanks,
    ReqPoolIdx,
    SegmentId,
    num_pages_for,
)
from sglang.srt.mem_cache.lease import DecodeRows, KVLease, KVPlacement, PageNeed
from sglang.srt.mem_cache.memory_pool import (
    MHATokenToKVPool,
    ReqToTokenPool,
)
from sglang.srt.mem_cache.memory_report import memory_figures
from sglang.srt.mem_cache.page_copy import copy_pages
from sglang.srt.mem_cache.promotion import make_promoter
from sglang.srt.mem_cache.rank_agreement import RankAgreement
from sglang.srt.mem_cache.segment_backing.base import SegmentBacking
from sglang.srt.mem_cache.segment_manager import SegmentManager
from sglang.srt.mem_cache.segment_state import Ticket
from sglang.srt.mem_cache.segment_table_pool import (
    make_kv_pool,
)
from sglang.srt.mem_cache.state_group import clip_expected, grow_table, held_of, pages_taken
from sglang.srt.mem_cache.window_recycler import WindowRecycler
from sglang.srt.mem_cache.window_rule import window_rules

Int32Array = npt.NDArray[np.int32]

__all__ = ["DecodeRows", "KVLease", "KVMemory", "KVPlacement", "PageNeed"]


class KVMemory:
    """The memory of one rank. Called by one thread; attention may read snapshots on another."""

    def __init__(
        self,
        spec: KVCacheSpec,
        manager: SegmentManager,
        allocators: tuple[PageAllocator, ...],
        cache: BasePrefixCache,
        rows: ReqToTokenPool,
        kv_pool: MHATokenToKVPool,
        *,
        prefix_idle_s: float,
        max_cached_tokens: int | None,
        events: KVEventRecorder | None = None,
        prefill_chunk: int = 1,
    ) -> None:
        self.spec = spec
        self.page_size = spec.page_size
        self.manager = manager
        self.allocators = allocators
        self.cache = cache
        self.rows = rows
        self.kv_pool = kv_pool
        self.recycler = WindowRecycler(window_rules(spec), allocators, rows.groups)
        self._writes = RecentWrites() if manager.lower_budget_bytes else None
        self.ladder = make_ladder(spec, manager, allocators, cache, self._coldest, prefill_chunk)
        self._promoter = make_promoter(manager, self.ladder, self._heats)
        self.leases: dict[ReqPoolIdx, KVLease] = {}
        self._events = events
        self.canary: KVCanary | None = None  # see `watch`
        self._prefix_idle_s = prefix_idle_s
        self._max_cached_pages = (
            None if max_cached_tokens is None else max_cached_tokens // spec.page_size
        )
        # Windows end at pages, and a page of another KV-parallel rank can't be read.
        self._copies_rests = not self.recycler.active and not kv_pool.share.shares_any
        self._growth: Ticket | None = None
        self._decode_steps: DecodeSteps | None = None  # of the last step that decoded

    @classmethod
    def create(
        cls,
        spec: KVCacheSpec,
        backing: SegmentBacking,
        *,
        budget_bytes: int,
        machine_bytes: int,
        max_requests: int,
        slots_per_segment: int | None = None,
        auto_segment_bytes: int = 32 << 20,
        auto_min_slots: int = 1,
        reserve_segments: int = 0,
        idle_release_s: float = 30.0,
        prefix_idle_s: float = 300.0,
        max_cached_tokens: int | None = None,
        enable_prefix_cache: bool = True,
        eviction_policy: str = "lru",
        event_sink: EventSink | None = None,
        prefill_chunk: int = 1,
        now: float = 0.0,
        ranks: RankAgreement | None = None,
        kv_ranks: KVRanks = ONE_KV_RANK,
        lower_budget_bytes: int = 0,
    ) -> KVMemory:
        """Wire a rank's memory and bring it into its idle state.

        `slots_per_segment` None means auto, see `make_segment_layouts`; `machine_bytes` is all that
        the machine could ever hold. `prefix_idle_s` negative: prefixes never grow old.
        `max_cached_tokens` None: no bound. `event_sink` hears at each step boundary what the prefix
        cache stored and dropped (None: nobody does). `prefill_chunk` is the most tokens of a
        request in one step; only window groups ask. `ranks` None: this rank is alone. `kv_ranks`
        share the pages of each request; budget and bytes are those of one of them.
        `lower_budget_bytes` bounds what may lie on the tier below (0: nothing). Nothing is held
        after ValueError, the budget can't hold the idle state, or BackingError, the machine
        can't.
        """
        manager = make_manager(
            spec,
            backing,
            budget_bytes=budget_bytes,
            machine_bytes=machine_bytes,
            slots_per_segment=slots_per_segment,
            auto_segment_bytes=auto_segment_bytes,
            auto_min_slots=auto_min_slots,
            reserve_segments=reserve_segments,
            idle_release_s=idle_release_s,
            now=now,
            ranks=ranks,
            kv_parallel=kv_ranks.size,
            lower_budget_bytes=lower_budget_bytes,
        )
        allocators = make_allocators(spec, manager)
        events = None if event_sink is None else KVEventRecorder(spec.page_size, event_sink)
        return cls(
            spec,
            manager,
            allocators,
            make_prefix_cache(spec, allocators, enable_prefix_cache, eviction_policy, events),
            ReqToTokenPool(max_requests, spec.num_groups, spec.page_size),
            make_kv_pool(spec, manager.layouts, backing, kv_ranks.rank),
            prefix_idle_s=prefix_idle_s,
            max_cached_tokens=max_cached_tokens,
            events=events,
            prefill_chunk=prefill_chunk,
        )

    # ---- a request's life -------------------------------------------------------------------

    def open(
        self,
        token_ids: Int32Array,
        *,
        extra_key: str | None = None,
        max_prefix: int,
        priority: int = 0,
    ) -> KVLease | None:
        """Take a row and lock the longest cached prefix of at most `max_prefix` tokens.

        The tables are filled with the hit's pages (whole pages only). `priority` is what the
        policy of that name evicts by. None: no row is free.
        """
        row = self.rows.alloc_row()
        if row is None:
            return None
        hit = self.cache.match(token_ids, extra_key, max_prefix, priority=priority)
        lease = KVLease(self.rows, row, hit.handle, extra_key)
        for allocator, table, pages in zip(
            self.allocators, lease.tables, hit.page_ids, strict=True
        ):
            allocator.index.share(pages)
            table.begin_at(hit.num_tokens // self.page_size - len(pages))
            table.extend(pages)
        self.leases[row] = lease
        return lease

    def copy_rest(self, lease: KVLease, token_ids: Int32Array, max_prefix: int) -> int:
        """Let a hit go on inside a page: take a page and copy what a cached one begins with.

        For a lease as `open` gave it. Returns the tokens of [0, max_prefix) that were added to its
        cached ones; 0 when there is nothing worth a copy or no page for it. See
        docs/kv_segments.md, Note [A hit ends inside a page].
        """
        may = self._copies_rests and self.kv_pool.is_on_host
        if not may or self.cache.find_rest(lease.handle, token_ids, max_prefix) is None:
            return 0
        if not self.ladder.ensure([1] * len(self.allocators)):
            return 0
        # Only now, as the ladder may have evicted what was found before; from here it does nothing.
        rest = self.cache.find_rest(lease.handle, token_ids, max_prefix)
        if rest is None:
            return 0
        granted(self.alloc_for_extend([PageNeed(lease, rest.num_tokens)]))
        for group, source in enumerate(rest.page_ids):
            target = lease.tables[group].page_ids[-1:]
            copy_pages(self.kv_pool, GroupId(group), np.array([source], np.int32), target)
        lease.num_cached_tokens = lease.num_tokens
        return rest.num_tokens

    def match_len(self, token_ids: Int32Array, extra_key: str | None = None) -> int:
        """Tokens that `open` would find cached now; locks and changes nothing."""
        return self.cache.match_len(token_ids, extra_key, len(token_ids))

    def alloc_for_extend(self, needs: Sequence[PageNeed]) -> KVPlacement | None:
        """Slots for all needs or for none; runs the ladder. None: no pages, nothing changed.

        Each lease may appear once. The leases' `num_tokens` count the new tokens from here on.
        """
        counts = [self._pages_missing(need) for need in needs]
        if self.recycler.active:
            for need in needs:
                self.recycler.before_extend(need.lease, need.num_tokens)
        layouts = self.manager.layouts
        if not self.ladder.ensure([sum(pages_taken(x, n) for n in counts) for x in layouts]):
            return None
        locs = []
        for g, allocator in enumerate(self.allocators):
            pieces = []
            for need, count in zip(needs, counts, strict=True):
                table = need.lease.tables[g]
                if count:
                    grow_table(allocator, table, count)
                pieces.append(table.slots(need.lease.num_tokens, need.num_tokens))
            locs.append(np.concatenate(pieces) if pieces else np.empty(0, np.int64))
        for need in needs:
            if self._writes is not None:
                epoch = self.manager.launched_epoch + 1
                self._writes.note_extend(need.lease, need.lease.num_tokens, epoch)
            need.lease.num_tokens += need.num_tokens
        return KVPlacement(tuple(locs), self._growth)

    def alloc_for_decode(self, needs: DecodeRows | Sequence[PageNeed]) -> KVPlacement | None:
        """One slot for each row, all or none; None: no pages, no table has grown.

        `DecodeRows` may be used again while the same requests go on. The leases' `num_tokens` count
        the new token from here on. Costs a few array operations, whatever the number of rows.
        """
        if not isinstance(needs, DecodeRows):
            needs = DecodeRows.of_needs(needs)
        steps = self._decode_steps
        if steps is None or not steps.foresees(needs):
            steps = self._decode_steps = DecodeSteps(needs, self.rows, self.page_size)
        starting = steps.starting
        if self.recycler.active:
            self.recycler.before_decode(needs.rows, steps.lengths)
        if starting.num_rows and not self.ladder.ensure([starting.num_rows] * len(self.allocators)):
            return None
        locs = []
        for group, allocator in enumerate(self.allocators):
            pages = None
            if starting.num_rows:
                hints = steps.hints(group, starting)
                pages = granted(allocator.alloc_each(hints, distinct=steps.distinct))
                self.rows.groups[group].append_each(starting.rows, pages)
            locs.append(steps.take_slots(group, starting, pages))
        steps.advance()
        # Windows drop pages meanwhile.
        tables = None if self.recycler.active else steps.tables
        return KVPlacement(tuple(locs), self._growth, tables)

    def cache_prefix(
        self,
        lease: KVLease,
        token_ids: Int32Array,
        num_tokens: int,
        *,
        keep_window: bool = False,
    ) -> None:
        """Share the computed tokens [0, num_tokens), whole pages, while the request runs.

        The lease stays locked on them. Where another request computed the same first, the lease's
        pages stay its own; the next look is then taken after twice the distance, so that all
        looks together cost O(tokens). `keep_window`: a repeat may end here (a prompt does), so
        window groups keep what it would see; groups of states do so now and then all the same.
        """
        keep_window = keep_window and self.recycler.active
        keep_window = lease.leaves_snapshot(num_tokens, self.spec.tokens_per_state, keep_window)
        if num_tokens < lease.next_share_tokens and not keep_window:
            return
        self._insert(lease, token_ids, num_tokens, keep_window=keep_window)
        own = lease.handle.num_tokens
        lease.next_share_tokens = own + max(self.page_size, 2 * (num_tokens - own))

    def close(self, lease: KVLease, token_ids: Int32Array | None, num_tokens: int) -> None:
        """End a lease: cache its computed tokens [0, num_tokens) (`token_ids` None: nothing),
        unlock, free what the cache did not take and give the row back.

        No forward may still read the lease's pages. Raises InvariantError on a second call.
        """
        if lease.closed:
            raise InvariantError(f"{lease!r} was closed twice")
        if token_ids is not None:
            self._insert(lease, token_ids, num_tokens, keep_window=self.recycler.active)
        lease.closed = True
        for allocator, table in zip(self.allocators, lease.tables, strict=True):
            allocator.index.drop_row(held_of(allocator.layout, table.page_ids))
        self.cache.release(lease.handle)
        self.rows.free_row(lease.row)
        del self.leases[lease.row]

    # ---- numbers ----------------------------------------------------------------------------

    def can_hold(self, pages: Sequence[int]) -> bool:
        """Whether the budget has room for `pages[g]` more in every group at once."""
        return self.ladder.can_hold(pages)

    def pages_held(self, lease: KVLease) -> tuple[int, ...]:
        """Pages per group that a lease need not take again; see `WindowRecycler.pages_held`."""
        return self.recycler.pages_held(lease)

    def headroom_pages(self) -> tuple[int, ...]:
        """Pages per group that admission may still promise: the budget's, less used and locked.

        While growth is paused after a refusal only mapped memory counts.
        """
        return self.ladder.headroom_pages()

    def headroom_tokens(self) -> tuple[int, ...]:
        """`headroom_pages` in tokens."""
        return tuple(pages * self.page_size for pages in self.ladder.headroom_pages())

    def pages_needed(self, need: PageNeed) -> tuple[int, ...]:
        """New pages per group that a need would take."""
        count = self._pages_missing(need)
        return tuple(pages_taken(layout, count) for layout in self.manager.layouts)

    @property
    def capacity_tokens(self) -> int:
        """Tokens of the longest sequence that the budget can hold."""
        return self.ladder.capacity_pages() * self.page_size

    @property
    def num_pending_growths(self) -> int:
        """Maps and unmaps under way."""
        return len(self.manager.pending())

    # ---- between steps ----------------------------------------------------------------------

    def on_step_boundary(self, now: float, pages_expected: Sequence[int] = ()) -> None:
        """Take over finished maps, run the idle clocks, map ahead what the next step will want.

        `now` in monotonic seconds, `pages_expected[g]` new pages of the next step (empty: none).
        Blocks only while segments come back from a tier below. Must also be called now and then
        while no request runs.
        """
        self.manager.note_time(now)
        self.ladder.settle_finished()
        self.cache.evict_idle(now, self._prefix_idle_s)
        if self._max_cached_pages is not None:
            self.cache.evict(max(0, self.cache.num_evictable_pages - self._max_cached_pages))
        self._flush_events()
        pages_expected = clip_expected(self.manager.layouts, pages_expected, len(self.leases))
        self._growth = self.ladder.look_ahead(pages_expected)
        self.ladder.shrink(now, pages_expected)
        if self._promoter is not None:
            self._promoter.step(now, pages_expected)

    def note_launched(self, epoch: int) -> None:
        """Forward `epoch` was launched: what is freed from now on is unmapped only after it."""
        self.manager.note_launched(epoch)
        self.recycler.note_launched(epoch)

    def note_completed(self, epoch: int) -> None:
        """Forward `epoch` and all before are done: memory that waited for them may go."""
        if self._writes is not None:
            self._writes.note_completed(epoch)
        self.recycler.note_completed(epoch)
        self.manager.note_completed(epoch)

    def demote(self, num_bytes: int) -> int:
        """Move at least `num_bytes` of cold segments below, as far as there is room there.

        Call it with no forward in flight. Returns how many segments went; 0 without a lower tier.
        """
        if self._writes is None:
            return 0
        return self.ladder.demote(num_bytes, self._coldest(drained=True))

    def flush(self) -> bool:
        """Drop the whole prefix cache and begin to give back what stood under it.

        The pool goes to its idle state at once, without the idle time. False, and nothing done,
        while any lease is open.
        """
        if self.leases:
            return False
        self.cache.clear()
        self._flush_events()
        self.ladder.shrink(math.inf, ())
        return True

    def audit(self) -> None:
        """Recount everything; raises InvariantError when something does not add up.

        Call it with no forward in flight; costs milliseconds.
        """
        leases = list(self.leases.values())
        audit(self.manager, self.allocators, self.cache, self.rows, leases, self.recycler)
        if self.canary is not None:
            self.canary.check_cache(self.cache)

    def watch(self, *, full: bool) -> KVCanary:
        """Keep marks of who wrote what from now on; before any request. See Note [Canary]."""
        indexes = [allocator.index for allocator in self.allocators]
        self.canary = KVCanary(indexes, self.kv_pool, full=full)
        self._copies_rests = False  # its marks are of tokens that were computed
        return self.canary

    def close_pool(self) -> None:
        """Give all memory back to the machine; nothing may be called afterwards."""
        self.manager.close()

    # ---- reports ----------------------------------------------------------------------------

    def memory_object(self) -> dict[str, object]:
        """`memory` of /server_info; the scheduler adds the context lengths. Bytes and tokens."""
        return {
            **memory_figures(self.spec, self.manager),
            "page_size": self.page_size,
            "capacity_tokens": self.capacity_tokens,
            "headroom_tokens": min(self.headroom_tokens()),
            "cached_tokens": self.cache.num_pages * self.page_size,
            "locked_cached_tokens": self.cache.num_locked_pages * self.page_size,
            "rows": {"taken": len(self.leases), "size": self.rows.size},
        }

    # ---- inside -----------------------------------------------------------------------------

    def _coldest(self, *, drained: bool = False) -> list[tuple[GroupId, SegmentId]]:
        return coldest_segments(self._heats(), drained=drained)

    def _heats(self) -> list[SegmentHeat]:
        written = [] if self._writes is None else self._writes.first_written(self.leases.values())
        leaving = self.recycler.leaving_pages
        return segment_heats(self.manager, self.allocators, written, leaving)

    def _flush_events(self) -> None:
        if self._events is not None:
            self._events.flush()

    def _pages_missing(self, need: PageNeed) -> int:
        if need.lease.closed:
            raise InvariantError(f"{need.lease!r} is closed")
        end = need.lease.num_tokens + need.num_tokens
        return max(0, num_pages_for(end, self.page_size) - need.lease.tables[0].end_page)

    def _insert(
        self, lease: KVLease, token_ids: Int32Array, num_tokens: int, *, keep_window: bool
    ) -> None:
        """Cache computed tokens, and with `keep_window` what window groups see from their end."""
        if lease.closed or num_tokens > lease.num_tokens:
            raise InvariantError(f"{lease!r} has no {num_tokens} computed tokens")
        tables = tuple(table.page_ids for table in lease.tables)
        self.cache.insert(lease.handle, token_ids, num_tokens, tables)
        if keep_window:
            held = [HeldWindow(table.page_ids, table.first_page) for table in lease.tables]
            self.cache.keep_window(lease.handle, token_ids, num_tokens, held)

    def __repr__(self) -> str:
        lower = self.manager.lower_budget_bytes
        return (
            f"KVMemory(leases={len(self.leases)}, free={self.ladder.free_pages()}, "
            f"{self.cache!r}, mapped={self.manager.mapped_bytes} of {self.manager.budget_bytes}"
            + (f", below={self.manager.lower_bytes} of {lower})" if lower else ")")
        )
