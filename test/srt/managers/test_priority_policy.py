"""Who goes first and who gives way, as numbers in and numbers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, int32_buffer
from sglang.srt.managers.priority_policy import (
    LEAST_URGENT,
    PriorityRules,
    choose_displaced,
    plan_preemption,
)
from sglang.srt.managers.schedule_batch import RETRACTIONS_BEFORE_RESERVING, Req, ReqState
from sglang.srt.managers.schedule_policy import (
    LPM_MAX_PASSED_OVER,
    choose_victim,
    order_waiting,
    retraction_cost,
    service_key,
)
from sglang.srt.managers.scheduler_admission import WaitingQueue
from sglang.srt.managers.scheduler_setup import _priority_rules
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs


class FakeLease:
    num_cached_tokens = 0


def make_req(arrival: int, urgency: int | None = None, priority: int | None = None) -> Req:
    message = TokenizedGenerateReqInput(
        rid=f"r{arrival}",
        input_ids=memoryview(int32_buffer(np.arange(10))),
        sampling_params=SamplingParams(max_new_tokens=8),
        priority=priority,
    )
    return Req(message, arrival, seed=0, urgency=urgency)


def running(*specs: tuple[int, int, int]) -> list[Req]:
    """Decoding requests by (arrival, urgency, computed tokens)."""
    reqs = []
    for arrival, urgency, computed in specs:
        req = make_req(arrival, urgency)
        req.admit(FakeLease())  # type: ignore[arg-type]
        req.move(ReqState.DECODE)
        req.num_scheduled = computed
        reqs.append(req)
    return reqs


class TestUrgency:
    def test_high_values_first_unless_told_otherwise(self) -> None:
        assert PriorityRules().urgency(7) == 7
        assert PriorityRules(low_first=True).urgency(7) == -7

    @pytest.mark.parametrize("low_first", [False, True])
    def test_who_names_none_comes_after_all_who_do(self, low_first: bool) -> None:
        rules = PriorityRules(low_first=low_first)
        worst = min(rules.urgency(-(1 << 31)), rules.urgency(1 << 31))
        assert rules.urgency(None) == LEAST_URGENT < worst

    def test_a_default_is_as_if_it_was_named(self) -> None:
        assert PriorityRules(default=3).urgency(None) == 3
        assert PriorityRules(default=3, low_first=True).urgency(None) == -3

    def test_without_rules_all_are_equals_and_the_cache_gets_the_value(self) -> None:
        req = make_req(0, None, priority=5)
        assert (req.urgency, req.priority) == (0, 5)
        assert make_req(0, None, priority=None).priority == 0
        assert make_req(0, -5, priority=5).priority == -5, "the cache keeps what is urgent"


class TestOrder:
    def test_the_queue_is_by_urgency_and_equals_by_arrival(self) -> None:
        queue = WaitingQueue()
        reqs = [make_req(i, urgency) for i, urgency in enumerate((0, 5, -5, 5, 0))]
        for req in (reqs[i] for i in (4, 3, 2, 1, 0)):  # as retracted ones come back, in any order
            queue.add(req)
        assert [req.arrival for req in queue] == [1, 3, 0, 4, 2]
        queue.remove(reqs[0])
        assert [req.arrival for req in queue] == [1, 3, 4, 2]
        assert order_waiting(queue.view(), "fcfs", lambda req: 0) == list(queue)

    def test_lpm_orders_equals_only(self) -> None:
        reqs = sorted((make_req(i, i % 2) for i in range(6)), key=service_key)
        hits = {0: 0, 1: 0, 2: 64, 3: 64, 4: 128, 5: 128}
        ordered = order_waiting(reqs, "lpm", lambda req: hits[req.arrival])
        assert [req.arrival for req in ordered] == [5, 3, 1, 4, 2, 0]
        reqs[3].num_passed_over = LPM_MAX_PASSED_OVER  # the oldest of the less urgent
        ordered = order_waiting(reqs, "lpm", lambda req: hits[req.arrival])
        assert [req.arrival for req in ordered] == [5, 3, 1, 0, 4, 2]


class TestVictim:
    def test_the_least_urgent_first_whatever_it_computed(self) -> None:
        reqs = running((0, 5, 1), (1, 0, 900), (2, 5, 2))
        assert choose_victim(reqs) is reqs[1]

    def test_never_the_oldest_of_the_most_urgent(self) -> None:
        reqs = running((0, 0, 1), (1, 5, 1), (2, 5, 900))
        assert choose_victim(reqs[1:]) is reqs[2]
        assert choose_victim([reqs[0], reqs[1]]) is reqs[0], "it is older, but less urgent"

    def test_among_equals_a_reservation_counts_before_tokens(self) -> None:
        reqs = running((0, 9, 1), (1, 0, 900), (2, 0, 5))
        reqs[2].num_retractions = RETRACTIONS_BEFORE_RESERVING
        assert choose_victim(reqs) is reqs[1]
        reqs[2].num_forced_retractions = 1  # one of them was not its own
        assert choose_victim(reqs) is reqs[2]


class TestPreemptible:
    def test_the_threshold_is_the_least_difference(self) -> None:
        reqs = running((0, 0, 1), (1, 5, 1), (2, 10, 1))
        assert PriorityRules(threshold=10).preemptible(reqs, 15) == reqs[:2]
        assert PriorityRules(threshold=5).preemptible(reqs, 15) == reqs
        assert PriorityRules(threshold=16).preemptible(reqs, 15) == []

    def test_equals_never(self) -> None:
        reqs = running((0, 5, 1), (1, 4, 1))
        assert PriorityRules(threshold=0).preemptible(reqs, 5) == reqs[1:]

    def test_nobody_when_it_is_switched_off(self) -> None:
        assert PriorityRules(threshold=None).preemptible(running((0, 0, 1)), 100) == []


def needs(pages: int, sizes: dict[int, int]) -> Callable[[Sequence[Req]], bool]:
    """Fits when those that go have `pages` together; `sizes` by arrival."""
    return lambda gone: sum(sizes[req.arrival] for req in gone) >= pages


class TestPlan:
    def test_the_fewest_tokens_to_compute_again_go_first(self) -> None:
        reqs = running((0, 0, 50), (1, 0, 10), (2, 0, 30))
        assert plan_preemption(reqs, needs(1, {0: 1, 1: 1, 2: 1})) == [reqs[1]]
        assert plan_preemption(reqs, needs(2, {0: 1, 1: 1, 2: 1})) == [reqs[1], reqs[2]]

    def test_the_least_urgent_before_the_cheapest(self) -> None:
        reqs = running((0, 1, 1), (1, 0, 900))
        assert plan_preemption(reqs, needs(1, {0: 1, 1: 1})) == [reqs[1]]

    def test_nobody_goes_when_all_would_not_make_room(self) -> None:
        reqs = running((0, 0, 1), (1, 0, 1))
        assert plan_preemption(reqs, needs(3, {0: 1, 1: 1})) == []
        assert plan_preemption([], needs(0, {})) == []

    def test_nobody_goes_in_vain(self) -> None:
        reqs = running((0, 0, 10), (1, 0, 20), (2, 0, 30))
        assert plan_preemption(reqs, needs(5, {0: 1, 1: 2, 2: 5})) == [reqs[2]]

    def test_nobody_goes_when_it_fits_anyhow(self) -> None:
        assert plan_preemption(running((0, 0, 1)), lambda gone: True) == []

    @given(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 6)), max_size=6),
        st.integers(1, 20),
    )
    def test_a_plan_fits_and_nobody_in_it_could_stay(
        self, specs: list[tuple[int, int, int]], pages: int
    ) -> None:
        reqs = running(*((i, urgency, cost) for i, (urgency, cost, _) in enumerate(specs)))
        fits = needs(pages, {i: size for i, (*_, size) in enumerate(specs)})
        plan = plan_preemption(reqs, fits)
        assert bool(plan) == fits(reqs)
        assert plan == sorted(plan, key=retraction_cost)
        for req in plan:
            assert not fits([other for other in plan if other is not req])


class TestDisplaced:
    def test_the_least_urgent_and_the_newest_of_them(self) -> None:
        reqs = [make_req(i, urgency) for i, urgency in enumerate((5, 0, 0, 9))]
        assert choose_displaced(reqs, 6) is reqs[2]
        assert choose_displaced(reqs, 0) is None, "equals stay"
        assert choose_displaced([], 6) is None

    def test_one_that_has_computed_something_after_its_equals(self) -> None:
        reqs = [make_req(0, 0), make_req(1, 1), *running((2, 0, 4))]
        reqs[2].retract(forced=True)
        assert choose_displaced(reqs, 6) is reqs[0]
        assert choose_displaced(reqs[1:], 6) is reqs[2], "but before the more urgent"


class TestFlags:
    def rules(self, **flags: object) -> PriorityRules | None:
        return _priority_rules(ServerArgs.from_kwargs(model_path="m", device="cpu", **flags))

    def test_off_unless_enabled(self) -> None:
        assert self.rules(abort_on_priority_when_disabled=True) is None

    def test_each_flag_is_a_rule(self) -> None:
        assert self.rules(enable_priority_scheduling=True) == PriorityRules(False, None, 10)
        rules = self.rules(
            enable_priority_scheduling=True,
            schedule_low_priority_values_first=True,
            default_priority_value=-4,
            priority_scheduling_preemption_threshold=3,
        )
        assert rules == PriorityRules(low_first=True, default=-4, threshold=3)
        rules = self.rules(enable_priority_scheduling=True, disable_priority_preemption=True)
        assert rules == PriorityRules(threshold=None)
