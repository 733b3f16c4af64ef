"""An audit that finds nothing proves nothing: each kind of damage is found and named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.allocation import KVMemory, PageNeed
from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentId
from sglang.srt.mem_cache.page_owner import PageState
from srt.mem_cache.memory_driver import make_memory


@pytest.fixture
def memory() -> KVMemory:
    """Row 1 runs with pages 4 and 5 shared and 6 its own; page 7 is free; segment 1 is mapped."""
    memory, _ = make_memory(budget_segments=1)
    tokens = np.arange(12, dtype=np.int32)
    lease = memory.open(tokens, max_prefix=11)
    assert lease is not None
    assert memory.alloc_for_extend([PageNeed(lease, 10)]) is not None
    memory.cache_prefix(lease, tokens, 10)
    memory.audit()
    return memory


def _index(memory: KVMemory):  # type: ignore[no-untyped-def]
    return memory.allocators[0].index


def _lose_a_page(memory: KVMemory) -> None:
    _index(memory).state[7] = PageState.UNMAPPED


def _own_a_free_page(memory: KVMemory) -> None:
    _index(memory).node[7] = 3


def _two_tables(memory: KVMemory) -> None:
    other = memory.open(np.array([7], np.int32), max_prefix=0)
    assert other is not None
    other.tables[0].append_page(6)
    other.num_tokens = 4


def _forget_a_row(memory: KVMemory) -> None:
    _index(memory).rows[4] = 0


def _count_wrong(memory: KVMemory) -> None:
    _index(memory).counts[PageState.FREE, 1] += 1


def _total_wrong(memory: KVMemory) -> None:
    _index(memory).totals[PageState.CACHED] += 1


def _manager_differs(memory: KVMemory) -> None:
    memory.manager.add_pages(GroupId(0), SegmentId(1), used=1)


def _unknown_segment(memory: KVMemory) -> None:
    _index(memory).add_segment(2)


def _dump_segment(memory: KVMemory) -> None:
    _index(memory).state[0] = PageState.FREE


def _table_too_long(memory: KVMemory) -> None:
    memory.leases[1].num_tokens = 3  # type: ignore[index]
    memory.leases[1].handle.num_tokens = 0  # type: ignore[index]


def _locks_too_much(memory: KVMemory) -> None:
    memory.leases[1].num_tokens = 7  # type: ignore[index]


def _foreign_table(memory: KVMemory) -> None:
    table = BlockTable(4)
    table.extend(memory.leases[1].tables[0].page_ids.copy())  # type: ignore[index]
    memory.leases[1].tables = (table,)  # type: ignore[index]


def _runs_wrong(memory: KVMemory) -> None:
    table = memory.leases[1].tables[0]  # type: ignore[index]
    table.snapshot()
    table._run_end -= 1


def _outside_its_range(memory: KVMemory) -> None:
    memory.rows.groups[0].limit[1] += 2000


def _other_last_page(memory: KVMemory) -> None:
    memory.rows.groups[0].last_page[1] += 1


def _lease_lost(memory: KVMemory) -> None:
    row = memory.rows.alloc_row()
    assert row is not None


def _closed_lease(memory: KVMemory) -> None:
    memory.leases[1].closed = True  # type: ignore[index]


def _early_unlock(memory: KVMemory) -> None:
    memory.cache.release(memory.leases[1].handle)  # type: ignore[index]


def _stray_bytes(memory: KVMemory) -> None:
    resident = memory.manager.backing.resident_bytes() or 0
    memory.manager.backing.resident_bytes = lambda: resident + (1 << 20)  # type: ignore[method-assign]


def _missing_bytes(memory: KVMemory) -> None:
    """Mapped segments that the system does not back: only a backing of whole pages can tell."""
    memory.manager.backing.granule_bytes = 4096  # type: ignore[misc]
    memory.manager.backing.resident_bytes = lambda: 0  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_lose_a_page, "FREE per segment"),
        (_own_a_free_page, "cached pages and tree pages"),
        (_two_tables, "rows per page"),
        (_forget_a_row, "rows per page"),
        (_count_wrong, "FREE per segment"),
        (_total_wrong, "CACHED total"),
        (_manager_differs, "but the index counts"),
        (_unknown_segment, "known to one side"),
        (_dump_segment, "dump segment"),
        (_table_too_long, "holds 3 pages, not 1"),
        (_locks_too_much, "locks too much"),
        (_foreign_table, "not its row's table"),
        (_runs_wrong, "runs differ"),
        (_outside_its_range, "leaves its range"),
        (_other_last_page, "its last page is not 7"),
        (_lease_lost, "rows and leases"),
        (_closed_lease, "kept as open"),
        (_early_unlock, "not locked by that many|is unlocked but"),
        (_stray_bytes, "resident"),
        (_missing_bytes, "0 bytes are resident"),
    ],
)
def test_damage_is_found(
    memory: KVMemory, damage: Callable[[KVMemory], None], complaint: str
) -> None:
    damage(memory)
    with pytest.raises(InvariantError, match=complaint):
        memory.audit()
