"""Foreseen decode steps give the slots that the tables say, whatever happens in between."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sglang.srt.mem_cache.allocation import DecodeRows, KVLease, KVMemory, PageNeed
from srt.mem_cache.fake_backing import FakeBacking
from srt.mem_cache.memory_driver import make_memory


def opened(memory: KVMemory, *lengths: int) -> list[KVLease]:
    leases = []
    for i, length in enumerate(lengths):
        lease = memory.open(np.full(length, i, np.int32), max_prefix=0)
        assert lease is not None
        assert memory.alloc_for_extend([PageNeed(lease, length)]) is not None
        leases.append(lease)
    return leases


def check_step(memory: KVMemory, rows: DecodeRows) -> None:
    """One step: every row's new slot is where its table has the new position."""
    before = [lease.num_tokens for lease in rows.leases]
    placement = memory.alloc_for_decode(rows)
    assert placement is not None
    assert [lease.num_tokens for lease in rows.leases] == [count + 1 for count in before]
    for group, slots in enumerate(placement.out_cache_loc):
        expected = [
            lease.tables[group].slot_of(count)
            for lease, count in zip(rows.leases, before, strict=True)
        ]
        assert slots.tolist() == expected
    assert placement.tables is not None
    for group, tables in enumerate(placement.tables()):
        for lease, found in zip(rows.leases, tables, strict=True):
            now = lease.tables[group].snapshot()
            assert found.page_ids.tolist() == now.page_ids.tolist()
            assert found[1:] == now[1:]
    memory.audit()


@pytest.mark.parametrize("page_size", [1, 4])
def test_steps_in_a_row_are_foreseen_once(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory(page_size=page_size, pages_per_segment=16)[0]
    rows = DecodeRows.of(opened(memory, 1, 2, 4, 5))
    check_step(memory, rows)
    seen = memory._decode_steps
    for _ in range(9):
        check_step(memory, rows)
        assert memory._decode_steps is seen


def test_tables_are_the_same_until_one_changes() -> None:
    memory = make_memory(page_size=4, pages_per_segment=16)[0]
    first, second = opened(memory, 1, 2)
    rows = DecodeRows.of((first, second))

    def tables() -> object:
        placement = memory.alloc_for_decode(rows)
        assert placement is not None
        assert placement.tables is not None
        return placement.tables()

    seen = tables()  # 2 and 3 tokens by now
    assert tables() is seen  # 3 and 4: the second starts a page in the next step
    later = tables()
    assert later is not seen
    first.tables[0].replace_pages(first.tables[0].page_ids.copy())  # as compaction does
    assert tables() is not later


def test_slots_that_were_given_stay_as_they_were() -> None:
    memory = make_memory()[0]
    rows = DecodeRows.of(opened(memory, 1, 2, 4))
    given = [memory.alloc_for_decode(rows) for _ in range(8)]
    found = [placement.out_cache_loc[0].tolist() for placement in given if placement is not None]
    for i, lease in enumerate(rows.leases):
        first = lease.num_tokens - 8
        table = lease.tables[0]
        assert [slots[i] for slots in found] == [table.slot_of(first + s) for s in range(8)]


def test_the_order_of_the_batch_is_kept() -> None:
    memory = make_memory()[0]
    leases = opened(memory, 3, 1, 4, 2)
    for order in ([2, 0, 3, 1], [3, 1], [0, 1, 2, 3]):
        rows = DecodeRows.of([leases[i] for i in order])
        for _ in range(5):
            check_step(memory, rows)


def test_whatever_moves_a_row_in_between_is_seen() -> None:
    memory = make_memory(budget_segments=14)[0]
    leases = opened(memory, 3, 1, 4)
    rows = DecodeRows.of(leases)
    random_ = random.Random(5)
    for _ in range(12):
        check_step(memory, rows)
        match random_.randrange(4):
            case 0:  # another request comes and goes
                (other,) = opened(memory, 3)
                check_step(memory, rows)
                memory.close(other, None, 0)
            case 1:  # one of them gets tokens otherwise
                assert memory.alloc_for_extend([PageNeed(leases[1], 2)]) is not None
            case 2:  # a page moves
                table = leases[0].tables[0]
                assert memory.ladder.ensure([1])
                free = memory.allocators[0].alloc_pages(1)
                assert free is not None
                old = table.page_ids.copy()
                index = memory.allocators[0].index
                index.drop_row(free)
                index.relocate(old[-1:], free)
                table.replace_pages(np.concatenate([old[:-1], free]))


def test_a_step_without_pages_changes_nothing_and_can_be_asked_again() -> None:
    backing = FakeBacking()
    memory = make_memory(backing=backing, budget_segments=2)[0]
    rows = DecodeRows.of(opened(memory, 4, 5))
    (other,) = opened(memory, 4 * 4)
    check_step(memory, rows)
    taken = 0
    while (placement := memory.alloc_for_decode(rows)) is not None:
        taken += 1
        assert placement.out_cache_loc[0].size == 2
    assert taken > 0
    lengths = [lease.num_tokens for lease in rows.leases]
    memory.audit()
    assert memory.alloc_for_decode(rows) is None
    assert [lease.num_tokens for lease in rows.leases] == lengths
    memory.close(other, None, 0)
    check_step(memory, rows)
