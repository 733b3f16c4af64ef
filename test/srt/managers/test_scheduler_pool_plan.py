"""From arguments to the pool's numbers: rows, budgets, the clamp."""

from __future__ import annotations

import logging

import pytest

from sglang.srt.managers.scheduler_pool_plan import (
    LowerSpace,
    cap_budget,
    plan_pool,
    prefill_chunk_tokens,
    resolve_budget,
    resolve_disk,
    resolve_host,
    resolve_max_running_requests,
)
from sglang.srt.mem_cache.kv_layout import (
    KVCacheSpec,
    KVGroupSpec,
)
from sglang.srt.mem_cache.segment_cuts import (
    make_segment_layouts,
)
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.disk_space import DiskSpace
from sglang.srt.utils.host_memory import HostMemory
from srt.mem_cache.fake_backing import FakeBacking

GIB = 1 << 30
SMOL = KVCacheSpec((KVGroupSpec(tuple(range(30))),), 3, 64, 64, "bfloat16", 64)
HOST = HostMemory(total_bytes=24 * GIB, available_bytes=20 * GIB, bound_by="MemAvailable")


def args(**kwargs: object) -> ServerArgs:
    return ServerArgs.from_kwargs(model_path="/models/any", **kwargs)


def test_rows_follow_the_capacity() -> None:
    assert resolve_max_running_requests(7, 10**9, 8192) == 7
    assert resolve_max_running_requests(None, 600_000, 8192) == 4096
    assert resolve_max_running_requests(None, 40_000, 8192) == 2500
    assert resolve_max_running_requests(None, 600, 512) == 300
    assert resolve_max_running_requests(None, 1, 512) == 1


def test_the_budget_is_the_fraction_or_the_explicit_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert resolve_budget(args(), 10 * GIB) == int(0.7 * 10 * GIB)
    assert resolve_budget(args(kv_memory_budget="2GiB"), 10 * GIB) == 2 * GIB
    assert not caplog.records
    assert resolve_budget(args(kv_memory_budget="20GiB"), 10 * GIB) == 20 * GIB
    assert "more than" in caplog.text


def test_a_token_cap_cuts_the_budget_to_whole_segments(caplog: pytest.LogCaptureFixture) -> None:
    layouts = make_segment_layouts(
        SMOL,
        slots_per_segment=None,
        auto_segment_bytes=32 << 20,
        auto_min_slots=1,
        granule_bytes=4096,
        machine_bytes=24 * GIB,
        budget_bytes=GIB,
    )
    assert layouts[0].slots_per_segment == 1024
    segment = layouts[0].segment_bytes
    assert segment == 1024 * 23040
    assert cap_budget(GIB, None, layouts) == GIB
    assert cap_budget(GIB, 1025, layouts) == 2 * segment
    assert not caplog.records
    assert cap_budget(GIB, 10**7, layouts) == GIB
    assert "the budget stands" in caplog.text


def test_chunks() -> None:
    assert prefill_chunk_tokens(args()) == 2048
    assert prefill_chunk_tokens(args(chunked_prefill_size=512)) == 512
    assert prefill_chunk_tokens(args(chunked_prefill_size=-1)) == 16384
    assert prefill_chunk_tokens(args(chunked_prefill_size=4096, max_prefill_tokens=1000)) == 1000


def test_ten_million_tokens_are_clamped_to_what_fits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plan = plan_pool(args(kv_memory_budget="1GiB"), SMOL, FakeBacking(), HOST, 10_000_000)
    held = GIB // (1024 * 23040) * 1024
    assert plan.clamp.effective == plan.clamp.capacity_tokens == held
    assert "10,000,000" in plan.clamp.explanation
    assert f"{held:,}" in plan.clamp.explanation
    assert "segments of 1024 tokens" in caplog.text


def test_a_budget_below_one_segment_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ValueError, match=r"cannot hold one request.*budget of 1,048,576 bytes"):
        plan_pool(args(kv_memory_budget="1MiB"), SMOL, FakeBacking(), HOST, 8192)


def test_the_disk_is_half_of_what_is_free_or_the_explicit_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    space = DiskSpace(10 * GIB, "ext4")
    assert resolve_disk(args(), None) == 0
    assert resolve_disk(args(kv_disk_path="/disk"), space) == 5 * GIB
    assert resolve_disk(args(kv_disk_path="/disk", kv_disk_size="7GiB"), space) == 7 * GIB
    assert not caplog.records
    assert resolve_disk(args(kv_disk_path="/disk", kv_disk_size="1TiB"), space) == 10 * GIB
    assert "are free at /disk; these count" in caplog.text
    caplog.clear()
    assert resolve_disk(args(kv_disk_path="/disk"), DiskSpace(GIB, "tmpfs")) == GIB // 2
    assert "is a file system in memory (tmpfs)" in caplog.text


def test_a_context_reaches_as_far_as_memory_and_disk_together() -> None:
    wanted = args(kv_memory_budget="1GiB", kv_disk_path="/disk", kv_disk_size="3GiB")
    disk = DiskSpace(100 * GIB, "xfs")
    plan = plan_pool(wanted, SMOL, FakeBacking(), HOST, 10_000_000, below=LowerSpace(disk))
    assert (plan.budget_bytes, plan.lower_bytes) == (GIB, 3 * GIB)
    segment = 1024 * 23040  # lies on one of the two
    assert plan.clamp.effective == (GIB // segment + 3 * GIB // segment) * 1024
    assert "3,221,225,472 bytes on disk" in plan.clamp.explanation


def test_the_host_tier_is_a_multiple_of_the_budget_or_a_size(
    caplog: pytest.LogCaptureFixture,
) -> None:
    on = {"enable_hierarchical_cache": True, "device": "cuda"}
    assert resolve_host(args(), GIB, None) == 0
    assert resolve_host(args(**on), GIB, 100 * GIB) == 2 * GIB
    assert resolve_host(args(**on, hicache_ratio=0.5), GIB, 100 * GIB) == GIB // 2
    assert resolve_host(args(**on, hicache_size=3), GIB, 100 * GIB) == 3 * 10**9
    assert not caplog.records
    assert resolve_host(args(**on, hicache_size=300), GIB, 100 * GIB) == 100 * GIB
    assert "that the host has left for it; these count" in caplog.text


def test_a_context_reaches_as_far_as_the_device_and_its_host_together() -> None:
    on = {"enable_hierarchical_cache": True, "device": "cuda"}
    below = LowerSpace(host_bytes=100 * GIB)
    wanted = args(kv_memory_budget="1GiB", **on)
    plan = plan_pool(wanted, SMOL, FakeBacking(), HOST, 10_000_000, below=below)
    assert (plan.budget_bytes, plan.lower_bytes) == (GIB, 2 * GIB)
    held = 3 * GIB // (1024 * 23040) - 1  # on a GPU one empty segment stays mapped
    assert plan.clamp.effective == held * 1024
    assert "2,147,483,648 bytes in host memory" in plan.clamp.explanation


def test_a_token_cap_cuts_the_disk_first() -> None:
    segment = 1024 * 23040
    disk = DiskSpace(100 * GIB, "xfs")
    for cap, budget in ((100 * 1024, GIB), (10 * 1024, 10 * segment)):
        wanted = args(kv_memory_budget="1GiB", kv_disk_path="/d", max_total_tokens=cap)
        plan = plan_pool(wanted, SMOL, FakeBacking(), HOST, 8192, below=LowerSpace(disk))
        assert plan.budget_bytes == budget
        assert plan.lower_bytes % segment == 0
        assert plan.budget_bytes // segment + plan.lower_bytes // segment == cap // 1024
