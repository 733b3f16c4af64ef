from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from srt.mem_cache.memory_driver import MemoryDriver, make_memory


def test_keeps_nothing_and_counts_its_handles() -> None:
    cache = ChunkCache(2)
    tokens = np.arange(8, dtype=np.int32)
    hit = cache.match(tokens, None, 8)
    assert (hit.num_tokens, [ids.tolist() for ids in hit.page_ids]) == (0, [[], []])
    assert cache.insert(hit.handle, tokens, 8, (tokens, tokens)) == 0
    assert cache.match_len(tokens, None, 8) == 0
    assert (cache.num_pages, cache.num_locked_pages, cache.num_evictable_pages) == (0, 0, 0)
    assert (cache.evict(5), cache.evict_idle(1.0, 0.0), cache.clear()) == (0, 0, 0)
    cache.check([hit.handle])
    with pytest.raises(InvariantError, match="handles=1"):
        cache.check([])
    cache.release(hit.handle)
    cache.check([])
    for action in (
        lambda: cache.release(hit.handle),
        lambda: cache.insert(hit.handle, tokens, 8, (tokens, tokens)),
    ):
        with pytest.raises(InvariantError):
            action()


def test_every_page_is_free_again_when_a_request_ends() -> None:
    memory, backing = make_memory(enable_prefix_cache=False)
    driver = MemoryDriver(memory, backing)
    for _ in range(2):
        request = driver.open(list(range(30)))
        assert request is not None
        assert request.lease.num_cached_tokens == 0
        assert driver.extend([(request, 30)])
        driver.cache_prefix(request, 30)
        driver.check()
        driver.close(request, insert=True)
        driver.check()
        assert memory.ladder.free_pages() == (8,)
    memory.close_pool()
