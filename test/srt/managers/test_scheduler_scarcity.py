"""Too little memory: requests wait, are retracted, or end with both numbers; none is lost."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sglang.srt.managers.io_struct import StopStringHit
from sglang.srt.managers.schedule_batch import MAX_RETRACTIONS, ReqState
from srt.managers.scheduler_harness import Harness, expected_output, make_memory

PAGE = 4
SEGMENT = 16  # pages
CAPACITY = 8 * SEGMENT * PAGE  # tokens under the budget of `small`


def small(**kwargs: object) -> object:
    return make_memory(page_size=PAGE, pages_per_segment=SEGMENT, segments=8, **kwargs)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("count", "share"), [(2, 0.6), (8, 0.4), (3, 0.95)])
def test_prompts_that_do_not_fit_together_queue(
    count: int, share: float, groups: int, overlap: bool
) -> None:
    memory = small(groups=groups)
    harness = Harness(memory, page_size=PAGE, overlap=overlap)
    length = int(CAPACITY * share) - 8
    for i in range(count):
        harness.send(f"r{i}", prompt_of(length, i), max_new=8)
    harness.run()
    for i in range(count):
        assert harness.output(f"r{i}") == expected_output(prompt_of(length, i), 8)
        assert harness.retractions(f"r{i}") == 0, "admission in numbers makes this unnecessary"
    memory.audit()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_cached_prompt_that_has_to_be_computed_again(groups: int, overlap: bool) -> None:
    """Its log probabilities are wanted: the pool holds it once, not twice."""
    memory = small(groups=groups)
    harness = Harness(memory, page_size=PAGE, overlap=overlap)
    prompt = prompt_of(int(CAPACITY * 0.6))
    harness.send("first", prompt, max_new=4)
    harness.run()
    harness.send("again", [*prompt, 1, 2, 3], max_new=40, return_logprob=True)
    harness.run()
    assert harness.output("again") == expected_output([*prompt, 1, 2, 3], 40)
    assert harness.final("again").type == "length"
    assert harness.retractions("again") == 0
    harness.scheduler.drain()
    memory.audit()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_retraction_changes_no_token(
    overlap: bool, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Admission that counts almost nothing of the answers overcommits on purpose.
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    memory = small()
    harness = Harness(memory, page_size=PAGE, overlap=overlap, policy=policy)
    lengths = {f"r{i}": (20 + 13 * i, 150 + 10 * i) for i in range(8)}
    for i, (rid, (prompt, new)) in enumerate(lengths.items()):
        harness.send(rid, prompt_of(prompt, i), max_new=new)
    harness.run()
    for i, (rid, (prompt, new)) in enumerate(lengths.items()):
        assert harness.output(rid) == expected_output(prompt_of(prompt, i), new), rid
        assert harness.retractions(rid) <= MAX_RETRACTIONS
    assert harness.scheduler.counters.num_retractions > 0
    assert harness.retractions("r0") == 0, "the oldest is never retracted"
    memory.audit()


def test_a_map_that_always_fails_ends_every_request_with_503() -> None:
    memory = small(fail_maps=lambda number: number > 0)
    harness = Harness(memory, page_size=PAGE)
    for i in range(5):
        harness.send(f"r{i}", prompt_of(30, i), max_new=4)
    harness.run()
    for i in range(5):
        final = harness.final(f"r{i}")
        assert (final.type, final.status_code) == ("abort", 503)
        assert str(CAPACITY) in final.message
        assert harness.retractions(f"r{i}") <= MAX_RETRACTIONS
    memory.audit()


@pytest.mark.parametrize("nth", range(1, 9))
def test_the_nth_map_fails_and_everybody_is_served(nth: int) -> None:
    memory = small(fail_maps=lambda number: number == nth)
    harness = Harness(memory, page_size=PAGE)
    for i in range(6):
        harness.send(f"r{i}", prompt_of(60, i), max_new=20)
        harness.turn()
        harness.now += 1.0
    for _ in range(3000):
        if not harness.scheduler.busy:
            break
        harness.turn()
        harness.now += 1.0
    for i in range(6):
        final = harness.final(f"r{i}")
        if final.type == "abort":
            # The only request there is may end when not even one segment can be had.
            assert final.status_code == 503
            assert nth == 1
        else:
            assert harness.output(f"r{i}") == expected_output(prompt_of(60, i), 20)
        assert harness.retractions(f"r{i}") <= MAX_RETRACTIONS
    memory.audit()


def test_maps_that_fail_from_some_point_on_shrink_the_server_but_not_its_answers() -> None:
    memory = small(fail_maps=lambda number: number > 3)
    harness = Harness(memory, page_size=PAGE)
    for i in range(10):
        harness.send(f"r{i}", prompt_of(40, i), max_new=60)
    harness.run()
    served = 0
    for i in range(10):
        final = harness.final(f"r{i}")
        assert harness.retractions(f"r{i}") <= MAX_RETRACTIONS
        if final.type == "length":
            served += 1
            assert harness.output(f"r{i}") == expected_output(prompt_of(40, i), 60)
        else:
            assert final.status_code == 503
            part = harness.output(f"r{i}")
            assert part == expected_output(prompt_of(40, i), len(part))
    assert served >= 1
    memory.audit()


def test_after_a_burst_and_the_idle_time_the_pool_stands_as_at_start() -> None:
    memory = small(idle_release_s=30.0, prefix_idle_s=300.0)
    harness = Harness(memory, page_size=PAGE)
    at_start = memory.memory_object()["mapped_bytes"]
    for i in range(6):
        harness.send(f"r{i}", prompt_of(70, i), max_new=30)
    harness.run()
    assert memory.memory_object()["mapped_bytes"] > at_start
    assert memory.memory_object()["pages"]["cached"] > 0
    for _ in range(400):
        harness.now += 2.0
        harness.turn()
        harness.settle()
    after = memory.memory_object()
    assert after["pages"] == {"free": 0, "used": 0, "cached": 0}
    assert after["mapped_bytes"] == at_start
    memory.audit()


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("num_requests", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_page_is_lost_over_random_requests_with_aborts(num_requests: int, seed: int) -> None:
    rng = random.Random(seed)
    memory = small(groups=1 + seed % 2, idle_release_s=3.0, prefix_idle_s=20.0)
    harness = Harness(memory, page_size=PAGE, overlap=bool(seed % 2), context_length=CAPACITY // 2)
    shared = prompt_of(60, 99)
    sent: dict[str, tuple[list[int], int]] = {}
    for i in range(num_requests):
        prompt = shared[: rng.randrange(0, 60)] + prompt_of(rng.randrange(1, 60), i)
        sent[f"r{i}"] = (prompt, rng.randrange(0, 25))
        harness.send(f"r{i}", *sent[f"r{i}"])
        if rng.random() < 0.3:
            harness.abort(f"r{rng.randrange(i + 1)}")
        if rng.random() < 0.6:
            harness.turn(rng.randrange(1, 4))
            harness.now += rng.random()
        if i % 50 == 0:
            harness.scheduler.drain()
            memory.audit()
    harness.run()
    for rid, (prompt, count) in sent.items():
        final = harness.final(rid)
        got = harness.output(rid)
        assert got == expected_output(prompt, len(got))
        assert final.type == "abort" or len(got) == count
    memory.audit()
    assert memory.memory_object()["pages"]["used"] == 0
    for _ in range(60):
        harness.now += 1.0
        harness.turn()
        harness.settle()
    assert memory.memory_object()["pages"] == {"free": 0, "used": 0, "cached": 0}
    assert memory.memory_object()["mapped_bytes"] == 0


def test_a_prompt_that_waits_is_not_matched_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = small()
    harness = Harness(memory, page_size=PAGE)
    looks = 0
    real_open = memory.open

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal looks
        looks += 1
        return real_open(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(memory, "open", counted)
    harness.send("runs", prompt_of(40), max_new=300)
    harness.turn()
    harness.send("waits", prompt_of(CAPACITY // 2, 1), max_new=4)
    harness.turn(200)
    assert harness.scheduler.num_waiting == 1
    assert looks <= 2 + 200 // 16
    harness.run()
    assert harness.output("waits") == expected_output(prompt_of(CAPACITY // 2, 1), 4)


def test_a_retracted_request_can_still_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    memory = small()
    harness = Harness(memory, page_size=PAGE)
    for i in range(8):
        harness.send(f"r{i}", prompt_of(20, i), max_new=200)
    for _ in range(2000):
        harness.turn()
        retracted = [r for r in harness.scheduler.requests() if r.state is ReqState.RETRACTED]
        if len(retracted) >= 2:
            break
    harness.channel.inbox.append(StopStringHit(retracted[0].rid))
    harness.abort(retracted[1].rid)
    harness.run()
    assert harness.final(retracted[0].rid).type == "stop"
    assert harness.final(retracted[1].rid).type == "abort"
    memory.audit()
