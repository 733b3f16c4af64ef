"""Drafts through the scheduler and real memory: the same tokens, whatever was guessed.

The worker's model is a checksum over what it reads back, so a slot that a wrong guess left behind,
a page that was lost or a length that was not taken back changes the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from sglang.srt.managers.draft_policy import num_taken
from sglang.srt.managers.io_struct import StopStringHit
from sglang.srt.managers.schedule_batch import ReqState
from sglang.srt.mem_cache.allocation import KVMemory
from sglang.srt.mem_cache.kv_layout import GroupKind, num_pages_for
from sglang.srt.mem_cache.window_rule import window_rules
from sglang.srt.speculative.ngram_drafts import NgramRules
from srt.crossed import crossed
from srt.distributed.thread_ranks import ThreadRanks
from srt.managers.draft_guesses import RULES, Follow, guess
from srt.managers.scheduler_harness import Harness, expected_output, make_memory
from srt.mem_cache.memory_driver import FULL, Window

PAGE = 4
KINDS: dict[str, tuple[Window, ...]] = {
    "one": (FULL,),
    "two": (FULL, FULL),
    "sliding": (FULL, (GroupKind.SLIDING, 16)),
    "chunked": (FULL, (GroupKind.CHUNKED, 32)),
    "window": ((GroupKind.SLIDING, 16),),
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


def memory_of(kind: str = "one", **kwargs: object) -> KVMemory:
    values: dict[str, object] = {"pages_per_segment": 16, "segments": 8, **kwargs}
    return make_memory(page_size=PAGE, windows=KINDS[kind], **values)  # type: ignore[arg-type]


def drafted(memory: KVMemory, rules: NgramRules = RULES, **limits: object) -> Harness:
    return Harness(memory, page_size=PAGE, drafts=rules, **limits)


def follow(memory: KVMemory) -> Follow:
    rules = window_rules(memory.spec)
    return lambda tokens, count: expected_output(tokens, count, rules)


def test_tokens_count_up_to_the_first_that_was_not_drafted() -> None:
    def taken(ids: Sequence[int], expected: Sequence[int]) -> int:
        return num_taken(np.array(ids, np.int64), expected)

    assert taken([5], [-1]) == 1
    assert taken([5, 6, 7], [5, 6, -1]) == 3
    assert taken([5, 6, 7], [5, 9, -1]) == 2
    assert taken([5, 6, 7], [4, 6, -1]) == 1, "a right token behind a wrong one counts nothing"
    assert taken([5, -1, -1], [4, -1, -1]) == 1


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_guesses_change_no_token(kind: str, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of(kind)
    guess(monkeypatch, follow(memory))
    harness = drafted(memory, overlap=overlap)
    for number in range(5):
        harness.send(f"r{number}", prompt_of(9 + 7 * number, number), max_new=30 + number)
    while harness.channel.inbox or harness.scheduler.busy:
        harness.turn()
        if not harness.scheduler._inflight:
            memory.audit()
    rules = window_rules(memory.spec)
    for number in range(5):
        wanted = expected_output(prompt_of(9 + 7 * number, number), 30 + number, rules)
        assert harness.output(f"r{number}") == wanted
        assert harness.final(f"r{number}").type == "length"
    counters = harness.scheduler.counters
    assert counters.generated_tokens == sum(30 + number for number in range(5))
    assert 0 < counters.num_correct < counters.num_proposed
    assert counters.as_dict()["avg_spec_accept_length"] == pytest.approx(
        1 + counters.num_correct / counters.num_verified, abs=1e-4
    )


def test_right_guesses_save_steps_and_wrong_ones_cost_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = {}
    for odds in (0.0, 1.0, None):
        memory = memory_of()
        if odds is not None:
            guess(monkeypatch, follow(memory), odds=odds, skips=0.0)
        harness = drafted(memory) if odds is not None else Harness(memory, page_size=PAGE)
        harness.send("r", prompt_of(10), max_new=61)
        harness.run()
        assert harness.output("r") == expected_output(prompt_of(10), 61)
        steps[odds] = harness.scheduler.counters.num_steps
    assert steps[None] == steps[1.0] == 61
    assert steps[0.0] < 25


def test_pages_of_wrong_guesses_are_used_next_and_none_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = memory_of()
    guess(monkeypatch, follow(memory), odds=1.0, skips=0.0)
    harness = drafted(memory)
    harness.send("r", prompt_of(10), max_new=40)
    spare = 0
    while harness.channel.inbox or harness.scheduler.busy:
        harness.turn()
        harness.scheduler.drain()
        for lease in memory.leases.values():
            memory.audit()
            held = lease.tables[0].num_pages
            exact = num_pages_for(lease.num_tokens, PAGE)
            assert exact <= held <= num_pages_for(lease.num_tokens + 7, PAGE)
            assert lease.has_spare_pages == (held > exact)
            spare += held > exact
    harness.turn()
    assert spare > 0
    assert harness.output("r") == expected_output(prompt_of(10), 40)
    memory.audit()
    assert memory.allocators[0].index.rows.sum() == 0


@pytest.mark.parametrize(("kind", "seed"), crossed(["one", "sliding", "chunked"], range(3)))
def test_scarcity_leaves_drafts_out_and_changes_no_token(
    kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglang.srt.managers.schedule_batch.CLIP_MAX_NEW_TOKENS", 2)
    memory = memory_of(kind, pages_per_segment=8, segments=6)
    guess(monkeypatch, follow(memory), seed=seed)
    harness = drafted(memory)
    for number in range(7):
        harness.send(f"r{number}", prompt_of(10 + 3 * number, number), max_new=60)
    harness.run()
    rules = window_rules(memory.spec)
    for number in range(7):
        wanted = expected_output(prompt_of(10 + 3 * number, number), 60, rules)
        assert harness.output(f"r{number}") == wanted
    if kind == "one":
        assert harness.scheduler.counters.num_retractions > 0
    memory.audit()


def test_without_room_for_guesses_a_request_decodes_plainly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One segment of 64 tokens: the last pages have room for tokens one by one alone."""
    memory = memory_of(segments=1)
    guess(monkeypatch, follow(memory), odds=0.0, skips=0.0)
    harness = drafted(memory, context_length=1 << 20)
    harness.send("one", prompt_of(25, 1), max_new=7)
    harness.send("two", prompt_of(25, 2), max_new=7)
    harness.run()
    for seed, rid in ((1, "one"), (2, "two")):
        assert harness.output(rid) == expected_output(prompt_of(25, seed), 7)
    assert max(sum(step) for step in harness.worker.steps) <= 64


