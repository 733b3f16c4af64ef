"""Priorities in a running scheduler: order, places taken over, a full queue; no token changes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from sglang.srt.managers.priority_policy import PriorityRules
from sglang.srt.managers.schedule_batch import MAX_RETRACTIONS, ReqState
from sglang.srt.mem_cache.kv_layout import GroupKind
from srt.managers.scheduler_harness import Harness, expected_output, make_memory
from srt.mem_cache.memory_driver import FULL, Window

PAGE = 4
SEGMENT = 16  # pages
SEGMENTS = 8
CAPACITY = SEGMENTS * SEGMENT * PAGE  # tokens
SLIDING: tuple[Window, ...] = (FULL, (GroupKind.SLIDING, 10))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


def bench(
    rules: PriorityRules | None = None, *, windows: Sequence[Window] = (), **limits: object
) -> Harness:
    memory = make_memory(
        page_size=PAGE, pages_per_segment=SEGMENT, segments=SEGMENTS, windows=windows
    )
    return Harness(memory, page_size=PAGE, priorities=rules or PriorityRules(), **limits)


def order_of_ends(harness: Harness) -> list[str]:
    return [out.rid for out in harness.channel.outs if out.finish_reason is not None]


def running(harness: Harness) -> list[str]:
    return [req.rid for req in harness.scheduler.requests() if req.kv is not None]


class TestOrder:
    @pytest.mark.parametrize("policy", ["fcfs", "lpm"])
    @pytest.mark.parametrize(
        ("rules", "order"),
        [
            (PriorityRules(threshold=None), ["b", "d", "a", "e", "c", "f"]),
            (PriorityRules(low_first=True, threshold=None), ["c", "a", "e", "b", "d", "f"]),
            (PriorityRules(default=3, threshold=None), ["b", "d", "f", "a", "e", "c"]),
            (None, ["a", "b", "c", "d", "e", "f"]),
        ],
    )
    def test_one_at_a_time(
        self, rules: PriorityRules | None, order: list[str], policy: str
    ) -> None:
        memory = make_memory(page_size=PAGE)
        harness = Harness(
            memory, page_size=PAGE, max_running_requests=1, policy=policy, priorities=rules
        )
        for i, (rid, priority) in enumerate(zip("abcdef", (1, 4, -2, 4, 1, None), strict=True)):
            harness.send(rid, prompt_of(20, i), max_new=3, priority=priority)
        harness.run()
        assert order_of_ends(harness) == order

    def test_nobody_less_urgent_overtakes_one_that_does_not_fit(self) -> None:
        harness = bench(PriorityRules(threshold=None))
        harness.send("runs", prompt_of(CAPACITY // 2), max_new=8, priority=0)
        harness.turn(2)
        harness.send("small", prompt_of(8, 1), max_new=2, priority=1)
        harness.send("large", prompt_of(CAPACITY * 3 // 4, 2), max_new=2, priority=2)
        harness.turn()
        assert running(harness) == ["runs"]
        while "runs" in running(harness):
            assert harness.scheduler.num_waiting == 2, "small would fit"
            harness.turn()
        harness.run()
        firsts = list(dict.fromkeys(out.rid for out in harness.channel.outs))
        assert firsts == ["runs", "small", "large"], "then both, and the short prompt is done first"


@pytest.mark.parametrize("overlap", [True, False])
class TestPreemption:
    def test_a_slot_is_taken_from_who_loses_least(self, overlap: bool) -> None:
        harness = bench(max_running_requests=2, overlap=overlap)
        harness.send("long", prompt_of(60, 1), max_new=20, priority=0)
        harness.send("short", prompt_of(20, 2), max_new=20, priority=0)
        harness.turn(4)
        harness.send("urgent", prompt_of(30, 3), max_new=5, priority=10)
        harness.turn()
        assert running(harness) == ["long", "urgent"]
        assert harness.scheduler.requests()[1].state is ReqState.RETRACTED
        if not overlap:  # a forward may be under way otherwise
            harness.memory.audit()
        harness.run()
        for rid, length, seed, new in (
            ("long", 60, 1, 20),
            ("short", 20, 2, 20),
            ("urgent", 30, 3, 5),
        ):
            assert harness.output(rid) == expected_output(prompt_of(length, seed), new)
            assert harness.final(rid).type == "length"
        assert order_of_ends(harness)[0] == "urgent"
        assert [harness.retractions(rid) for rid in ("long", "short", "urgent")] == [0, 1, 0]
        counters = harness.scheduler.counters
        assert (counters.num_preemptions, counters.num_retractions) == (1, 1)
        harness.memory.audit()

    @pytest.mark.parametrize(("priority", "taken"), [(9, 0), (10, 1)])
    def test_the_threshold(self, overlap: bool, priority: int, taken: int) -> None:
        harness = bench(max_running_requests=1, overlap=overlap)
        harness.send("low", prompt_of(20, 1), max_new=20, priority=0)
        harness.turn(3)
        harness.send("high", prompt_of(20, 2), max_new=4, priority=priority)
        harness.run()
        assert harness.retractions("low") == taken
        assert order_of_ends(harness) == (["high", "low"] if taken else ["low", "high"])
        assert harness.output("low") == expected_output(prompt_of(20, 1), 20)

    @pytest.mark.parametrize("windows", [(), SLIDING])
    def test_memory_is_taken_and_no_more_than_it_needs(
        self, windows: Sequence[Window], overlap: bool
    ) -> None:
        harness = bench(windows=windows, overlap=overlap)
        capacity = harness.memory.capacity_tokens
        length = capacity // 5
        for i in range(3):
            harness.send(f"low{i}", prompt_of(length - 8 * i, i), max_new=40, priority=0)
        harness.turn(12)
        assert len(running(harness)) == 3
        harness.send("high", prompt_of(capacity // 2, 9), max_new=4, priority=50)
        harness.turn()
        assert "high" in running(harness)
        num_taken = harness.scheduler.counters.num_preemptions
        assert 1 <= num_taken < 3
        harness.run()
        for i in range(3):
            expected = expected_output(prompt_of(length - 8 * i, i), 40)
            assert harness.output(f"low{i}") == expected
            assert harness.final(f"low{i}").type == "length"
        assert order_of_ends(harness)[0] == "high"
        assert harness.scheduler.counters.num_preemptions == num_taken
        harness.memory.audit()

    def test_nobody_goes_when_even_all_would_not_make_room(self, overlap: bool) -> None:
        harness = bench(overlap=overlap)
        harness.send("kept", prompt_of(CAPACITY // 2, 1), max_new=40, priority=45)
        harness.send("low", prompt_of(CAPACITY // 8, 2), max_new=40, priority=0)
        harness.turn(10)
        assert running(harness) == ["kept", "low"]
        harness.send("high", prompt_of(CAPACITY * 3 // 4, 3), max_new=4, priority=50)
        harness.turn(5)
        assert running(harness) == ["kept", "low"]
        harness.run()
        assert harness.scheduler.counters.num_retractions == 0
        assert harness.output("high") == expected_output(prompt_of(CAPACITY * 3 // 4, 3), 4)

    def test_a_prefix_that_both_stand_on_is_not_counted_as_room(self, overlap: bool) -> None:
        harness = bench(overlap=overlap)
        shared = prompt_of(CAPACITY // 2, 1)
        harness.send("kept", [*shared, 1], max_new=30, priority=45)
        harness.turn(12)
        harness.send("low", [*shared, 2], max_new=8, priority=0)
        harness.turn(2)
        assert running(harness) == ["kept", "low"]
        harness.send("high", prompt_of(CAPACITY * 5 // 8, 3), max_new=4, priority=50)
        harness.turn(3)
        assert running(harness) == ["kept", "low"], "what low would free is hardly a page"
        harness.run()
        assert harness.scheduler.counters.num_retractions == 0

    def test_the_urgent_ones_own_prefix_is_no_room_either(self, overlap: bool) -> None:
        """It stands on what the other computed: that stays, and only the rest is made room for."""
        harness = bench(overlap=overlap)
        shared = prompt_of(CAPACITY // 2, 1)
        harness.send("low", [*shared, 1], max_new=100, priority=0)
        harness.turn(12)
        tail = prompt_of(CAPACITY * 3 // 8, 2)
        harness.send("high", [*shared, *tail], max_new=4, priority=50)
        harness.turn()
        assert running(harness) == ["high"]
        harness.run()
        assert harness.output("high") == expected_output([*shared, *tail], 4)
        assert harness.output("low") == expected_output([*shared, 1], 100)
        cached = {out.rid: out.cached_tokens for out in harness.channel.outs}
        assert cached["high"] >= len(shared) - PAGE
        harness.memory.audit()

    def test_many_preemptions_neither_reserve_nor_end_a_request(self, overlap: bool) -> None:
        harness = bench(max_running_requests=1, overlap=overlap)
        harness.send("low", prompt_of(20, 1), max_new=60, priority=0)
        for i in range(MAX_RETRACTIONS + 3):
            while "low" not in running(harness):
                harness.turn()
            harness.turn(2)
            harness.send(f"high{i}", prompt_of(12, 10 + i), max_new=3, priority=20)
            harness.turn()
        low = harness.scheduler.requests()[0]
        assert low.num_retractions == MAX_RETRACTIONS + 3
        assert (low.num_own_retractions, low.needs_reservation) == (0, False)
        harness.run()
        assert harness.output("low") == expected_output(prompt_of(20, 1), 60)
        assert harness.final("low").type == "length"

    def test_a_plan_that_did_not_help_is_not_made_at_every_step(
        self, overlap: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        harness = bench(overlap=overlap, max_running_requests=2)
        looks = 0
        real_match = harness.memory.cache.match

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal looks
            looks += 1
            return real_match(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(harness.memory.cache, "match", counted)
        harness.send("kept", prompt_of(CAPACITY // 4, 1), max_new=200, priority=45)
        harness.send("low", prompt_of(20, 2), max_new=120, priority=0)
        harness.turn(12)
        assert running(harness) == ["kept", "low"]
        harness.send("high", prompt_of(CAPACITY * 3 // 4, 3), max_new=4, priority=50)
        harness.turn(100)
        assert running(harness) == ["kept", "low"]
        assert looks <= 3 + 100 // 16


class TestFullQueue:
    def harness(self, rules: PriorityRules | None = None) -> Harness:
        harness = bench(rules, max_running_requests=1, max_queued_requests=2)
        harness.send("runs", prompt_of(20), max_new=6, priority=9)
        harness.turn()
        return harness

    def test_the_least_urgent_goes_and_has_its_one_end(self) -> None:
        harness = self.harness()
        for rid, priority in (("old", 1), ("new", 1), ("urgent", 2)):
            harness.send(rid, prompt_of(8, priority), max_new=2, priority=priority)
        harness.run()
        final = harness.final("new")
        assert (final.type, final.status_code) == ("abort", 503)
        assert final.message == (
            "The request queue is full (2 requests). A more urgent one took this one's place."
        )
        assert order_of_ends(harness) == ["new", "runs", "urgent", "old"]
        counters = harness.scheduler.counters
        assert (counters.num_aborted, counters.num_refused) == (1, 0)

    def test_an_equal_is_refused(self) -> None:
        harness = self.harness()
        for rid in ("a", "b", "late"):
            harness.send(rid, prompt_of(8, 1), max_new=2, priority=1)
        harness.run()
        assert harness.final("late").message == "The request queue is full (2 requests)."
        assert order_of_ends(harness) == ["late", "runs", "a", "b"]
        assert harness.scheduler.counters.num_refused == 1

    def test_one_that_can_not_be_served_pushes_nobody_out(self) -> None:
        harness = bench(max_running_requests=1, max_queued_requests=1, context_length=64)
        for rid, length in (("runs", 20), ("waits", 8)):
            harness.send(rid, prompt_of(length), max_new=3, priority=1)
            harness.turn()
        harness.send("long", prompt_of(64), max_new=1, priority=99)
        harness.run()
        assert harness.final("long").status_code == 400
        assert harness.final("waits").type == "length"


def test_scarcity_takes_the_least_urgent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    harness = bench(PriorityRules(threshold=None))
    for i in range(8):
        harness.send(f"r{i}", prompt_of(20 + i, i), max_new=150, priority=i // 4)
    harness.run()
    retractions = [harness.retractions(f"r{i}") for i in range(8)]
    assert sum(retractions[:4]) > 0
    assert max(retractions) <= MAX_RETRACTIONS
    assert retractions[4] == 0, "the oldest of the most urgent"
    assert sum(retractions[4:]) < sum(retractions[:4])
    for i in range(8):
        assert harness.output(f"r{i}") == expected_output(prompt_of(20 + i, i), 150)
    harness.memory.audit()


@pytest.mark.parametrize("seed", range(4))
def test_random_programs_end_every_request_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 6)
    dice = random.Random(seed)
    rules = PriorityRules(low_first=bool(seed % 2), threshold=dice.choice((0, 2)))
    windows = SLIDING if seed == 3 else ()
    harness = bench(
        rules,
        windows=windows,
        overlap=seed < 2,
        policy=("fcfs", "lpm")[seed % 2],
        max_running_requests=4,
        max_queued_requests=8,
    )
    shared = prompt_of(60, 99)
    sent: dict[str, tuple[list[int], int]] = {}
    for i in range(150):
        prompt = shared[: dice.randrange(60)] + prompt_of(dice.randrange(1, 160), i)
        sent[f"r{i}"] = (prompt, dice.randrange(30))
        priority = dice.choice((None, 0, 1, 2, 3, 5))
        harness.send(f"r{i}", *sent[f"r{i}"], priority=priority)
        if dice.random() < 0.2:
            harness.abort(f"r{dice.randrange(i + 1)}")
        for _ in range(dice.randrange(5)):
            harness.turn()
            harness.now += dice.random() / 10
            if seed >= 2:
                harness.memory.audit()
        harness.scheduler.drain()
        harness.memory.audit()
    harness.run()
    assert harness.scheduler.counters.num_preemptions > 5
    ends = [harness.final(rid) for rid in sent]
    assert 40 < sum(end.type == "length" for end in ends) < len(ends)
    for (rid, (prompt, count)), end in zip(sent.items(), ends, strict=True):
        got = harness.output(rid)
        assert got == expected_output(prompt, len(got))
        assert end.type == "abort" or len(got) == count
    assert harness.memory.memory_object()["pages"]["used"] == 0


def test_without_the_rules_nothing_is_preempted_nor_reordered() -> None:
    memory = make_memory(page_size=PAGE)
    harness = Harness(memory, page_size=PAGE, max_running_requests=1)
    for rid, priority in (("a", None), ("b", 0), ("c", 100)):
        harness.send(rid, prompt_of(20), max_new=4, priority=priority)
        harness.turn()
    harness.run()
    assert order_of_ends(harness) == ["a", "b", "c"]
    assert harness.scheduler.counters.num_preemptions == 0
