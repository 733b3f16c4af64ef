"""Which tokens of a request forwards may still write, so that they stay where they are."""

from __future__ import annotations

from sglang.srt.mem_cache.allocation import PageNeed
from sglang.srt.mem_cache.cold_segments import RecentWrites
from srt.mem_cache.memory_driver import make_memory, tokens_of


def test_tails_extends_and_what_a_draft_model_lacks_may_be_written() -> None:
    memory, _ = make_memory()
    lease = memory.open(tokens_of(*range(20)), max_prefix=0)
    assert lease is not None
    memory.alloc_for_extend([PageNeed(lease, 20)])
    writes = RecentWrites()
    assert writes.first_written([lease]) == [(lease, 17)], "decode steps under way"
    writes.note_extend(lease, 12, epoch=4)
    assert writes.first_written([lease]) == [(lease, 12)]
    lease.rewritten_from = 5
    assert writes.first_written([lease]) == [(lease, 5)]
    lease.rewritten_from = 19
    writes.note_completed(4)
    assert writes.first_written([lease]) == [(lease, 17)]
    memory.close(lease, tokens_of(), 0)
    memory.close_pool()
