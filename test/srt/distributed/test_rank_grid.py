"""Which rank has which part, and who talks to whom."""

from __future__ import annotations

import pytest
import torch

from sglang.srt.distributed.rank_grid import RankGrid
from sglang.srt.mem_cache.kv_layout import ONE_KV_RANK, KVRanks
from srt.distributed.thread_ranks import ThreadRanks


def test_alone_and_without_kv_parts_nothing_is_split() -> None:
    alone = RankGrid.of(None, 1)
    assert (alone.parallel.tp_size, alone.kv_ranks, alone.kv_group) == (1, ONE_KV_RANK, None)
    ranks = ThreadRanks(2)
    links = ranks.links(1)
    grid = RankGrid.of(links, 1)
    assert grid.parallel.group is links.compute
    assert (grid.parallel.tp_rank, grid.parallel.tp_size) == (1, 2)
    assert (grid.kv_ranks, grid.kv_group) == (ONE_KV_RANK, None)
    ranks.close()


def test_rows_sum_and_columns_merge() -> None:
    ranks = ThreadRanks(6)

    def act(rank: int) -> tuple[float, list[float]]:
        grid = RankGrid.of(ranks.links(rank), 3)
        assert (grid.parallel.tp_rank, grid.parallel.tp_size) == (rank % 2, 2)
        assert grid.kv_ranks == KVRanks(rank // 2, 3)
        assert grid.kv_group is not None
        total = grid.parallel.all_reduce(torch.tensor([10.0**rank]))
        return float(total), grid.kv_group.all_gather(torch.tensor([float(rank)]), 0).tolist()

    assert ranks.run(act) == [
        (11.0, [0.0, 2.0, 4.0]),
        (11.0, [1.0, 3.0, 5.0]),
        (1100.0, [0.0, 2.0, 4.0]),
        (1100.0, [1.0, 3.0, 5.0]),
        (110000.0, [0.0, 2.0, 4.0]),
        (110000.0, [1.0, 3.0, 5.0]),
    ]
    ranks.close()


def test_one_tensor_part_sends_no_sums() -> None:
    ranks = ThreadRanks(2)
    grid = RankGrid.of(ranks.links(0), 2)
    assert (grid.parallel.tp_size, grid.parallel.group) == (1, None)
    ranks.close()


def test_ranks_that_can_not_be_divided_are_refused() -> None:
    ranks = ThreadRanks(3)
    with pytest.raises(ValueError, match="3 ranks are no multiple of 2"):
        RankGrid.of(ranks.links(0), 2)
    ranks.close()
