"""Decisions of the scheduler, as numbers in and numbers out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang.srt.errors import InvariantError
from sglang.srt.managers.io_struct import (
    FinishReason,
    TokenizedGenerateReqInput,
    int32_buffer,
)
from sglang.srt.managers.schedule_batch import CLIP_MAX_NEW_TOKENS, Req, ReqState, TokenSequence
from sglang.srt.managers.schedule_policy import (
    LPM_MAX_PASSED_OVER,
    ChunkSizer,
    choose_victim,
    order_waiting,
    pages_promised,
    share_chunk_tokens,
    share_whole_prompts,
    total_pages,
)
from sglang.srt.sampling.sampling_params import SamplingParams


def make_req(arrival: int = 0, prompt: int = 10, max_new: int = 8, **kwargs: object) -> Req:
    message = TokenizedGenerateReqInput(
        rid=f"r{arrival}",
        input_ids=memoryview(int32_buffer(np.arange(prompt))),
        sampling_params=SamplingParams(max_new_tokens=max_new),
        **kwargs,  # type: ignore[arg-type]
    )
    return Req(message, arrival, seed=0)


@dataclass
class FakeLease:
    num_cached_tokens: int = 0


class TestShares:
    def test_one_prompt_takes_the_budget_in_whole_pages(self) -> None:
        assert share_chunk_tokens([1000], 100, 16) == [96]

    def test_a_short_prompt_is_finished_beside_a_huge_one(self) -> None:
        assert share_chunk_tokens([10_000_000, 70], 512, 64) == [384, 70]

    def test_equal_prompts_get_equal_shares(self) -> None:
        assert share_chunk_tokens([5000, 5000, 5000, 5000], 1024, 64) == [256] * 4

    def test_more_prompts_than_pages_in_the_budget(self) -> None:
        assert share_chunk_tokens([500] * 5, 128, 64) == [64, 64, 0, 0, 0]

    @given(
        left=st.lists(st.integers(0, 5000), max_size=20),
        budget=st.integers(1, 4096),
        page=st.sampled_from([1, 16, 64]),
    )
    def test_budget_is_kept_and_used(self, left: list[int], budget: int, page: int) -> None:
        shares = share_chunk_tokens(left, budget, page)
        assert all(0 <= share <= rest for share, rest in zip(shares, left, strict=True))
        assert sum(shares) <= budget
        # Progress: when there is work and room for a page, somebody gets tokens.
        assert (sum(shares) > 0) == (sum(left) > 0)
        unfinished = [(s, r) for s, r in zip(shares, left, strict=True) if s < r]
        if all(rest == share for share, rest in zip(shares, left, strict=True)):
            assert sum(shares) == sum(left)
        else:
            # What is left over could not have given everyone unfinished another page.
            assert budget - sum(shares) < page * max(1, len(unfinished))


class TestOrder:
    def test_fcfs_is_arrival_order(self) -> None:
        reqs = [make_req(i) for i in range(3)]
        assert order_waiting(reqs, "fcfs", lambda req: 100 - req.arrival) == reqs

    def test_lpm_takes_the_longest_hit_first_and_breaks_ties_by_arrival(self) -> None:
        reqs = [make_req(i) for i in range(4)]
        hits = {0: 0, 1: 64, 2: 128, 3: 64}
        ordered = order_waiting(reqs, "lpm", lambda req: hits[req.arrival])
        assert [req.arrival for req in ordered] == [2, 1, 3, 0]

    def test_lpm_never_starves(self) -> None:
        reqs = [make_req(i) for i in range(2)]
        reqs[0].num_passed_over = LPM_MAX_PASSED_OVER
        ordered = order_waiting(reqs, "lpm", lambda req: 1000 * req.arrival)
        assert [req.arrival for req in ordered] == [0, 1]


class TestPromises:
    def test_the_last_token_needs_no_slot(self) -> None:
        req = make_req(prompt=60, max_new=5)  # 60 + 4 stored
        assert pages_promised(req, (0,), (0,), 64, (None,), full=False) == (1,)
        req = make_req(prompt=60, max_new=6)
        assert pages_promised(req, (0,), (0,), 64, (None,), full=False) == (2,)

    def test_held_pages_are_not_promised_again(self) -> None:
        req = make_req(prompt=640, max_new=1)
        assert pages_promised(req, (3,), (3,), 64, (None,), full=False) == (7,)

    def test_clipped_and_full(self) -> None:
        req = make_req(prompt=1, max_new=100_000)
        assert pages_promised(req, (0,), (0,), 1, (None,), full=False) == (CLIP_MAX_NEW_TOKENS,)
        assert pages_promised(req, (0,), (0,), 1, (None,), full=True) == (100_000,)

    def test_a_window_bounds_the_need(self) -> None:
        req = make_req(prompt=1000, max_new=1)
        assert pages_promised(req, (0, 0), (0, 0), 10, (None, 7), full=True) == (100, 7)

    def test_a_dropped_head_is_neither_held_nor_taken_again(self) -> None:
        req = make_req(prompt=1000, max_new=1)
        promised = partial(pages_promised, req, page_size=10, window_pages=(None, 7), full=True)
        assert promised(ends=(54, 54), held=(54, 4)) == (46, 3)
        assert promised(ends=(54, 54), held=(54, 1)) == (46, 6), "three are shared"
        assert promised(ends=(98, 98), held=(98, 4)) == (2, 2), "only two are to come"

    def test_promises_add_up_per_group(self) -> None:
        assert total_pages([], (60,)) == (60,)
        assert total_pages([(60,)], (60,)) == (120,)
        assert total_pages([(60, 1), (1, 1)], (40, 2)) == (101, 4)


class TestVictim:
    def running(self, *specs: tuple[int, int, ReqState]) -> list[Req]:
        reqs = []
        for arrival, computed, state in specs:
            req = make_req(arrival, prompt=1000)
            req.admit(FakeLease())  # type: ignore[arg-type]
            req.num_scheduled = computed
            if state is ReqState.DECODE:
                req.move(ReqState.DECODE)
            reqs.append(req)
        return reqs

    def test_nobody_alone(self) -> None:
        assert choose_victim(self.running((0, 5, ReqState.DECODE))) is None

    def test_never_the_oldest_though_it_is_cheapest(self) -> None:
        reqs = self.running((0, 1, ReqState.DECODE), (1, 900, ReqState.DECODE))
        assert choose_victim(reqs) is reqs[1]

    def test_fewest_computed_then_decode_then_newest(self) -> None:
        P, D = ReqState.PREFILL, ReqState.DECODE
        reqs = self.running((0, 1, D), (1, 50, D), (2, 40, P), (3, 40, D), (4, 40, D))
        assert choose_victim(reqs) is reqs[4]
        assert choose_victim(reqs[:3]) is reqs[2]

    def test_one_with_a_full_reservation_only_when_there_is_no_other(self) -> None:
        D = ReqState.DECODE
        reqs = self.running((0, 1, D), (1, 900, D), (2, 5, D))
        reqs[2].num_retractions = 2
        assert choose_victim(reqs) is reqs[1]
        assert choose_victim([reqs[0], reqs[2]]) is reqs[2]


class TestChunkSizer:
    def test_explicit_size_never_changes(self) -> None:
        sizer = ChunkSizer(2048, 64, 0.5, 1.0, adaptive=False)
        sizer.observe(2048, 100.0)
        assert sizer.next_budget(shared=True) == 2048

    def test_a_prompt_alone_takes_longer_steps_which_are_bounded_too(self) -> None:
        sizer = ChunkSizer(2048, 64, 0.5, 1.0, adaptive=True)
        assert sizer.next_budget(shared=True) == 2048
        sizer.observe(1000, 1.0)
        assert sizer.next_budget(shared=True) == 448  # 500 tokens, in pages
        assert sizer.next_budget(shared=False) == 960
        sizer.observe(10_000, 0.1)
        assert sizer.next_budget(shared=False) == 2048  # never above the chunk

    def test_steps_stay_near_the_target_as_tokens_get_dearer(self) -> None:
        sizer = ChunkSizer(2048, 64, 0.5, 1.0, adaptive=True)
        done, longest = 0, 0.0
        while done < 1_000_000:
            budget = sizer.next_budget(shared=False)
            seconds = budget * (1e-4 + 4e-9 * done)
            sizer.observe(budget, seconds)
            longest = max(longest, seconds)
            done += budget
        assert 0.9 < longest < 1.05

    def test_a_cheap_step_is_not_believed_at_once(self) -> None:
        sizer = ChunkSizer(1 << 20, 64, 0.5, 1.0, adaptive=True)
        sizer.observe(1000, 1.0)
        sizer.observe(1000, 0.1)
        assert sizer.next_budget(shared=False) < 4000
        for _ in range(20):
            sizer.observe(1000, 0.1)
        assert sizer.next_budget(shared=False) > 9000

    def test_a_small_quick_step_is_no_reason_to_shrink(self) -> None:
        sizer = ChunkSizer(2048, 64, 0.5, 1.0, adaptive=True)
        sizer.observe(32, 0.1)
        assert sizer.next_budget(shared=False) == 2048
        sizer.observe(1024, 1.0)
        sizer.observe(32, 0.1)
        assert sizer.next_budget(shared=False) == 1024

    def test_never_below_a_page(self) -> None:
        sizer = ChunkSizer(2048, 64, 0.5, 1.0, adaptive=True)
        sizer.observe(16, 1000.0)
        assert sizer.next_budget(shared=True) == 64


class TestReq:
    def test_illegal_edges_are_refused(self) -> None:
        req = make_req()
        with pytest.raises(InvariantError, match="cannot become decode"):
            req.move(ReqState.DECODE)
        with pytest.raises(InvariantError, match="cannot become finished"):
            req.move(ReqState.FINISHED)

    def test_the_first_reason_stands(self) -> None:
        req = make_req()
        assert req.finish(FinishReason("abort", message="first"))
        assert not req.finish(FinishReason("stop"))
        assert req.finish_reason is not None
        assert req.finish_reason.message == "first"
        assert req.state is ReqState.ABORTING

    def test_repr_is_its_state(self) -> None:
        assert repr(make_req(3)) == (
            "Req(r3 waiting prompt=10 out=0 scheduled=0 pending=0 inflight=0 retractions=0)"
        )

    def test_a_hit_leaves_the_row_whose_logits_are_wanted(self) -> None:
        assert make_req(prompt=10).max_prefix() == 9
        scored = make_req(prompt=10, return_logprob=True, logprob_start_len=4)
        assert scored.max_prefix() == 4

    @given(st.lists(st.integers(0, 2**31 - 1), max_size=300), st.integers(1, 4))
    def test_token_sequence_is_a_list(self, ids: list[int], room: int) -> None:
        split = len(ids) // 3
        tokens = TokenSequence(np.array(ids[:split], np.int32), room)
        for token in ids[split:]:
            tokens.append(token)
        assert tokens.view().tolist() == ids
        assert tokens.view(2, 5).tolist() == ids[2:5]
        assert len(tokens) == len(ids)


@pytest.mark.parametrize(
    ("left", "budget", "shares"),
    [
        ([], 10, []),
        ([4, 6, 1], 10, [4, 6, 0]),
        ([4, 7, 1], 10, [4, 0, 0]),
        ([40, 1], 10, [40, 0]),
        ([40, 1], 41, [40, 1]),
    ],
)
def test_whole_prompts_go_in_order_and_at_least_one_does(
    left: list[int], budget: int, shares: list[int]
) -> None:
    assert share_whole_prompts(left, budget) == shares
