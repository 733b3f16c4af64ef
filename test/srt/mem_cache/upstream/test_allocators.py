"""SGLang's allocators against a plain model: sets of pages and lists of slots."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.allocator import PageAllocator
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentLayout
from sglang.srt.mem_cache.upstream import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator

PAGE_SIZES = st.sampled_from([1, 16, 64])


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def paged(num_pages: int, page_size: int) -> PagedTokenToKVPoolAllocator:
    pool = object()
    return PagedTokenToKVPoolAllocator(
        num_pages * page_size, page_size, torch.bfloat16, "cpu", pool, False
    )


def extend(
    allocator: PagedTokenToKVPoolAllocator, prefix: list[int], end: list[int], last: list[int]
) -> list[int] | None:
    a, b = ints(*prefix), ints(*end)
    slots = allocator.alloc_extend(a, a, b, b, ints(*last), int((b - a).sum()))
    return None if slots is None else slots.tolist()


def decode(
    allocator: PagedTokenToKVPoolAllocator, lengths: list[int], last: list[int]
) -> list[int] | None:
    slots = allocator.alloc_decode(ints(*lengths), ints(*lengths), ints(*last))
    return None if slots is None else slots.tolist()


def test_slots_of_one_never_give_out_the_first() -> None:
    pool = object()
    allocator = TokenToKVPoolAllocator(5, torch.float16, "cpu", pool)
    assert allocator.get_kvcache() is pool
    assert (allocator.size, allocator.page_size, allocator.available_size()) == (5, 1, 5)
    taken = allocator.alloc(3)
    assert taken is not None
    assert taken.dtype == torch.int64
    assert taken.tolist() == [2, 3, 4]
    assert allocator.alloc(3) is None
    assert allocator.available_size() == 2, "a refusal takes nothing"
    allocator.free(taken[1:2])
    assert sorted(allocator.alloc(3).tolist()) == [1, 3, 5]  # type: ignore[union-attr]
    allocator.clear()
    assert allocator.available_size() == 5


def test_pages_are_filled_before_new_ones_begin() -> None:
    allocator = paged(8, 4)
    assert extend(allocator, [0], [6], [-1]) == [16, 17, 18, 19, 20, 21]
    assert decode(allocator, [7], [21]) == [22]
    assert extend(allocator, [7], [8], [22]) == [23]
    assert decode(allocator, [9], [23]) == [24], "the page behind is free, so it is next"
    assert allocator.available_size() == 5 * 4
    both = extend(allocator, [9, 0], [14, 5], [24, -1])
    assert both is not None
    assert both[:5] == [25, 26, 27, 28, 29]
    assert both[5] % 4 == 0
    assert both[5:9] == list(range(both[5], both[5] + 4))


def test_an_extend_is_all_or_nothing() -> None:
    allocator = paged(3, 4)
    assert extend(allocator, [0, 0], [8, 5], [-1, -1]) is None
    assert allocator.available_size() == 12
    assert extend(allocator, [0, 0], [8, 4], [-1, -1]) is not None
    assert decode(allocator, [9, 5], [11, 15]) is None
    assert allocator.available_size() == 0
    assert extend(allocator, [4], [4], [15]) == []
    with pytest.raises(ValueError, match="not the sum"):
        allocator.alloc_extend(ints(0), ints(0), ints(4), ints(4), ints(-1), 5)
    with pytest.raises(ValueError, match="whole pages"):
        allocator.alloc(5)


def test_a_free_group_frees_at_its_end() -> None:
    allocator = paged(6, 4)
    slots = allocator.alloc(24)
    assert slots is not None
    allocator.free_group_begin()
    allocator.free(slots[:4])
    allocator.free(slots[12:20])
    assert allocator.available_size() == 0
    allocator.free_group_end()
    assert allocator.available_size() == 12
    allocator.free_group_begin()
    allocator.free_group_end()
    allocator.free(slots[4:6])  # a page is free when any of its slots is
    assert allocator.available_size() == 16
    with pytest.raises(InvariantError):
        allocator.free(slots[:1])
    with pytest.raises(InvariantError):
        allocator.free(ints(1))  # page 0 is nobody's
    assert allocator.available_size() == 16


def test_a_state_can_be_restored() -> None:
    allocator = paged(10, 16)
    first = allocator.alloc(48)
    assert first is not None
    state = allocator.backup_state()
    second = allocator.alloc(64)
    assert second is not None
    allocator.free(first[:16])
    allocator.restore_state(state)
    assert allocator.available_size() == 7 * 16
    with pytest.raises(InvariantError):
        allocator.free(second)
    allocator.free(first)
    assert allocator.available_size() == 160


def test_it_stands_on_given_pages_and_asks_for_more() -> None:
    pages = PageAllocator(SegmentLayout(GroupId(0), 16, 4, 10, 1, 8, 8, 1))
    asked: list[int] = []

    def ensure(count: int) -> bool:
        asked.append(count)
        if len(asked) > 2:
            return False
        pages.add_segments([len(asked)])
        return True

    allocator = PagedTokenToKVPoolAllocator(
        640, 16, torch.float32, "cpu", None, pages=pages, ensure=ensure
    )
    assert allocator.available_size() == 0
    assert allocator.alloc(32).tolist() == list(range(64, 96))  # type: ignore[union-attr]
    assert allocator.alloc(64).tolist() == list(range(128, 192))  # type: ignore[union-attr]
    assert allocator.alloc(64) is None
    assert asked == [2, 4, 4]
    allocator.clear()
    assert pages.num_free == 8


class Model:
    """Requests as lists of slots, pages as a set; knows nothing of how pages are chosen."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.size = page_size
        self.free = set(range(1, num_pages + 1))
        self.requests: list[list[int]] = []

    def needed(self, before: int, after: int) -> int:
        return -(-after // self.size) - -(-before // self.size)

    def take(self, request: list[int], slots: list[int]) -> None:
        for slot in slots:
            page, offset = divmod(slot, self.size)
            assert offset == len(request) % self.size
            if offset == 0:
                self.free.remove(page)  # KeyError: given twice, or page 0
            else:
                assert slot == request[-1] + 1
            request.append(slot)


ACTION = st.one_of(
    st.tuples(
        st.just("extend"),
        st.lists(st.tuples(st.booleans(), st.integers(0, 200)), min_size=1, max_size=4),
    ),
    st.tuples(st.just("decode"), st.integers(1, 40)),
    st.tuples(st.just("free"), st.integers(0, 9), st.booleans()),
    st.tuples(st.just("alloc"), st.integers(0, 3)),
    st.tuples(st.just("backup"), st.integers(1, 100)),
    st.tuples(st.just("clear")),
)


@settings(max_examples=120, deadline=None)
@given(page_size=PAGE_SIZES, num_pages=st.integers(1, 40), actions=st.lists(ACTION, max_size=25))
def test_against_a_plain_model(page_size: int, num_pages: int, actions: list[tuple]) -> None:
    allocator, model = paged(num_pages, page_size), Model(num_pages, page_size)
    for name, *args in actions:
        if name == "extend":
            chosen: list[tuple[list[int], int]] = []
            for number, (old, count) in enumerate(args[0]):
                known = number < len(model.requests)
                chosen.append((model.requests[number] if old and known else [], count))
            prefix = [len(request) for request, _ in chosen]
            end = [len(request) + count for request, count in chosen]
            last = [request[-1] if request else -1 for request, _ in chosen]
            slots = extend(allocator, prefix, end, last)
            total = sum(model.needed(a, b) for a, b in zip(prefix, end, strict=True))
            assert (slots is None) == (total > len(model.free))
            for request, count in chosen if slots is not None else ():
                assert slots is not None
                model.take(request, slots[:count])
                slots = slots[count:]
                if request and not any(request is known for known in model.requests):
                    model.requests.append(request)
        elif name == "decode" and model.requests:
            for _ in range(args[0]):
                batch = model.requests
                found = decode(
                    allocator, [len(r) + 1 for r in batch], [request[-1] for request in batch]
                )
                total = sum(len(request) % page_size == 0 for request in batch)
                assert (found is None) == (total > len(model.free))
                for request, slot in zip(batch, found or [], strict=False):
                    model.take(request, [slot])
        elif name == "free" and model.requests:
            request = model.requests.pop(args[0] % len(model.requests))
            if args[1]:
                allocator.free_group_begin()
                half = len(request) // 2 // page_size * page_size
                allocator.free(ints(*request[half:]))
                allocator.free(ints(*request[:half]))
                allocator.free_group_end()
            else:
                allocator.free(ints(*request))
            model.free |= {slot // page_size for slot in request}
        elif name == "alloc":
            taken = allocator.alloc(args[0] * page_size)
            assert (taken is None) == (args[0] > len(model.free))
            if taken is not None:
                pages = taken.tolist()[::page_size]
                wanted = [page + i for page in pages for i in range(page_size)]
                assert taken.tolist() == wanted
                assert {page // page_size for page in pages} <= model.free
                allocator.free(taken)
        elif name == "backup":
            state = allocator.backup_state()
            extend(allocator, [0], [args[0]], [-1])
            if model.requests:
                allocator.free(ints(*model.requests[0]))
            allocator.restore_state(state)
        elif name == "clear":
            allocator.clear()
            model = Model(num_pages, page_size)
        assert allocator.available_size() == len(model.free) * page_size
