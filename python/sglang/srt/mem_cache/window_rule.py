"""Which tokens the layers of a window group can still attend, as arithmetic of positions and pages.

Sliding: a query at p sees (p - window, p]. Chunked: it sees [p - p % window, p]. The facade's
recycler, the prefix cache and tests ask; nothing here holds state. See docs/kv_segments.md,
Note [Window groups recycle].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang.srt.mem_cache.kv_layout import GroupKind, KVCacheSpec, KVGroupSpec

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class WindowRule:
    """The sight of one window group; `kind` is SLIDING or CHUNKED, or STATE with a window of 2.

    A token of a STATE group needs the state after the one before it, which stands in that one's
    page: as if it saw these two tokens.
    """

    kind: GroupKind
    window: int
    page_size: int

    def visible_start(self, position: int) -> int:
        """First position that a query at `position` sees; never falls as `position` grows."""
        if self.kind is GroupKind.CHUNKED:
            return position - position % self.window
        return max(0, position - self.window + 1)

    def first_page(self, position: int) -> int:
        """Page (counted from the sequence's start) of the first position seen from `position`."""
        return self.visible_start(position) // self.page_size

    def first_pages(self, num_points: int) -> Int64Array:
        """`first_page` of the page borders 0, 1, ..., num_points - 1, int64 [num_points]."""
        positions = np.arange(num_points, dtype=np.int64) * self.page_size
        if self.kind is GroupKind.CHUNKED:
            return (positions - positions % self.window) // self.page_size
        return np.maximum(0, positions - self.window + 1) // self.page_size

    def kept_page(self, start: int, count: int) -> int:
        """First page to keep when tokens [start, start + count) are about to be computed.

        Their queries see [visible_start(start), ...). So that the prefix cache can keep what a
        repeat wants, the window of the last page border before the end stays too: a repeat has to
        compute at least one token, so it begins there.
        """
        border = (start + count - 1) // self.page_size * self.page_size
        return self.first_page(min(start, border))

    def kept_page_of_decode(self, length: int) -> int:
        """As `kept_page` for the one token after `length`, with one border more.

        The prompt's last chunk may still be under way when the first decode is placed, so its
        border, the last one before `length`, has to stay as well.
        """
        return int(self.kept_pages_of_decode(np.array([length]))[0])

    def kept_pages_of_decode(self, lengths: Int64Array) -> Int64Array:
        """`kept_page_of_decode` of many lengths, int64 [n]."""
        borders = np.maximum(lengths - 1, 0)
        borders -= borders % self.page_size
        if self.kind is GroupKind.CHUNKED:
            borders -= borders % self.window
        else:
            borders -= self.window - 1
            np.maximum(borders, 0, out=borders)
        borders //= self.page_size
        return borders


def window_rules(spec: KVCacheSpec) -> tuple[WindowRule | None, ...]:
    """The rule of every group, None for those that keep all."""
    return tuple(_rule(group, spec.page_size) for group in spec.groups)


def _rule(group: KVGroupSpec, page_size: int) -> WindowRule | None:
    if group.kind is GroupKind.STATE:
        return WindowRule(group.kind, 2, page_size)
    return None if group.window is None else WindowRule(group.kind, group.window, page_size)
