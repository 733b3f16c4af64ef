"""The scheduler over window groups: the same answers, in bounded memory, whatever happens."""

from __future__ import annotations

import random

import pytest

from sglang.srt.managers.schedule_batch import MAX_RETRACTIONS
from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.kv_layout import GroupKind
from sglang.srt.mem_cache.window_rule import window_rules
from srt.crossed import crossed
from srt.managers.scheduler_harness import Harness, expected_output, make_memory
from srt.managers.test_scheduler_scarcity import prompt_of
from srt.mem_cache.memory_driver import FULL, Window

PAGE = 4
SEGMENT = 16  # pages
CHUNK = 32
SLIDING = (GroupKind.SLIDING, 30)
CHUNKED = (GroupKind.CHUNKED, 24)

WINDOWS = [(FULL, SLIDING), (FULL, CHUNKED), (SLIDING,), (CHUNKED, SLIDING)]


def name_of(value: object) -> str | None:
    if isinstance(value, tuple):
        return "+".join(kind.name.lower() for kind, _ in value)
    return None


KINDS = pytest.mark.parametrize("windows", WINDOWS, ids=name_of)
OVERLAPS = pytest.mark.parametrize(
    ("windows", "overlap"), crossed(WINDOWS, [True, False]), ids=name_of
)


def small(windows: tuple[Window, ...], segments: int = 8, **kwargs: object) -> KVMemory:
    return make_memory(
        page_size=PAGE,
        pages_per_segment=SEGMENT,
        segments=segments,
        windows=windows,
        chunk_tokens=CHUNK,
        **kwargs,  # type: ignore[arg-type]
    )


def answers(harness: Harness, lengths: dict[str, tuple[int, int]]) -> None:
    """Every request has exactly the tokens that its windows allow it to see."""
    rules = window_rules(harness.memory.spec)
    for seed, (rid, (prompt, new)) in enumerate(lengths.items()):
        assert harness.output(rid) == expected_output(prompt_of(prompt, seed), new, rules), rid


@OVERLAPS
def test_one_request_holds_no_more_than_its_bound(
    windows: tuple[Window, ...], overlap: bool
) -> None:
    memory = small(windows)
    harness = Harness(memory, page_size=PAGE, overlap=overlap, chunk_tokens=CHUNK)
    harness.send("r", prompt_of(300), max_new=60)
    bounds, most = harness.limits.window_pages, [0] * len(windows)
    while harness.channel.inbox or harness.scheduler.busy:
        harness.turn()
        for req in harness.scheduler.requests():
            if req.kv is not None:
                held = [table.num_pages for table in req.kv.tables]
                most = [max(pair) for pair in zip(most, held, strict=True)]
    answers(harness, {"r": (300, 60)})
    for bound, held, (kind, _) in zip(bounds, most, windows, strict=True):
        assert held == 90 if kind is GroupKind.FULL else held <= bound
    memory.audit()


@OVERLAPS
def test_retraction_changes_no_token(
    windows: tuple[Window, ...], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    # Where no group keeps all, every request needs little, and more of them have to meet.
    memory = small(windows, 8 if FULL in windows else 4)
    harness = Harness(memory, page_size=PAGE, overlap=overlap, chunk_tokens=CHUNK)
    lengths = {f"r{i}": (5 + 13 * i, 150 + 10 * i) for i in range(11)}
    for seed, (rid, (prompt, new)) in enumerate(lengths.items()):
        harness.send(rid, prompt_of(prompt, seed), max_new=new)
    harness.run()
    answers(harness, lengths)
    assert max(harness.retractions(rid) for rid in lengths) <= MAX_RETRACTIONS
    # Where no group keeps all, every need is bounded and admission knows it.
    assert harness.scheduler.counters.num_retractions > 0 or FULL not in windows
    memory.audit()


@OVERLAPS
def test_a_repeat_hits_at_full_length(windows: tuple[Window, ...], overlap: bool) -> None:
    for length in (63, 64, 65, 95, 96, 97, 121):
        memory = small(windows)
        harness = Harness(memory, page_size=PAGE, overlap=overlap, chunk_tokens=CHUNK)
        for rid in ("first", "again"):
            harness.send(rid, prompt_of(length), max_new=50)
            harness.run()
            rules = window_rules(memory.spec)
            assert harness.output(rid) == expected_output(prompt_of(length), 50, rules)
        cached = [out.cached_tokens for out in harness.channel.outs if out.rid == "again"]
        assert set(cached) == {(length - 1) // PAGE * PAGE}
        turn = prompt_of(length) + harness.output("first") + [7, 8, 9]
        harness.send("turn", turn, max_new=9)
        harness.run()
        assert harness.output("turn") == expected_output(turn, 9, rules)
        cached = [out.cached_tokens for out in harness.channel.outs if out.rid == "turn"]
        assert set(cached) == {(length + 49) // PAGE * PAGE}
        memory.audit()


@KINDS
@pytest.mark.parametrize("nth", range(1, 7))
def test_the_nth_map_fails_and_everybody_is_served(windows: tuple[Window, ...], nth: int) -> None:
    memory = small(windows, fail_maps=lambda number: number == nth)
    harness = Harness(memory, page_size=PAGE, chunk_tokens=CHUNK)
    lengths = {f"r{i}": (60, 20) for i in range(6)}
    for seed, (rid, (prompt, new)) in enumerate(lengths.items()):
        harness.send(rid, prompt_of(prompt, seed), max_new=new)
        harness.turn()
        harness.now += 1.0
    harness.run()
    for seed, rid in enumerate(lengths):
        rules = window_rules(memory.spec)
        got = harness.output(rid)
        assert got == expected_output(prompt_of(60, seed), len(got), rules)
        final = harness.final(rid)
        assert final.type == "length" or (final.status_code == 503 and nth <= len(windows))
    memory.audit()


@pytest.mark.parametrize(("windows", "seed"), crossed(WINDOWS, [1, 2]), ids=name_of)
@pytest.mark.parametrize("num_requests", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_no_page_is_lost_over_random_requests_with_aborts(
    windows: tuple[Window, ...], num_requests: int, seed: int
) -> None:
    rng = random.Random(seed)
    memory = small(windows, idle_release_s=3.0, prefix_idle_s=20.0)
    harness = Harness(
        memory, page_size=PAGE, overlap=bool(seed % 2), chunk_tokens=CHUNK, context_length=256
    )
    shared = prompt_of(60, 99)
    sent: dict[str, tuple[list[int], int]] = {}
    for i in range(num_requests):
        prompt = shared[: rng.randrange(0, 60)] + prompt_of(rng.randrange(1, 60), i)
        sent[f"r{i}"] = (prompt, rng.randrange(0, 60))
        harness.send(f"r{i}", *sent[f"r{i}"])
        if rng.random() < 0.3:
            harness.abort(f"r{rng.randrange(i + 1)}")
        if rng.random() < 0.6:
            harness.turn(rng.randrange(1, 4))
            harness.now += rng.random()
        if i % 20 == 0:
            harness.scheduler.drain()
            memory.audit()
    harness.run()
    rules = window_rules(memory.spec)
    for rid, (prompt, count) in sent.items():
        got = harness.output(rid)
        assert got == expected_output(prompt, len(got), rules)
        assert harness.final(rid).type == "abort" or len(got) == count
    memory.audit()
    for _ in range(60):
        harness.now += 1.0
        harness.turn()
        harness.settle()
    assert memory.memory_object()["pages"] == {"free": 0, "used": 0, "cached": 0}
    assert memory.memory_object()["mapped_bytes"] == 0
