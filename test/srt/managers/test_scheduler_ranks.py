"""Schedulers of two ranks: rank 0 decides, and memory stays alike whatever the machines do."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from sglang.srt.distributed.communicator import Communicator
from sglang.srt.errors import RankLostError
from sglang.srt.managers.io_struct import AbortReq, TokenOut
from sglang.srt.managers.priority_policy import PriorityRules
from sglang.srt.managers.scheduler_limits import StepTime, TurnInputs
from sglang.srt.managers.scheduler_ranks import (
    MEET_INTERVAL_S,
    FollowingTurns,
    LeadingTurns,
    SilentChannel,
    make_turns,
)
from sglang.srt.mem_cache.kv_layout import GroupKind
from srt.distributed.thread_ranks import ThreadRanks
from srt.managers.scheduler_harness import FakeChannel, Harness, expected_output, make_memory
from srt.mem_cache.memory_driver import FULL, Window
from srt.mem_cache.rank_world import open_gate_before_waiting, state_of
from srt.mem_cache.test_rank_agreement import MoodyBacking

SLIDING: tuple[Window, ...] = (FULL, (GroupKind.SLIDING, 10))


@pytest.fixture
def ranks() -> Iterator[ThreadRanks]:
    made = ThreadRanks(2)
    yield made
    made.close()


def test_what_rank_0_hears_and_reads_is_what_both_take(ranks: ThreadRanks) -> None:
    def act(rank: int) -> list[TurnInputs]:
        channel = FakeChannel() if rank == 0 else SilentChannel()
        turns = make_turns(channel, lambda: 5.0 + 100 * rank, ranks.links(rank).control)
        if isinstance(channel, FakeChannel):
            channel.inbox.append(AbortReq("a"))
        first = turns.next(0)
        turns.note_step(StepTime(64, 65, 0.5 + rank))
        turns.note_decided(np.array([3, 4], np.int64))
        return [first, turns.next(0)]

    inputs, same = ranks.run(act)
    assert inputs == same
    assert inputs[0].messages == [AbortReq("a")]
    assert [one.now for one in inputs] == [5.0, 5.0]
    assert inputs[1].step_times == [StepTime(64, 65, 0.5)]
    assert inputs[0].digest != inputs[1].digest


def test_a_rank_that_decides_otherwise_says_so(ranks: ThreadRanks) -> None:
    def act(rank: int) -> None:
        turns = make_turns(SilentChannel(), lambda: 0.0, ranks.links(rank).control)
        turns.next(0)
        turns.note_decided(np.array([7 + rank], np.int64))
        turns.next(0)

    with pytest.raises(RankLostError, match="rank 1 has decided otherwise than rank 0"):
        ranks.run(act)


def test_one_message_a_turn_and_a_meeting_only_at_rest(ranks: ThreadRanks) -> None:
    """(seconds since the last turn, how long rank 0 would wait, whether the ranks meet)."""
    plan = [(0.0, 100, 0), (0.4, 100, 0), (0.7, 100, 1), (0.4, 100, 0), (0.9, 0, 0), (0.0, 5, 1)]

    def act(rank: int) -> list[int]:
        control = ranks.links(rank).control
        now = 0.0
        turns = make_turns(SilentChannel(), lambda: now, control)
        calls = ranks.control.calls[rank]
        counts = []
        for seconds, poll_ms, _ in plan:
            now += seconds
            before = len(calls)
            turns.next(poll_ms)
            assert calls[before] == "broadcast"
            counts.append(len(calls) - before - 1)
        return counts

    assert MEET_INTERVAL_S == 1.0
    meetings = [meeting for *_, meeting in plan]
    assert ranks.run(act) == [meetings, meetings]


def test_the_place_in_the_group_decides_the_part(ranks: ThreadRanks) -> None:
    controls: list[Communicator] = [ranks.links(rank).control for rank in range(2)]
    kinds = [type(make_turns(SilentChannel(), lambda: 0.0, control)) for control in controls]
    assert kinds == [LeadingTurns, FollowingTurns]


def test_idle_ranks_send_no_votes(ranks: ThreadRanks) -> None:
    def act(rank: int) -> None:
        control = ranks.links(rank).control
        memory = make_memory(page_size=4, ranks=control)
        Harness(memory, page_size=4, control=control).turn(20)
        memory.close_pool()

    ranks.run(act)
    assert set(ranks.control.calls[0]) == {"broadcast"}


@dataclass
class Trace:
    states: list[object] = field(default_factory=list)
    outs: list[TokenOut] = field(default_factory=list)
    prompts: dict[str, list[int]] = field(default_factory=dict)
    refusals: int = 0


def run_program(
    ranks: ThreadRanks, rank: int, seed: int, windows: Sequence[Window]
) -> tuple[Trace, Harness]:
    """What happens is drawn from `seed`, how a machine behaves from the rank as well."""
    dice, luck = random.Random(seed), random.Random(f"{seed} {rank}")
    odds = (0.0, 0.15)[seed % 2]
    control = ranks.links(rank).control
    backing = MoodyBacking(random.Random(f"{rank} {seed}"), fail_maps=odds, fail_unmaps=odds)
    memory = make_memory(
        page_size=4,
        pages_per_segment=4,
        segments=5,
        windows=windows,
        chunk_tokens=16,
        idle_release_s=0.05,
        prefix_idle_s=0.5,
        backing=backing,
        ranks=control,
    )
    open_gate_before_waiting(memory.manager, backing)
    harness = Harness(
        memory,
        page_size=4,
        chunk_tokens=16,
        control=control,
        adaptive_chunk=True,
        priorities=PriorityRules(threshold=1) if seed >= 4 else None,
    )
    harness.now = 1000.0 * rank  # nobody asks the second rank's clock, nor how fast it computes
    harness.worker.step_time = lambda: luck.choice((0.001, 1.0, 3.0))
    trace = Trace()
    for number in range(150):
        backing.gate.clear() if luck.random() < 0.6 else backing.gate.set()
        kind = dice.choice(("send", "turn", "turn", "turn", "abort", "rest"))
        if kind == "send":
            rid = f"r{number}"
            trace.prompts[rid] = [dice.randrange(3) for _ in range(dice.randrange(1, 50))]
            harness.send(rid, trace.prompts[rid], dice.randrange(1, 20), priority=number % 3)
        elif kind == "abort" and trace.prompts and dice.random() < 0.3:
            harness.abort(dice.choice(list(trace.prompts)))
        elif kind == "rest":
            harness.now += dice.choice((0.1, 1.0))
        harness.turn()
        trace.states.append((number, state_of(memory), harness.scheduler.counters.num_steps))
    backing.gate.set()
    for _ in range(4000):
        harness.turn()
        if not harness.scheduler.busy:
            break
    assert not harness.scheduler.busy
    memory.audit()
    trace.outs, trace.refusals = harness.channel.outs, backing.refusals
    memory.close_pool()
    return trace, harness


@pytest.mark.parametrize(
    ("windows", "seed"),
    [
        *((SLIDING, seed) for seed in (0, 3, 4)),
        *(((), seed) for seed in (1, 5)),
        *(pytest.param(SLIDING, seed, marks=pytest.mark.slow) for seed in (1, 2, 5)),
        *(pytest.param((), seed, marks=pytest.mark.slow) for seed in (0, 2, 3, 4)),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "sliding" if value else "full",
)
def test_pages_stay_alike_whatever_the_machines_do(
    ranks: ThreadRanks, seed: int, windows: Sequence[Window]
) -> None:
    (first, harness), (second, _) = ranks.run(lambda rank: run_program(ranks, rank, seed, windows))
    for one, other in zip(first.states, second.states, strict=True):
        assert one == other
    assert first.outs == second.outs
    ended = [out for out in first.outs if out.finish_reason is not None]
    assert sorted(out.rid for out in ended) == sorted(first.prompts)
    rules = harness.worker._rules
    for out in ended:
        if out.finish_reason is not None and out.finish_reason.type == "length":
            count = out.completion_tokens
            expected = expected_output(first.prompts[out.rid], count, rules)
            assert harness.output(out.rid) == expected
    assert (harness.scheduler.counters.num_preemptions > 0) == (seed >= 4)
    assert (first.refusals + second.refusals > 0) == bool(seed % 2)
    assert any(call.startswith("agree") for call in ranks.control.calls[0])
