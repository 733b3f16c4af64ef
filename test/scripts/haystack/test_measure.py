"""Figures of cells, the quadratic fit, the table; the bare loop against the circuit's promise."""

from __future__ import annotations

import dataclasses
import os

import pytest

from haystack.bare_loop import BareLoop
from haystack.circuit import Shape, build_weights
from haystack.machine import MemoryPeak, read_bandwidth, watched_memory
from haystack.measure import Cell, KVCost, predict_quadratic
from haystack.report import markdown_table
from haystack.tasks import circuit_task

CELL = Cell(
    length=1000,
    depth=50.0,
    prompt_tokens=998,
    needle_at=499,
    expected=(7, 8, 9, 10),
    got=(7, 8, 9, 10),
    ttft_s=2.0,
    cached_tokens=0,
    decode_tokens_per_s=30.0,
    read_bandwidth_bytes_per_s=None,
    decode_bound_tokens_per_s=40.0,
    second_ttft_s=0.1,
    second_cached_tokens=960,
    second_exact=True,
    mapped_bytes=1 << 30,
    kv_bytes=1 << 29,
    dense_kv_bytes=1 << 30,
    dense_table_bytes=1 << 33,
    peak=MemoryPeak(rss=2 << 30),
    clients=[],
)


def cell_of(length: int, seconds: float, cached: int = 0) -> Cell:
    return dataclasses.replace(CELL, length=length, ttft_s=seconds, cached_tokens=cached)


def test_a_cell_counts_right_tokens_in_their_places() -> None:
    assert CELL.exact
    assert CELL.score == 1.0
    found = dataclasses.replace(CELL, got=(7, 9, 8, 10))
    assert not found.exact
    assert found.score == 0.5
    assert found.as_dict()["decode_share_of_bound"] == 0.75
    assert dataclasses.replace(CELL, cached_tokens=898).prefill_tokens_per_s == 50
    assert "**no** (50%)" in markdown_table([found])
    assert "| 998 | 50 % | yes | 2.00 | 499 | 30.0 | 75% | 0.10 | 1.00 |" in markdown_table([CELL])


def test_the_quadratic_is_fitted_to_the_shorter_full_prefills() -> None:
    def seconds(n: int) -> float:
        return 0.5 + 1e-4 * n + 1e-8 * n * n

    cells = [cell_of(n, seconds(n)) for n in (1000, 2000, 4000, 8000)]
    cells.append(cell_of(8000, 0.01, cached=7000))  # no full prefill: does not count
    cells.append(cell_of(64_000, 2 * seconds(64_000)))
    found = predict_quadratic(cells, [64_000]).as_dict()
    assert found["predicted"]["64000"]["ratio"] == pytest.approx(2.0)
    assert found["seconds_of_n"]["n^2"] == pytest.approx(1e-8)
    with pytest.raises(ValueError, match="three lengths"):
        predict_quadratic(cells, [4000])


def test_bytes_per_token_come_from_the_groups() -> None:
    groups = [
        {"kind": "full", "bytes_per_token": 512},
        {"kind": "chunked", "bytes_per_token": 1536},
    ]
    assert KVCost.of({"memory": {"groups": groups}}) == KVCost(growing=512, dense=2048)


@pytest.mark.parametrize("length", [900, 5000])
def test_the_bare_loop_finds_the_needle(length: int) -> None:
    shape = Shape()
    loop = BareLoop(build_weights(shape), shape, step=2048)
    for prompt in circuit_task(shape, (0, 60, 100), 4, seed=2).prompts(length):
        found = loop.prefill(prompt.ids)
        assert found.first_token == prompt.answer[0]
        assert found.num_tokens == length
    with pytest.raises(ValueError, match="multiple"):
        BareLoop(build_weights(shape), shape, step=1000)


def test_memory_of_processes_is_watched() -> None:

    with watched_memory(os.getpid(), every_s=0.01) as peak:
        held = bytearray(64 << 20)
    assert peak.rss is not None
    assert peak.pss is not None
    assert peak.rss > len(held)
    assert 0 < peak.pss <= peak.rss
    with watched_memory(None) as nothing:
        pass
    assert nothing == MemoryPeak()


def test_a_bandwidth_is_some_bytes_per_second() -> None:
    assert read_bandwidth(8 << 20) > 1e8
