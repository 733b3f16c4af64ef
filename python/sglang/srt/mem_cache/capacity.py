"""How large the KV budget is, and how long a context it can hold. Pure arithmetic.

Called at start, and again whenever the budget changes. A requested context that does not fit is
clamped, with a text that states both numbers and how they come about; see docs/kv_segments.md,
Note [What the budget counts].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang.srt.mem_cache.kv_layout import (
    MAX_SLOTS,
    GroupKind,
    KVCacheSpec,
    KVGroupSpec,
    SegmentLayout,
    num_pages_for,
)
from sglang.srt.mem_cache.segment_cuts import (
    tiers_bytes,
)
from sglang.srt.utils.sizes import format_bytes

# States that one request holds at most: what a step begins from, what it leaves at the last page
# border, and what it ends with. See docs/kv_segments.md, Note [Recurrent state].
STATE_PAGES = 3


@dataclass(frozen=True, slots=True)
class ContextClamp:
    """The context that one request can have, in tokens.

    `capacity_tokens` is the longest that the budget and the slot space can hold, `effective` the
    lesser of it and `requested`; 0 when the budget holds nothing. `explanation` is one line with
    both numbers and the arithmetic.
    """

    requested: int
    effective: int
    capacity_tokens: int
    explanation: str

    @property
    def is_clamped(self) -> bool:
        return self.effective < self.requested


def budget_from_headroom(available_bytes: int, mem_fraction: float) -> int:
    """The default KV budget of a CPU: `mem_fraction` of what is available after loading weights.

    Raises ValueError unless 0 < `mem_fraction` <= 1.
    """
    if not 0 < mem_fraction <= 1:
        raise ValueError(f"the memory fraction must be in (0, 1], not {mem_fraction}")
    return int(max(0, available_bytes) * mem_fraction)


def tokens_kept(group: KVGroupSpec, num_tokens: int, prefill_chunk: int, page_size: int) -> int:
    """Tokens of one request of `num_tokens` that a group holds at most, in a full prefill chunk.

    All of them for FULL; a window group holds its window, the chunk being computed and up to a
    page of the one that is being left. Of states as many pages as `STATE_PAGES`.
    """
    if group.kind is GroupKind.STATE:
        return min(num_tokens, STATE_PAGES * page_size)
    if group.kind is GroupKind.FULL or group.window is None:
        return num_tokens
    # A chunk shorter than a page still takes a page.
    return min(num_tokens, group.window + max(prefill_chunk, page_size) + page_size)


def request_page_bounds(spec: KVCacheSpec, prefill_chunk: int) -> tuple[int | None, ...]:
    """Most pages per group that one request ever holds; None where it keeps all its tokens."""
    size = spec.page_size
    return tuple(
        None
        if group.kind is GroupKind.FULL
        else num_pages_for(tokens_kept(group, MAX_SLOTS, prefill_chunk, size), size)
        for group in spec.groups
    )


def request_segments(
    spec: KVCacheSpec, layouts: Sequence[SegmentLayout], num_tokens: int, prefill_chunk: int
) -> tuple[int, ...]:
    """Segments per group that one request of `num_tokens` needs when it is alone."""
    return tuple(
        -(
            -tokens_kept(group, num_tokens, prefill_chunk, spec.page_size)
            // layout.slots_per_segment
        )
        for group, layout in zip(spec.groups, layouts, strict=True)
    )


def effective_context_length(
    spec: KVCacheSpec,
    layouts: Sequence[SegmentLayout],
    *,
    budget_bytes: int,
    reserve_segments: int,
    requested: int,
    prefill_chunk: int,
    lower_bytes: int = 0,
    lower_place: str = "below",
) -> ContextClamp:
    """Clamp `requested` tokens to what one request can have.

    The largest n whose segments, over all groups, and `reserve_segments` empty ones per group fit
    in `budget_bytes` and `lower_bytes` together, and whose slots exist. `prefill_chunk` is the most
    tokens of a request that one step computes.
    """
    reserve = [min(reserve_segments, layout.max_segments - 1) for layout in layouts]
    reserve_bytes = _bytes(layouts, reserve)
    bound = tiers_bytes(layouts, budget_bytes, lower_bytes)

    def fits(num_tokens: int) -> bool:
        segments = request_segments(spec, layouts, num_tokens, prefill_chunk)
        usable = (layout.max_segments - 1 for layout in layouts)
        if any(need > have for need, have in zip(segments, usable, strict=True)):
            return False
        return _bytes(layouts, segments) + reserve_bytes <= bound

    low = 0  # fits(0) may be false; then nothing does
    # no group can hold more: a context whose every group is a window still ends somewhere
    high = 1 + max((layout.max_segments - 1) * layout.slots_per_segment for layout in layouts)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    effective = min(requested, low)
    bounds = f"a KV budget of {budget_bytes:,} bytes ({format_bytes(budget_bytes)})"
    if lower_bytes:
        bounds += f" and {lower_bytes:,} bytes {lower_place} ({format_bytes(lower_bytes)})"
    text = _explain(spec, layouts, bounds, reserve, requested, effective, low, prefill_chunk)
    return ContextClamp(requested, effective, low, text)


def _bytes(layouts: Sequence[SegmentLayout], segments: Sequence[int]) -> int:
    return sum(n * layout.segment_bytes for n, layout in zip(segments, layouts, strict=True))


def _explain(
    spec: KVCacheSpec,
    layouts: Sequence[SegmentLayout],
    bounds: str,
    reserve: Sequence[int],
    requested: int,
    effective: int,
    capacity: int,
    prefill_chunk: int,
) -> str:
    segments = request_segments(spec, layouts, capacity, prefill_chunk)
    terms = []
    for group, layout, need, kept in zip(spec.groups, layouts, segments, reserve, strict=True):
        name = "" if spec.num_groups == 1 else f" ({group.kind.value} group {layout.group})"
        ranks = "" if layout.kv_parallel == 1 else f" over {layout.kv_parallel} ranks"
        what = f"{layout.slots_per_segment:,} tokens x {spec.bytes_per_slot(layout.group):,} bytes"
        if layout.holds_states:
            what = f"{layout.pages_per_segment:,} states x {group.state_bytes:,} bytes"
        terms.append(f"{need} + {kept} in reserve segments of {what}{ranks}{name}")
    held = _bytes(layouts, segments) + _bytes(layouts, reserve)
    verdict = "is clamped to" if effective < requested else "fits: effective"
    return (
        f"requested context of {requested:,} tokens {verdict} {effective:,} tokens; one request "
        f"can have {capacity:,}: {'; '.join(terms)} = {held:,} bytes of {bounds}; a token "
        f"that every layer keeps takes {spec.bytes_per_token:,} bytes"
    )