def test_a_request_ends_where_it_would_end_without_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = memory_of()
    guess(monkeypatch, follow(memory), odds=0.0, skips=0.0)
    harness = drafted(memory, context_length=64)
    answer = expected_output(prompt_of(10), 50)
    place = next(i for i in range(8, 40) if answer[i] not in answer[:i])
    harness.send("stop", prompt_of(10), max_new=50, params={"stop_token_ids": (answer[place],)})
    harness.send("long", prompt_of(60, 3), max_new=50)
    harness.send("one", prompt_of(7, 4), max_new=1)
    harness.send("two", prompt_of(7, 5), max_new=2)
    harness.run()
    assert harness.output("stop") == answer[: place + 1]
    assert harness.final("stop").matched == answer[place]
    assert harness.output("long") == expected_output(prompt_of(60, 3), 4), "the context's end"
    assert harness.output("one") == expected_output(prompt_of(7, 4), 1)
    assert harness.output("two") == expected_output(prompt_of(7, 5), 2)
    memory.audit()


def test_what_a_drafted_request_computed_is_a_prefix_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = memory_of()
    guess(monkeypatch, follow(memory), odds=0.5)
    harness = drafted(memory, canary="full")
    harness.send("first", prompt_of(18), max_new=30)
    harness.run()
    answer = expected_output(prompt_of(18), 30)
    assert harness.output("first") == answer
    longer = [*prompt_of(18), *answer[:25]]
    harness.send("second", longer, max_new=12)
    harness.run()
    assert harness.output("second") == expected_output(longer, 12)
    cached = [out.cached_tokens for out in harness.channel.outs if out.rid == "second"]
    assert cached[-1] == 40, "ten of its eleven pages"
    memory.audit()


def test_aborted_or_stopped_while_a_draft_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of()
    guess(monkeypatch, follow(memory), odds=0.3, skips=0.0)
    harness = drafted(memory)
    for rid in ("gone", "said", "stays"):
        harness.send(rid, prompt_of(11, len(rid)), max_new=60)
    while not any(step.batch.has_drafts for step in harness.scheduler._inflight):
        harness.turn()
    harness.abort("gone")
    harness.channel.inbox.append(StopStringHit("said"))
    harness.run()
    assert harness.final("gone").type == "abort"
    assert harness.final("said").type == "stop"
    assert harness.output("stays") == expected_output(prompt_of(11, 5), 60)
    for rid in ("gone", "said"):
        said = harness.output(rid)
        assert said == expected_output(prompt_of(11, 4), len(said))
    memory.audit()
    assert not memory.leases


