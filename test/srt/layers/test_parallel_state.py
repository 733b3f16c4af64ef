from __future__ import annotations

import pytest
import torch

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.errors import InvariantError
from srt.distributed.thread_ranks import ThreadRanks


def test_one_rank_communicates_with_nobody() -> None:
    state = ParallelState()
    tensor = torch.arange(3)
    assert state.all_reduce(tensor) is tensor
    assert state.all_gather(tensor, 0) is tensor


def test_a_part_without_a_group_can_be_built_but_not_computed() -> None:
    state = ParallelState(1, 2)
    with pytest.raises(InvariantError, match="rank 1 of 2 was given no communicator"):
        state.all_reduce(torch.zeros(1))
    with pytest.raises(InvariantError, match="no communicator"):
        state.all_gather(torch.zeros(1))


def test_collectives_go_to_the_group() -> None:
    ranks = ThreadRanks(2)

    def act(rank: int) -> tuple[list[float], list[float]]:
        state = ParallelState(rank, 2, ranks.links(rank).compute)
        own = torch.tensor([1.0 + rank])
        return state.all_gather(own, 0).tolist(), state.all_reduce(own).tolist()

    assert ranks.run(act) == [([1.0, 2.0], [3.0])] * 2
    ranks.close()


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 1), (0, 0)])
def test_a_rank_outside_its_group_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="does not belong"):
        ParallelState(rank, size)


def test_another_ranks_group_is_refused() -> None:
    with pytest.raises(ValueError, match="is not the group of 0 of 2"):
        ParallelState(0, 2, ThreadRanks(2).links(1).compute)


def test_shard_size() -> None:
    assert ParallelState(1, 4).shard_size(12, "heads") == 3
    with pytest.raises(ValueError, match=r"heads \(10\) cannot be divided by tp_size 4"):
        ParallelState(1, 4).shard_size(10, "heads")
