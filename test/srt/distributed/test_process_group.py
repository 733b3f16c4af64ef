"""The collectives over real gloo groups: two ranks as threads, each with sockets of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from sglang.srt.distributed.communicator import RankLinks
from sglang.srt.distributed.process_group import (
    FRAME_BYTES,
    GLOO_DIRECT_BYTES,
    Connections,
    compute_backend,
    connect_ranks,
)
from sglang.srt.errors import RankLostError
from sglang.srt.utils.rendezvous import RankBoard, RankPlace, Rendezvous

T = TypeVar("T")
PATIENT_S, HASTY_S = 60.0, 0.7


def links_of(connections: Connections) -> RankLinks:
    assert connections.links is not None
    return connections.links


def connect(
    tmp_path: Path, timeout_s: float, size: int = 2, shared_memory: bool = True
) -> list[RankLinks]:
    places = Rendezvous.for_ranks(size, str(tmp_path))
    with ThreadPoolExecutor(size) as threads:
        runs = [
            threads.submit(
                connect_ranks,
                place,
                RankPlace(rank, size),
                timeout_s,
                shared_memory=shared_memory,
            )
            for rank, place in enumerate(places)
        ]
        return [links_of(run.result()) for run in runs]


def connect_in_haste(tmp_path: Path) -> tuple[list[RankLinks], float]:
    """Ranks with the shortest timeout in which this machine, at this moment, connects them."""
    timeout_s = HASTY_S
    while True:
        folder = tmp_path / f"{timeout_s:g}"
        folder.mkdir()
        try:
            return connect(folder, timeout_s), timeout_s
        except RankLostError:
            assert timeout_s < PATIENT_S
            timeout_s *= 4


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "sockets"])
def links(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[RankLinks]:
    folder = tmp_path_factory.mktemp("ranks")
    return connect(folder, PATIENT_S, shared_memory=request.param)


def on_both(links: list[RankLinks], act: Callable[[RankLinks], T]) -> list[T]:
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(act, links))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_have_the_same_bits_everywhere(links: list[RankLinks], dtype: torch.dtype) -> None:
    parts = [torch.randn(3, 64, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    sums = on_both(
        links, lambda link: link.compute.all_reduce(parts[link.rank].to(dtype, copy=True))
    )
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], parts[0].to(dtype) + parts[1].to(dtype))


def test_large_tensors_go_in_rings(links: list[RankLinks]) -> None:
    count = GLOO_DIRECT_BYTES // 4 + 1
    parts = [torch.arange(float(count)), torch.ones(count)]
    sums = on_both(links, lambda link: link.compute.all_reduce(parts[link.rank].clone()))
    assert torch.equal(sums[0], torch.arange(float(count)) + 1)
    assert torch.equal(sums[0], sums[1])
    whole = on_both(links, lambda link: link.compute.all_gather(parts[link.rank], 0))
    assert torch.equal(whole[0], torch.cat(parts))
    assert torch.equal(whole[0], whole[1])


def test_16_bit_sums_of_three_ranks_are_rounded_once(tmp_path: Path) -> None:
    links = connect(tmp_path, PATIENT_S, 3)
    numbers = [1.0, 2.0**-8, 2.0**-8]  # the second alone is lost beside the first
    with ThreadPoolExecutor(3) as threads:
        sums = threads.map(
            lambda link: link.compute.all_reduce(torch.tensor([numbers[link.rank]]).bfloat16()),
            links,
        )
        assert [float(one) for one in sums] == [1 + 2.0**-7] * 3


def test_a_view_is_summed_without_its_neighbours(links: list[RankLinks]) -> None:
    tables = [torch.full((4, 6), 1.0 + rank) for rank in range(2)]
    sums = on_both(links, lambda link: link.compute.all_reduce(tables[link.rank][:, 1:3]))
    assert torch.equal(sums[0], torch.full((4, 2), 3.0))
    assert torch.equal(tables[0], torch.full((4, 6), 1.0))


@pytest.mark.parametrize("dim", [0, -1])
def test_parts_are_gathered_in_the_order_of_ranks(links: list[RankLinks], dim: int) -> None:
    parts = [torch.arange(6.0).reshape(2, 3) + 10 * rank for rank in range(2)]
    whole = on_both(links, lambda link: link.compute.all_gather(parts[link.rank], dim))
    assert torch.equal(whole[0], torch.cat(parts, dim))
    assert torch.equal(whole[1], whole[0])


def test_nothing_is_sent_for_tensors_without_entries(links: list[RankLinks]) -> None:
    assert links[0].compute.all_gather(torch.empty(0, 5), -1).shape == (0, 10)
    assert links[1].compute.all_reduce(torch.empty(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("size", [0, 1, FRAME_BYTES - 8, FRAME_BYTES - 7, 100_000])
def test_broadcasts_of_any_length(links: list[RankLinks], size: int) -> None:
    data = bytes(i * 7 % 251 for i in range(size))
    heard = on_both(links, lambda link: link.control.broadcast(None if link.rank else data))
    assert [bytes(one) for one in heard] == [data, data]


def test_agreement_is_the_minimum(links: list[RankLinks]) -> None:
    votes = [[3, -5, 1 << 60], [2, 4, 1 << 61]]
    agreed = on_both(links, lambda link: link.control.agree(votes[link.rank]))
    assert agreed == [[2, -5, 1 << 60]] * 2
    assert on_both(links, lambda link: link.control.agree([])) == [[], []]


def test_the_groups_of_two_threads_do_not_meet(links: list[RankLinks]) -> None:
    """One rank's two threads call in an order that the other rank's threads do not share."""
    second = threading.Event()

    def act(link: RankLinks) -> list[int]:
        def compute() -> float:
            if link.rank == 0:
                second.wait(PATIENT_S)  # its control call is through before this one begins
            return float(link.compute.all_reduce(torch.ones(1)))

        with ThreadPoolExecutor(1) as worker:
            run = worker.submit(compute)
            agreed = link.control.agree([link.rank])
            if link.rank == 0:
                second.set()
            return [*agreed, int(run.result())]

    assert on_both(links, act) == [[0, 2], [0, 2]]


def test_some_ranks_of_a_group_talk_among_themselves(tmp_path: Path) -> None:
    links = connect(tmp_path, PATIENT_S, 4)
    parts = [torch.arange(3.0) + 10 * rank for rank in range(4)]
    large = torch.ones(GLOO_DIRECT_BYTES // 2)

    def act(link: RankLinks) -> list[torch.Tensor]:
        rank = link.rank
        row = link.compute.among((rank // 2 * 2, rank // 2 * 2 + 1))
        column = link.compute.among((rank % 2, rank % 2 + 2))
        assert (row.rank, row.size) == (rank % 2, 2)
        assert (column.rank, column.size) == (rank // 2, 2)
        assert row.all_reduce(torch.empty(0, 5)).shape == (0, 5)
        assert row.all_gather(torch.empty(0, 5), -1).shape == (0, 10)
        return [
            row.all_reduce(parts[rank].clone()),
            column.all_gather(parts[rank], 0),
            row.all_reduce(large * rank),
        ]

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(act, links))
    for rank, (total, gathered, many) in enumerate(results):
        first = rank // 2 * 2
        assert torch.equal(total, parts[first] + parts[first + 1])
        assert torch.equal(gathered, torch.cat([parts[rank % 2], parts[rank % 2 + 2]]))
        assert torch.equal(many, large * (2 * first + 1))


def test_a_rank_that_does_not_come_is_named_in_time(tmp_path: Path) -> None:
    hasty, timeout_s = connect_in_haste(tmp_path)
    began = time.monotonic()
    with pytest.raises(RankLostError, match=r"rank 1 has not come to agreement 1 of the control"):
        hasty[0].control.agree([1])
    assert timeout_s <= time.monotonic() - began < timeout_s + PATIENT_S


def test_ranks_that_never_connect_are_reported(tmp_path: Path) -> None:
    places = Rendezvous.for_ranks(2, str(tmp_path))
    with pytest.raises(RankLostError, match="rank 0 found not all of 2 ranks"):
        connect_ranks(places[0], RankPlace(0, 2), HASTY_S)


def test_the_board_tells_who_is_behind(tmp_path: Path) -> None:
    path = str(tmp_path / "board")
    RankBoard.create(path, 3)
    boards = [RankBoard(path, 3) for _ in range(3)]
    assert [boards[r].begin(r, 0) for r in (0, 0, 1)] == [1, 2, 1]
    assert boards[2].begin(2, 1) == 1
    assert list(boards[0].missing(0, 2, range(3))[0]) == [1, 2]
    assert list(boards[1].missing(0, 1, range(3))[0]) == [2]
    assert list(boards[2].missing(1, 1, range(2))[0]) == [0, 1]


def test_the_device_decides_what_carries_its_tensors() -> None:
    assert compute_backend("cpu") == "gloo"
    assert compute_backend("cuda:1") == "nccl"  # unverified beyond this choice: no GPU here
    with pytest.raises(ValueError, match="tensors of --device mps"):
        compute_backend("mps")
