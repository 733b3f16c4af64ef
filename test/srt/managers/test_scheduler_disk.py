"""The scheduler over memory and disk: every answer is right, whatever lies where and moves when."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from gpu_check.host_driver import HostDriver, host_bytes
from sglang.srt.mem_cache.segment_backing.cuda_vmm_host import CudaVmmHostBacking
from sglang.srt.mem_cache.segment_backing.disk_file import DiskFile
from sglang.srt.mem_cache.segment_backing.mmap_disk import MmapDiskBacking
from srt.crossed import mostly_slow
from srt.managers.scheduler_harness import Harness, expected_output, make_memory
from srt.mem_cache.disk_backing import DiskBacking

PAGE = 4


def prompt_of(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(997) for _ in range(length)]


@pytest.mark.skipif(sys.platform != "linux", reason="the mmap backing needs Linux")
@pytest.mark.parametrize("overlap", [True, False])
def test_prompts_larger_than_memory_get_their_tokens(tmp_path: Path, overlap: bool) -> None:
    """Real moves while forwards run: segments of 1,024 tokens, four in memory, 40 on disk."""
    memory = make_memory(
        page_size=PAGE,
        pages_per_segment=256,
        segments=4,
        disk_segments=40,
        backing=MmapDiskBacking(DiskFile(tmp_path)),
        chunk_tokens=256,
    )
    harness = Harness(
        memory, page_size=PAGE, context_length=40_000, chunk_tokens=256, overlap=overlap
    )
    prompts = {f"r{i}": prompt_of(600 + 700 * i, i) for i in range(8)}
    prompts["long"] = prompt_of(9000, 99)  # more than twice what memory holds
    for rid, prompt in prompts.items():
        harness.send(rid, prompt, 20)
    harness.run()
    for rid, prompt in prompts.items():
        assert harness.output(rid) == expected_output(prompt, 20), rid
        assert harness.final(rid).type == "length"
    manager = memory.manager
    assert manager.mapped_bytes <= manager.budget_bytes
    assert manager.stats()[0].demote_count > 10
    harness.send("again", [*prompts["long"], 5], 20)  # its prefix lies on disk by now
    harness.run()
    assert harness.output("again") == expected_output([*prompts["long"], 5], 20)
    harness.scheduler.drain()
    memory.audit()
    memory.close_pool()


@pytest.mark.skipif(sys.platform != "linux", reason="handles are Linux's files in memory")
@pytest.mark.parametrize("overlap", [True, False])
def test_prompts_larger_than_a_device_lie_on_its_host(overlap: bool) -> None:
    """The GPU's backing with its host tier, over a driver whose device is this machine's memory."""
    backing = CudaVmmHostBacking(
        HostDriver(), margin_bytes=0, host_margin_bytes=0, make_tensor=host_bytes
    )
    memory = make_memory(
        page_size=PAGE,
        pages_per_segment=256,
        segments=4,
        disk_segments=40,
        backing=backing,
        chunk_tokens=256,
    )
    harness = Harness(
        memory, page_size=PAGE, context_length=40_000, chunk_tokens=256, overlap=overlap
    )
    prompts = {f"r{i}": prompt_of(600 + 700 * i, i) for i in range(6)}
    prompts["long"] = prompt_of(9000, 99)  # more than twice what the device holds
    for rid, prompt in prompts.items():
        harness.send(rid, prompt, 20)
    harness.run()
    for rid, prompt in prompts.items():
        assert harness.output(rid) == expected_output(prompt, 20), rid
    manager = memory.manager
    assert manager.mapped_bytes <= manager.budget_bytes
    assert manager.lower_bytes == backing.lower_bytes() > 0
    assert manager.stats()[0].demote_count > 10
    harness.scheduler.drain()
    memory.flush()
    harness.send("again", prompts["r5"], 60)
    harness.send("other", prompt_of(1500, 7), 2)
    harness.run()
    assert harness.output("again") == expected_output(prompts["r5"], 60)
    harness.settle()
    memory.audit()
    memory.close_pool()


@pytest.mark.parametrize("seed", mostly_slow([1, 4], [2, 3]))
def test_random_budgets_and_refusals_over_random_requests(seed: int) -> None:
    """Every request ends exactly once, with a prefix of the right tokens; the pool adds up."""
    rng = random.Random(seed)
    backing = DiskBacking()
    segments = 6
    memory = make_memory(
        page_size=PAGE,
        pages_per_segment=4,
        segments=segments,
        disk_segments=5,
        groups=1 + seed % 2,
        backing=backing,
    )
    harness = Harness(memory, page_size=PAGE, context_length=140, overlap=seed > 2)
    unit = sum(layout.segment_bytes for layout in memory.manager.layouts)
    backing.failing_disk.update(rng.sample(range(1, 200), 30))
    backing.failing_maps.update(rng.sample(range(1, 200), 20))
    backing.failing_unmaps.update(rng.sample(range(1, 200), 20))
    shared, sent = prompt_of(40, 99), {}
    for i in range(100):
        prompt = shared[: rng.randrange(40)] + prompt_of(rng.randrange(1, 60), i)
        sent[f"r{i}"] = (prompt, rng.randrange(0, 40))
        harness.send(f"r{i}", *sent[f"r{i}"])
        if rng.random() < 0.2:
            harness.abort(f"r{rng.randrange(i + 1)}")
        if rng.random() < 0.3:
            budget = rng.randrange(1, segments + 1) * unit
            harness.ask("set_kv_budget", budget_bytes=budget, time_limit_s=5)
        harness.turn(rng.randrange(1, 5))
        if rng.random() < 0.5:
            harness.settle()
        if i % 10 == 0:
            harness.scheduler.drain()
            memory.audit()
    harness.ask("set_kv_budget", budget_bytes=segments * unit)
    harness.run()
    for rid, (prompt, count) in sent.items():
        end, got = harness.final(rid), harness.output(rid)
        assert got == expected_output(prompt, len(got)), rid
        assert end.type in ("abort", "length")
        assert end.type == "abort" or len(got) <= count
    harness.scheduler.drain()
    memory.audit()
    assert memory.memory_object()["pages"]["used"] == 0
    assert backing.num_demoted >= 5
