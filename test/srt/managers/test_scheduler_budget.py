"""A budget that moves while requests run: nobody's tokens change, every request has one end."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sglang.srt.managers.io_struct import ControlReply
from sglang.srt.managers.schedule_batch import MAX_RETRACTIONS
from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.reclaim import minimum_budget
from sglang.srt.mem_cache.segment_backing.static import StaticBacking
from srt.managers.scheduler_harness import Harness, expected_output, make_memory
from srt.mem_cache.memory_driver import PoisonedBacking

PAGE = 4
SEGMENT = 16  # pages
TOKENS = SEGMENT * PAGE  # of a segment
SEGMENTS = 8


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


class Bench:
    """A harness on eight small segments, and budgets counted in segments of every group."""

    def __init__(self, *, groups: int = 1, reserve: int = 0, **options: object) -> None:
        self.backing = PoisonedBacking()
        self.memory: KVMemory = make_memory(
            page_size=PAGE,
            pages_per_segment=SEGMENT,
            segments=SEGMENTS,
            groups=groups,
            reserve=reserve,
            backing=self.backing,
        )
        context = (SEGMENTS - reserve) * TOKENS
        values: dict[str, object] = {"context_length": context, **options}
        self.harness = Harness(self.memory, page_size=PAGE, **values)  # type: ignore[arg-type]
        self.unit = sum(layout.segment_bytes for layout in self.memory.manager.layouts)

    def fill(self, count: int, length: int, max_new: int = 4) -> None:
        for i in range(count):
            self.harness.send(f"r{i}", prompt_of(length, i), max_new=max_new)

    def set_budget(self, segments: int, time_limit_s: float = 30.0) -> ControlReply:
        reply = self.harness.control(
            "set_kv_budget", budget_bytes=segments * self.unit, time_limit_s=time_limit_s
        )
        self.harness.scheduler.drain()
        self.memory.audit()
        return reply

    def served(self, rid: str, length: int, seed: int, max_new: int) -> None:
        assert self.harness.output(rid) == expected_output(prompt_of(length, seed), max_new), rid
        assert self.harness.final(rid).type == "length"


def test_raising_is_at_once_and_the_context_follows() -> None:
    bench = Bench(context_length=SEGMENTS * TOKENS)
    seq = bench.harness.ask("set_kv_budget", budget_bytes=12 * bench.unit)
    bench.harness.turn()
    reply = bench.harness.reply(seq)
    assert reply is not None
    assert reply.success
    assert reply.data == {
        "requested_bytes": 12 * bench.unit,
        "reached_bytes": 12 * bench.unit,
        "mapped_bytes": 0,
        "evicted_tokens": 0,
        "moved_tokens": 0,
        "retracted": 0,
        "aborted": 0,
        "context_length": 12 * TOKENS,
    }
    assert bench.harness.scheduler.context_length == 12 * TOKENS
    state = bench.harness.control("internal_state").data["memory"]
    assert (state["context_length"], state["budget_bytes"]) == (12 * TOKENS, 12 * bench.unit)
    bench.harness.send("long", prompt_of(10 * TOKENS), max_new=4)  # too long before
    bench.harness.run()
    bench.served("long", 10 * TOKENS, 0, 4)


def test_no_context_beyond_the_requested_one() -> None:
    bench = Bench(context_length=100, context_length_requested=100)
    assert bench.set_budget(12).data["context_length"] == 100


@pytest.mark.parametrize("groups", [1, 2])
def test_lowering_evicts_what_nobody_reads(groups: int) -> None:
    bench = Bench(groups=groups)
    bench.fill(6, TOKENS - 8)
    bench.harness.run()
    assert bench.memory.manager.mapped_bytes == 6 * bench.unit
    reply = bench.set_budget(3)
    assert reply.success
    assert reply.data["reached_bytes"] == 3 * bench.unit
    assert reply.data["retracted"] == reply.data["aborted"] == 0
    assert 2 * TOKENS <= reply.data["evicted_tokens"] <= 4 * TOKENS
    assert bench.memory.manager.mapped_bytes <= 3 * bench.unit
    assert bench.memory.cache.num_pages > SEGMENT, "no more is lost than has to be"
    assert bench.harness.scheduler.context_length == 3 * TOKENS


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("segments", [5, 3, 2, 1])
def test_running_requests_keep_their_tokens(groups: int, segments: int, overlap: bool) -> None:
    bench = Bench(groups=groups, overlap=overlap)
    bench.fill(6, TOKENS - 20, max_new=16)
    bench.harness.turn(9)
    assert bench.harness.scheduler.num_running == 6
    reply = bench.set_budget(segments)
    assert reply.success
    assert bench.memory.manager.mapped_bytes <= segments * bench.unit
    assert reply.data["aborted"] == 0
    assert (reply.data["retracted"] > 0) == (segments < 5)
    bench.harness.run()
    for i in range(6):
        bench.served(f"r{i}", TOKENS - 20, i, 16)
    assert bench.memory.manager.mapped_bytes <= segments * bench.unit
    bench.memory.audit()


@pytest.mark.parametrize("overlap", [True, False])
def test_who_can_not_fit_any_more_hears_both_numbers_once(overlap: bool) -> None:
    bench = Bench(overlap=overlap)
    bench.harness.send("running", prompt_of(3 * TOKENS), max_new=50)
    bench.harness.send("small", prompt_of(20, 1), max_new=30)
    bench.harness.turn(8)
    assert bench.harness.scheduler.num_running == 2
    bench.harness.send("waiting", prompt_of(6 * TOKENS, 2), max_new=4)
    bench.harness.turn(1)
    assert bench.harness.scheduler.num_waiting == 1
    reply = bench.set_budget(2)
    assert reply.success
    assert reply.data["aborted"] == 2
    for rid, length in (("running", 3 * TOKENS), ("waiting", 6 * TOKENS)):
        end = bench.harness.final(rid)
        assert (end.type, end.status_code) == ("abort", 503)
        assert f"{2 * TOKENS} tokens" in end.message
        told = len(bench.harness.output(rid))
        assert f"the request has {length + told} tokens" in end.message
    bench.harness.run()
    bench.served("small", 20, 1, 30)
    bench.harness.send("late", prompt_of(2 * TOKENS), max_new=1)
    bench.harness.run()
    assert bench.harness.final("late").status_code == 400


def test_a_request_that_wanted_the_old_context_ends_at_the_new_one() -> None:
    bench = Bench()
    bench.harness.send("greedy", prompt_of(20), max_new=SEGMENTS * TOKENS - 20)
    bench.harness.send("queued", prompt_of(20, 1), max_new=SEGMENTS * TOKENS - 20)
    bench.harness.turn(4)
    assert bench.set_budget(2).success
    bench.harness.run()
    for rid, seed in (("greedy", 0), ("queued", 1)):
        end = bench.harness.final(rid)
        got = bench.harness.output(rid)
        assert (end.type, len(got)) == ("length", 2 * TOKENS - 20)
        assert got == expected_output(prompt_of(20, seed), len(got))


def test_many_cuts_cost_a_request_its_place_but_never_its_life() -> None:
    bench = Bench()
    bench.fill(3, 2 * TOKENS, max_new=60)
    bench.harness.turn(12)
    for _ in range(8):
        bench.set_budget(3)
        bench.harness.turn(2)
        bench.set_budget(SEGMENTS)
        bench.harness.turn(8)
    bench.harness.run()
    for i in range(3):
        bench.served(f"r{i}", 2 * TOKENS, i, 60)
    assert max(bench.harness.retractions(f"r{i}") for i in range(3)) > MAX_RETRACTIONS


def test_cutting_compacts_before_it_retracts() -> None:
    bench = Bench()
    for i in range(4):
        bench.harness.send(f"long{i}", prompt_of(TOKENS // 2 - 4, i), max_new=60)
        bench.harness.send(f"short{i}", prompt_of(TOKENS // 2 - 4, 40 + i), max_new=4)
    bench.harness.turn(12)
    bench.harness.scheduler.drain()
    bench.memory.flush()
    assert bench.harness.scheduler.num_running == 4
    used = bench.memory.allocators[0].index.num_used
    assert used <= 4 * SEGMENT
    reply = bench.set_budget(4)
    assert reply.success
    assert reply.data["retracted"] == 0
    bench.harness.run()
    for i in range(4):
        bench.served(f"long{i}", TOKENS // 2 - 4, i, 60)


def test_refusals_name_the_numbers_and_change_nothing() -> None:
    bench = Bench(reserve=1)
    before = bench.memory.manager.budget_bytes
    context = bench.harness.scheduler.context_length
    assert minimum_budget(bench.memory, 64) == 2 * bench.unit
    reply = bench.harness.control("set_kv_budget", budget_bytes=2 * bench.unit - 1)
    assert not reply.success
    assert reply.data == {"status_code": 400, "minimum_bytes": 2 * bench.unit}
    assert f"{2 * bench.unit - 1} bytes" in reply.message
    assert f"{2 * bench.unit} bytes" in reply.message
    for args in ({}, {"budget_bytes": "1"}, {"budget_bytes": -1}, {"budget_bytes": True}):
        assert bench.harness.control("set_kv_budget", **args).data["status_code"] == 400
    late = bench.harness.control("set_kv_budget", budget_bytes=1 << 30, time_limit_s=-1.0)
    assert late.data["status_code"] == 400
    assert bench.memory.manager.budget_bytes == before
    assert bench.harness.scheduler.context_length == context
    assert bench.harness.control("set_kv_budget", budget_bytes=2 * bench.unit).success


def test_a_static_pool_has_no_budget_that_moves() -> None:
    memory = make_memory(
        page_size=PAGE, pages_per_segment=SEGMENT, segments=4, backing=StaticBacking()
    )
    harness = Harness(memory, page_size=PAGE)
    reply = harness.control("set_kv_budget", budget_bytes=1)
    assert not reply.success
    assert reply.data["status_code"] == 400
    assert f"{memory.manager.mapped_bytes} bytes" in reply.message


def test_the_time_is_over_while_the_machine_refuses_to_take_memory_back() -> None:
    bench = Bench()
    bench.fill(4, TOKENS - 8)
    bench.harness.run()
    bench.backing.failing_unmaps.update(range(1, 1000))
    reply = bench.set_budget(1, time_limit_s=0.05)
    assert not reply.success
    assert reply.data["requested_bytes"] == bench.unit
    assert reply.data["reached_bytes"] == bench.memory.manager.mapped_bytes == 4 * bench.unit
    bench.backing.failing_unmaps.clear()
    again = bench.set_budget(1)
    assert again.success
    assert bench.memory.manager.mapped_bytes <= bench.unit


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_refused_unmap_is_tried_again(failing: int, groups: int) -> None:
    bench = Bench(groups=groups)
    bench.fill(5, TOKENS - 20, max_new=16)
    bench.harness.turn(8)
    bench.backing.failing_unmaps.add(failing)
    assert bench.set_budget(2).success
    assert bench.memory.manager.mapped_bytes <= 2 * bench.unit
    bench.harness.run()
    for i in range(5):
        bench.served(f"r{i}", TOKENS - 20, i, 16)


def test_the_newest_budget_counts() -> None:
    bench = Bench()
    bench.fill(6, TOKENS - 8)
    bench.harness.run()
    bench.backing.failing_unmaps.update(range(1, 1000))
    first = bench.harness.ask("set_kv_budget", budget_bytes=bench.unit)
    bench.harness.turn(3)
    assert bench.harness.reply(first) is None
    busy = bench.harness.control("compact_kv")
    assert busy.data["status_code"] == 409
    assert bench.set_budget(8).success
    told = bench.harness.reply(first)
    assert told is not None
    assert not told.success
    assert told.data["reached_bytes"] > told.data["requested_bytes"] == bench.unit
    assert bench.harness.scheduler.context_length == SEGMENTS * TOKENS


@pytest.mark.parametrize("groups", [1, 2])
def test_compact_kv_packs_and_gives_back(groups: int) -> None:
    bench = Bench(groups=groups)
    bench.fill(8, TOKENS // 2 - 8, max_new=4)
    bench.harness.send("runs", prompt_of(30, 77), max_new=200)
    bench.harness.turn(16)
    bench.harness.settle()
    assert bench.harness.scheduler.num_running == 1
    bench.memory.cache.evict(14)
    before = bench.memory.manager.mapped_bytes
    reply = bench.harness.control("compact_kv")
    assert reply.success
    bench.harness.scheduler.drain()
    bench.memory.audit()
    after = bench.memory.manager.mapped_bytes
    assert reply.data["released_bytes"] == before - after
    assert reply.data["moved_pages"] > 0
    assert reply.data["emptied_segments"] > 0
    assert reply.data["moved_tokens"] == reply.data["moved_pages"] * PAGE
    for allocator in bench.memory.allocators:
        index = allocator.index
        needed = -(-(index.num_used + index.num_cached) // SEGMENT)
        assert index.num_free + index.num_used + index.num_cached == needed * SEGMENT
    bench.harness.run()
    bench.served("runs", 30, 77, 200)


OTHERS = [(1, True), (2, False), (3, True), (3, False), (4, True), (4, False)]


@pytest.mark.parametrize(
    ("seed", "overlap"),
    [(1, False), (2, True), *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)],
)
def test_random_budgets_over_random_requests(seed: int, overlap: bool) -> None:
    """Every request ends exactly once, with a prefix of the right tokens; the pool adds up."""
    rng = random.Random(seed)
    bench = Bench(groups=1 + seed % 2, overlap=overlap)
    harness = bench.harness
    bench.backing.failing_unmaps.update(rng.sample(range(1, 200), 20))
    bench.backing.failing_maps.update(rng.sample(range(1, 200), 20))
    shared, sent, asked = prompt_of(60, 99), {}, []
    for i in range(150):
        prompt = shared[: rng.randrange(60)] + prompt_of(rng.randrange(1, 120), i)
        sent[f"r{i}"] = (prompt, rng.randrange(0, 60))
        harness.send(f"r{i}", *sent[f"r{i}"])
        if rng.random() < 0.2:
            harness.abort(f"r{rng.randrange(i + 1)}")
        if rng.random() < 0.3:
            segments = rng.randrange(1, SEGMENTS + 1)
            asked.append(
                harness.ask("set_kv_budget", budget_bytes=segments * bench.unit, time_limit_s=5)
            )
        if rng.random() < 0.2:
            asked.append(harness.ask("compact_kv"))
        harness.turn(rng.randrange(1, 5))
        if rng.random() < 0.5:
            harness.settle()
        if i % 10 == 0:
            harness.scheduler.drain()
            bench.memory.audit()
    asked.append(harness.ask("set_kv_budget", budget_bytes=SEGMENTS * bench.unit))
    harness.run()
    for _ in range(600):
        if all(harness.reply(seq) is not None for seq in asked):
            break
        harness.turn()
    assert all(harness.reply(seq) is not None for seq in asked)
    for rid, (prompt, count) in sent.items():
        end, got = harness.final(rid), harness.output(rid)
        assert got == expected_output(prompt, len(got)), rid
        assert end.type in ("abort", "length")
        assert end.type == "abort" or len(got) <= count
    bench.memory.audit()
    assert bench.memory.memory_object()["pages"]["used"] == 0
