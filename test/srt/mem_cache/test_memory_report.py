from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.mem_cache.allocation import KVMemory, PageNeed
from sglang.srt.mem_cache.memory_report import memory_details, segment_maps
from srt.managers.scheduler_harness import Harness, make_memory

PAGE = 4


def filled(groups: int) -> KVMemory:
    """Three mapped segments of four pages per group: full, half used, one cached page."""
    memory = make_memory(page_size=PAGE, pages_per_segment=4, segments=8, groups=groups)
    leases = []
    for tokens in (16, 16, 16):
        lease = memory.open(np.arange(tokens, dtype=np.int32), max_prefix=0)
        assert lease is not None
        assert memory.alloc_for_extend([PageNeed(lease, tokens)]) is not None
        leases.append(lease)
    memory.close(leases[2], np.arange(16, dtype=np.int32), 4)
    memory.close(leases[1], None, 0)
    return memory


@pytest.mark.parametrize("groups", [1, 2])
def test_the_map_lists_every_segment_with_memory(groups: int) -> None:
    memory = filled(groups)
    found = segment_maps(memory.manager)
    assert [one["group"] for one in found] == list(range(groups))
    for one in found:
        assert one["pages_per_segment"] == 4
        assert one["num_segments"] == 3
        assert one["segments"] == [[1, "M", 4, 0, 0], [2, "M", 0, 0, 4], [3, "M", 0, 1, 3]]
    details = memory_details(memory.manager)
    assert details["segment_maps"] == found
    assert details["resident_bytes"] == memory.manager.mapped_bytes + memory.manager.fixed_bytes


def test_segments_under_way_have_letters_of_their_own() -> None:
    memory = filled(1)
    manager = memory.manager
    memory.ladder.look_ahead((8,))
    letters = [segment[1] for segment in segment_maps(manager)[0]["segments"]]
    assert letters == ["M", "M", "M", "G"]
    for ticket in manager.pending():
        manager.wait(ticket)
    manager.note_launched(1)
    # segment 3's page goes while forward 1 may read it: its unmap has to wait
    memory.cache.evict(1)
    plan = manager.plan_shrink(1e9)
    assert plan is not None
    manager.apply(plan)
    letters = [segment[1] for segment in segment_maps(manager)[0]["segments"]]
    assert letters == ["M", "D", "D", "D"]
    manager.note_completed(1)
    memory.close_pool()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_map_is_bounded(groups: int) -> None:
    memory = filled(groups)
    for one in segment_maps(memory.manager, limit=2 * groups):
        assert one["num_segments"] == 3
        assert [segment[0] for segment in one["segments"]] == [1, 2]


def test_only_server_info_pays_for_the_details() -> None:
    asked = []

    class Counting:
        def __init__(self, inner: object) -> None:
            self._inner = inner

        def resident_bytes(self) -> int:
            asked.append(1)
            return 12_345

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

    memory = make_memory(page_size=PAGE)
    memory.manager.backing = Counting(memory.manager.backing)  # type: ignore[assignment]
    harness = Harness(memory, page_size=PAGE)
    harness.send("a", range(20), max_new=5)
    harness.run()
    plain = harness.control("internal_state").data
    assert asked == []
    told = harness.control("server_info").data
    assert asked == [1]
    assert told["memory"]["resident_bytes"] == 12_345
    assert told["memory"]["segment_maps"][0]["num_segments"] == 1
    extra = {"resident_bytes", "segment_maps"}
    assert {k: v for k, v in told["memory"].items() if k not in extra} == plain["memory"]
