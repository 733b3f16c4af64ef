"""Hits that go on inside a page by a copy: Note [A hit ends inside a page]."""

from __future__ import annotations

import numpy as np

from srt.mem_cache.memory_driver import MemoryDriver, make_memory, tokens_of


def copying(budget_segments: int = 6) -> tuple[MemoryDriver, list[int]]:
    """Pages of 4; twelve tokens are cached and nobody reads them."""
    driver = MemoryDriver(*make_memory(budget_segments=budget_segments, max_segments=8))
    tokens = list(range(12))
    first = driver.open(tokens)
    assert first is not None
    assert driver.extend([(first, 12)])
    driver.close(first, insert=True)
    return driver, tokens


def test_a_hit_goes_on_inside_a_page_by_a_copy() -> None:
    driver, tokens = copying()
    second = driver.open([*tokens[:7], 99, 98], copies=True)
    assert second is not None
    assert second.lease.num_cached_tokens == second.num_computed == 7
    assert second.lease.tables[0].page_ids.tolist() == [4, 7], "a page of its own for the rest"
    driver.check()
    assert driver.extend([(second, 2)])
    driver.check()
    driver.close(second, insert=True)
    assert driver.memory.match_len(np.array(tokens, np.int32)) == 12, "the source is as it was"
    assert driver.memory.match_len(tokens_of(*tokens[:7], 99)) == 8


def test_the_longest_continuation_is_copied_and_never_the_last_token() -> None:
    driver, tokens = copying()
    other = driver.open([*tokens[:5], 50, 51, 52, 53])
    assert other is not None
    assert driver.extend([(other, other.lease.num_cached_tokens and 5)])
    driver.close(other, insert=True)
    for prompt, cached in (
        ([*tokens[:6], 51], 6),
        ([*tokens[:5], 50, 51], 6),  # not 7: a token must be left to compute
        ([*tokens[:5], 50, 51, 60], 7),
        (tokens, 11),
        ([*tokens[:4], 77, 78], 4),
    ):
        found = driver.open(prompt, copies=True)
        assert found is not None
        assert found.lease.num_cached_tokens == cached, prompt
        driver.check()
        driver.close(found, insert=False)


def test_no_copy_where_no_page_is_free_or_the_source_must_go_for_it() -> None:
    driver, tokens = copying(budget_segments=1)  # 4 pages
    memory = driver.memory
    rest = driver.open([200] * 5)
    assert rest is not None
    assert driver.extend([(rest, 4)])
    hit = driver.open([*tokens[:10], 99], copies=True)
    assert hit is not None
    # The third page was the only one to be had: it went for the copy that was to be made of it.
    assert hit.lease.num_cached_tokens == 8
    assert memory.memory_object()["pages"] == {"free": 1, "used": 1, "cached": 2}
    assert driver.extend([(rest, 1)])
    full = driver.open([*tokens[:6], 99], copies=True)
    assert full is not None
    assert full.lease.num_cached_tokens == 4
    driver.check()


def test_nothing_is_copied_past_a_canary() -> None:
    driver, tokens = copying()
    driver.memory.watch(full=False)
    found = driver.open([*tokens[:7], 99], copies=True)
    assert found is not None
    assert found.lease.num_cached_tokens == 4
