from __future__ import annotations

import pytest
import torch

from sglang.srt.distributed.parallel_state import ParallelState


def test_one_rank_communicates_with_nobody() -> None:
    state = ParallelState()
    tensor = torch.arange(3)
    assert state.all_reduce(tensor) is tensor
    assert state.all_gather(tensor, 0) is tensor


def test_more_ranks_are_refused_when_they_would_communicate() -> None:
    state = ParallelState(1, 2)
    with pytest.raises(NotImplementedError, match=r"all_reduce over 2 ranks.*--tp-size 1"):
        state.all_reduce(torch.zeros(1))
    with pytest.raises(NotImplementedError, match="all_gather"):
        state.all_gather(torch.zeros(1))


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 1), (0, 0)])
def test_a_rank_outside_its_group_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="does not belong"):
        ParallelState(rank, size)


def test_shard_size() -> None:
    assert ParallelState(1, 4).shard_size(12, "heads") == 3
    with pytest.raises(ValueError, match=r"heads \(10\) cannot be divided by tp_size 4"):
        ParallelState(1, 4).shard_size(10, "heads")
