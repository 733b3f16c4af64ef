"""Tensors in memory that all ranks map; ranks are threads with a mapping each."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sglang.srt.distributed.shared_exchange import SharedExchange, is_served

pytestmark = pytest.mark.skipif(not is_served(), reason="needs Linux on x86")

ROUNDS = 500


def exchanges(path: Path, size: int, timeout_s: float = 60.0, **kw: int) -> list[SharedExchange]:
    return [
        SharedExchange(str(path / "shared"), rank, size, timeout_s, **kw) for rank in range(size)
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_nothing_is_read_before_it_is_written_or_after_it_is_overwritten(
    tmp_path: Path, size: int
) -> None:
    """Ranks run as far apart as they can: each round's numbers tell rank and round."""
    ranks = exchanges(tmp_path, size)

    def run(rank: int) -> None:
        for number in range(ROUNDS):
            count = 1 + number * 37 % 500  # a place is never quite overwritten
            own = torch.full((count,), float(number * size + rank))
            parts = ranks[rank].exchange(own)
            assert parts[rank] is own
            for other, part in enumerate(parts):
                wanted = torch.full((count,), float(number * size + other))
                assert torch.equal(part, wanted), (number, rank, other)

    with ThreadPoolExecutor(size) as threads:
        for done in [threads.submit(run, rank) for rank in range(size)]:
            done.result()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_shapes_and_types_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    ranks = exchanges(tmp_path, 2, place_bytes=4096)
    tensors = [torch.arange(6).reshape(2, 3).to(dtype) + 10 * rank for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        seen = list(threads.map(lambda rank: ranks[rank].exchange(tensors[rank]), range(2)))
    for parts in seen:
        assert all(torch.equal(part, tensor) for part, tensor in zip(parts, tensors, strict=True))


def test_a_rank_that_does_not_come_is_told_in_time(tmp_path: Path) -> None:
    first, _ = exchanges(tmp_path, 2, timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 did not write within 0\.3 s"):
        first.exchange(torch.ones(3))
    assert 0.3 <= time.monotonic() - began < 5