def test_prompts_beside_drafts_join_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that were admitted at different times end up in one batch, not in turns."""
    memory = memory_of()
    guess(monkeypatch, follow(memory), odds=0.0, skips=0.0)
    harness = drafted(memory)
    harness.send("early", prompt_of(9, 1), max_new=90)
    harness.turn(6)
    harness.send("late", prompt_of(30, 2), max_new=60)
    harness.run()
    assert harness.output("early") == expected_output(prompt_of(9, 1), 90)
    assert harness.output("late") == expected_output(prompt_of(30, 2), 60)
    sizes = [len(step) for step in harness.worker.steps]
    first = sizes.index(2)
    last = len(sizes) - sizes[::-1].index(2)
    assert last - first > 6
    assert set(sizes[first:last]) == {2}, "all that run are in every step"


@pytest.mark.parametrize(("kind", "seed"), crossed(["sliding", "one", "two", "chunked"], range(4)))
def test_a_random_program_with_the_canary_watching(
    kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = random.Random(seed)
    memory = memory_of(kind, pages_per_segment=4, idle_release_s=0.05, prefix_idle_s=0.5)
    guess(monkeypatch, follow(memory), odds=0.25, skips=0.3, seed=seed)
    harness = drafted(memory, canary="full" if seed % 2 else "chain", chunk_tokens=16)
    prompts: dict[str, list[int]] = {}
    for number in range(160):
        kind_of = dice.choice(("send", "turn", "turn", "abort", "rest", "stop"))
        if kind_of == "send":
            rid = f"r{number}"
            prompts[rid] = [dice.randrange(3) for _ in range(dice.randrange(1, 40))]
            harness.send(rid, prompts[rid], dice.randrange(1, 40))
        elif kind_of == "abort" and prompts and dice.random() < 0.3:
            harness.abort(dice.choice(list(prompts)))
        elif kind_of == "stop" and prompts and dice.random() < 0.2:
            harness.channel.inbox.append(StopStringHit(dice.choice(list(prompts))))
        elif kind_of == "rest":
            harness.now += dice.choice((0.1, 1.0))
        harness.turn()
        if not harness.scheduler._inflight:
            memory.audit()
            if harness.scheduler._canary is not None:
                harness.scheduler._canary.audit(harness.scheduler.requests())
    harness.run()
    memory.audit()
    rules = window_rules(memory.spec)
    for rid, prompt in prompts.items():
        said = harness.output(rid)
        assert said == expected_output(prompt, len(said), rules)
        harness.final(rid)
    assert harness.scheduler.counters.num_correct > 0


def test_ranks_draft_alike_whatever_their_steps_take(monkeypatch: pytest.MonkeyPatch) -> None:
    guess(monkeypatch, lambda tokens, count: expected_output(tokens, count), odds=0.1)
    ranks = ThreadRanks(2)

    def act(rank: int) -> tuple[list[tuple[int, ...]], list[int]]:
        luck = random.Random(rank)
        control = ranks.links(rank).control
        memory = memory_of(ranks=control)
        harness = drafted(memory, control=control)
        harness.worker.step_time = lambda: luck.choice((0.001, 0.002, 0.3))
        for number in range(3):
            harness.send(f"r{number}", prompt_of(12 + number), max_new=60)
        for _ in range(400):
            harness.turn()
            if not harness.scheduler.busy:
                break
        steps = harness.worker.steps
        memory.audit()
        memory.close_pool()
        return steps, harness.output("r1")

    first, second = ranks.run(act)
    assert first == second
    assert first[1] == expected_output(prompt_of(13), 60)
    lengths = {tokens for step in first[0][1:] for tokens in step}
    assert len(lengths) > 3, "drafts of several lengths"


def test_a_state_of_waiting_is_never_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of()
    guess(monkeypatch, follow(memory), skips=0.0)
    harness = drafted(memory, max_running_requests=1)
    harness.send("one", prompt_of(20, 1), max_new=20)
    harness.send("two", prompt_of(20, 2), max_new=20)
    harness.turn(3)
    states = {req.rid: req.state for req in harness.scheduler.requests()}
    assert states == {"one": ReqState.DECODE, "two": ReqState.WAITING}
    harness.run()
    assert harness.output("two") == expected_output(prompt_of(20, 2), 20)
