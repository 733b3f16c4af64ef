from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.mem_cache.upstream import ReqToTokenPool


def run(first: int, count: int) -> torch.Tensor:
    return torch.arange(first, first + count)


def test_rows_come_and_go() -> None:
    pool = ReqToTokenPool(3, 100, "cpu", False)
    assert pool.alloc(2) == [1, 2]
    assert pool.alloc(2) is None
    assert pool.available_size() == 1
    pool.free(1)
    assert pool.alloc(2) == [1, 3]
    pool.free([2, 3])
    pool.clear()
    assert pool.available_size() == 3
    with pytest.raises(InvariantError):
        pool.write((1, slice(0, 1)), run(5, 1))


def test_what_is_written_is_read() -> None:
    pool = ReqToTokenPool(2, 100, "cpu", page_size=4)
    pool.alloc(2)
    pool.write((1, slice(0, 6)), torch.cat([run(8, 4), run(40, 2)]))
    pool.write((1, slice(6, 7)), run(42, 1))
    pool.req_to_token[1, 7:12] = torch.cat([run(43, 1), run(4, 4)])
    assert pool.req_to_token[1, 2:10].tolist() == [10, 11, 40, 41, 42, 43, 4, 5]
    pool.write((1, slice(4, 8)), run(20, 4))  # another page in the middle
    assert pool.read(1, 0, 12).tolist() == [8, 9, 10, 11, 20, 21, 22, 23, 4, 5, 6, 7]
    pool.write((2, slice(0, 0)), run(0, 0))
    with pytest.raises(ValueError, match="where the slice ends"):
        pool.req_to_token[1, 2:]


@pytest.mark.parametrize(
    ("place", "slots", "complaint"),
    [
        (slice(9, 12), run(9, 3), "beyond"),
        (slice(8, 12), run(9, 4), "whole pages"),
        (slice(4, 8), torch.tensor([8, 9, 11, 10]), "whole pages"),
        (slice(6, 8), run(14, 2), "elsewhere"),
        (slice(12, 16), run(12, 4), "beyond"),
        (slice(0, 3), run(4, 4), "do not fit"),
        (slice(96, 104), run(96, 8), "do not fit"),
    ],
)
def test_what_is_no_table_of_pages_is_refused(
    place: slice, slots: torch.Tensor, complaint: str
) -> None:
    pool = ReqToTokenPool(1, 100, "cpu", page_size=4)
    pool.alloc(1)
    pool.write((1, slice(0, 8)), run(4, 8))
    with pytest.raises(ValueError, match=complaint):
        pool.write((1, place), slots)
    assert pool.read(1, 0, 8).tolist() == list(range(4, 12))


@settings(max_examples=100, deadline=None)
@given(
    page_size=st.sampled_from([1, 16, 64]),
    pages=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 12 * 64), max_size=6),
)
def test_written_in_pieces_it_reads_as_a_dense_row(
    page_size: int, pages: list[int], cuts: list[int]
) -> None:
    dense = [page * page_size + i for page in pages for i in range(page_size)]
    pool = ReqToTokenPool(1, len(dense), "cpu", page_size=page_size)
    pool.alloc(1)
    marks = sorted({0, len(dense), *(cut for cut in cuts if cut < len(dense))})
    for first, end in pairwise(marks):
        pool.write((1, slice(first, end)), torch.tensor(dense[first:end]))
        assert pool.read(1, 0, end).tolist() == dense[:end]
