"""The scheduler turn by turn: exact tokens, fairness, ends of every kind, overlap on and off."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sglang.srt.managers.io_struct import StopStringHit, int32_buffer
from sglang.srt.managers.schedule_batch import Req, ReqState
from sglang.srt.managers.scheduler_admission import Admission
from sglang.srt.mem_cache.allocation import KVLease
from srt.managers.scheduler_harness import Harness, expected_output, make_memory


@pytest.fixture(params=[True, False], ids=["overlap", "no-overlap"])
def overlap(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 900, length).tolist()


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_mixed_batch_gives_every_request_its_own_tokens(
    page_size: int, groups: int, overlap: bool
) -> None:
    memory = make_memory(page_size=page_size, groups=groups)
    harness = Harness(memory, page_size=page_size, overlap=overlap, chunk_tokens=max(32, page_size))
    prompts = {f"r{i}": prompt_of(3 + 41 * i, i) for i in range(7)}
    for rid, prompt in prompts.items():
        harness.send(rid, prompt, max_new=5 + len(prompt) % 7)
        harness.turn()
    harness.run()
    for rid, prompt in prompts.items():
        count = 5 + len(prompt) % 7
        assert harness.output(rid) == expected_output(prompt, count)
        assert harness.final(rid).type == "length"
        assert harness.final(rid).length == count
    memory.audit()


def test_a_long_prompt_stalls_neither_tokens_nor_first_tokens(overlap: bool) -> None:
    harness = Harness(make_memory(page_size=4), page_size=4, overlap=overlap, chunk_tokens=64)
    harness.send("talker", prompt_of(8), max_new=200)
    harness.turn(3)
    harness.send("huge", prompt_of(3000, 1), max_new=2)
    harness.turn(2)
    talked = len(harness.output("talker"))
    harness.send("short", prompt_of(12, 2), max_new=2)
    harness.turn(3)
    assert harness.output("short"), "a short prompt waits for one step, not for the huge one"
    assert not harness.output("huge")
    assert len(harness.output("talker")) - talked >= 2, "decoding goes on in every step"
    harness.run()
    assert harness.output("huge") == expected_output(prompt_of(3000, 1), 2)
    assert harness.worker.max_tokens_in_step <= 64 + 3


def test_a_prefix_is_shared_and_the_answer_is_the_same(overlap: bool) -> None:
    memory = make_memory(page_size=4)
    harness = Harness(memory, page_size=4, overlap=overlap)
    common = prompt_of(40)
    harness.send("first", [*common, 1, 2, 3], max_new=4)
    harness.run()
    harness.send("second", [*common, 9, 9], max_new=4)
    harness.send("other-tenant", [*common, 9, 9], max_new=4, extra_key="tenant")
    harness.run()
    cached = {out.rid: out.cached_tokens for out in harness.channel.outs}
    assert cached == {"first": 0, "second": 40, "other-tenant": 0}
    for rid, tail in (("first", [1, 2, 3]), ("second", [9, 9]), ("other-tenant", [9, 9])):
        assert harness.output(rid) == expected_output(common + tail, 4)


def test_a_requests_priority_reaches_the_cache(overlap: bool) -> None:
    memory = make_memory(page_size=4, eviction_policy="priority")
    harness = Harness(memory, page_size=4, overlap=overlap)
    prompts = {rid: prompt_of(40, seed) for seed, rid in enumerate(("low", "none", "high"))}
    for rid, priority in (("high", 5), ("none", 0), ("low", -5)):
        harness.send(rid, prompts[rid], max_new=2, priority=priority)
        harness.run()
    held = memory.cache.num_pages // 3
    for gone, kept in (("low", "none"), ("none", "high")):
        memory.cache.evict(held)
        tokens = {rid: np.array(prompts[rid], np.int32) for rid in (gone, kept)}
        assert memory.match_len(tokens[gone]) == 0
        assert memory.match_len(tokens[kept]) == 40
    memory.audit()


def test_a_running_prefill_is_shared(overlap: bool) -> None:
    harness = Harness(make_memory(page_size=4), page_size=4, overlap=overlap, chunk_tokens=32)
    long = prompt_of(400)
    harness.send("first", long, max_new=2)
    harness.turn(6)
    harness.send("second", long, max_new=2)
    harness.run()
    cached = {out.rid: out.cached_tokens for out in harness.channel.outs}
    assert cached["second"] >= 64
    assert harness.output("first") == harness.output("second") == expected_output(long, 2)


def test_a_stop_token_ends_and_what_overlap_computed_after_it_is_dropped(overlap: bool) -> None:
    memory = make_memory(page_size=4)
    harness = Harness(memory, page_size=4, overlap=overlap)
    prompt = prompt_of(10)
    tokens = expected_output(prompt, 6)
    stop = tokens[3]
    cut = tokens.index(stop) + 1
    harness.send("stops", prompt, max_new=50, params={"stop_token_ids": (stop,)})
    harness.send("goes on", prompt, 6, params={"stop_token_ids": (stop,), "ignore_eos": True})
    harness.run()
    assert harness.output("stops") == tokens[:cut]
    assert harness.final("stops").type == "stop"
    assert harness.final("stops").matched == stop
    assert harness.output("goes on") == tokens
    memory.audit()


def test_no_new_tokens_computes_the_prompt_only(overlap: bool) -> None:
    harness = Harness(make_memory(page_size=4), page_size=4, overlap=overlap)
    harness.send("zero", prompt_of(100), max_new=0)
    harness.run()
    assert harness.output("zero") == []
    assert harness.final("zero").type == "length"
    assert sum(sum(step) for step in harness.worker.steps) == 100


def test_the_context_length_ends_a_request(overlap: bool) -> None:
    harness = Harness(make_memory(page_size=4), page_size=4, overlap=overlap, context_length=32)
    harness.send("full", prompt_of(30), max_new=100)
    harness.send("too long", prompt_of(32), max_new=1)
    harness.run()
    assert harness.output("full") == expected_output(prompt_of(30), 2)
    assert harness.final("full").type == "length"
    refused = harness.final("too long")
    assert (refused.type, refused.status_code) == ("abort", 400)
    assert "32 tokens" in refused.message
    assert "31 tokens" in refused.message


def test_a_prompt_without_new_tokens_may_fill_the_context(overlap: bool) -> None:
    harness = Harness(make_memory(page_size=4), page_size=4, overlap=overlap, context_length=32)
    harness.send("fills it", prompt_of(32), max_new=0)
    harness.send("too long", prompt_of(33), max_new=0)
    harness.run()
    assert harness.final("fills it").type == "length"
    assert "32 tokens" in harness.final("too long").message
    harness.memory.audit()


def test_a_stop_string_hit_ends_a_request_once(overlap: bool) -> None:
    memory = make_memory(page_size=4)
    harness = Harness(memory, page_size=4, overlap=overlap)
    harness.send("hit", prompt_of(10), max_new=1000)
    harness.turn(5)
    harness.channel.inbox.append(StopStringHit("hit"))
    harness.channel.inbox.append(StopStringHit("hit"))
    harness.run()
    assert harness.final("hit").type == "stop"
    assert memory.memory_object()["pages"]["used"] == 0


@pytest.mark.parametrize("turns", range(8))
def test_an_abort_in_any_state_gives_everything_back(turns: int, overlap: bool) -> None:
    memory = make_memory(page_size=4)
    harness = Harness(memory, page_size=4, overlap=overlap, chunk_tokens=16, max_running_requests=2)
    harness.send("stays", prompt_of(20, 1), max_new=12)
    harness.send("goes", prompt_of(50), max_new=40)
    harness.send("waits", prompt_of(9), max_new=3)
    harness.turn(turns)
    harness.abort("goes")
    harness.abort("waits")
    harness.abort("never existed")
    harness.run()
    assert harness.output("stays") == expected_output(prompt_of(20, 1), 12)
    assert harness.final("goes").type == "abort"
    assert harness.final("waits").type == "abort"
    assert memory.memory_object()["pages"]["used"] == 0
    memory.audit()


def test_abort_all_and_flush(overlap: bool) -> None:
    memory = make_memory(page_size=4)
    harness = Harness(memory, page_size=4, overlap=overlap)
    for i in range(5):
        harness.send(f"r{i}", prompt_of(30, i), max_new=100)
    harness.turn(3)
    refused = harness.control("flush_cache")
    assert not refused.success
    assert "5 requests" in refused.message
    harness.abort(abort_all=True)
    harness.run()
    assert all(harness.final(f"r{i}").type == "abort" for i in range(5))
    assert memory.memory_object()["pages"]["cached"] > 0
    assert harness.control("flush_cache").success
    assert memory.memory_object()["pages"]["cached"] == 0
    harness.settle()
    harness.turn()
    assert memory.memory_object()["mapped_bytes"] == 0, "the idle state, without the idle time"
    assert harness.control("audit").success
    assert not harness.control("dance").success


def test_a_full_queue_refuses_with_503(overlap: bool) -> None:
    harness = Harness(
        make_memory(page_size=4),
        page_size=4,
        overlap=overlap,
        max_running_requests=1,
        max_queued_requests=2,
    )
    for i in range(4):
        harness.send(f"r{i}", prompt_of(5), max_new=3)
    harness.run()
    statuses = [harness.final(f"r{i}").status_code for i in range(4)]
    assert statuses == [0, 0, 503, 503]


def test_lpm_takes_the_cached_prompt_first() -> None:
    harness = Harness(make_memory(page_size=4), page_size=4, policy="lpm", max_running_requests=1)
    warm = prompt_of(64)
    harness.send("warm", warm, max_new=1)
    harness.run()
    harness.send("cold", prompt_of(64, 5), max_new=1)
    harness.send("hot", [*warm, 7], max_new=1)
    harness.run()
    order = [out.rid for out in harness.channel.outs if out.finish_reason is not None]
    assert order == ["warm", "hot", "cold"]


def test_internal_state_lists_requests_and_memory() -> None:
    harness = Harness(make_memory(page_size=4), page_size=4, context_length_requested=1 << 21)
    harness.send("one", prompt_of(9), max_new=100)
    harness.turn(3)
    state = harness.control("internal_state").data
    assert state["num_running_reqs"] == 1
    assert [entry["rid"] for entry in state["requests"]] == ["one"]
    assert state["requests"][0]["state"] == ReqState.DECODE.value
    memory = state["memory"]
    assert memory["context_length_requested"] == 1 << 21
    assert memory["context_length"] == 1 << 20
    assert memory["mapped_bytes"] > 0
    assert memory["pages"]["used"] > 0
    harness.abort(abort_all=True)
    harness.run()
    assert harness.control("internal_state").data["requests"] == []


def test_news_follow_the_stream_interval() -> None:
    harness = Harness(make_memory(page_size=4), page_size=4, stream_interval=4)
    harness.send("r", prompt_of(9), max_new=10)
    harness.run()
    sizes = [len(out.output_ids) // 4 for out in harness.channel.outs]
    assert sizes == [1, 4, 4, 1], "the first token at once, then every four, then the end"


def test_prompt_logprob_rows_cover_the_prompt_once_chunks_and_hits_included() -> None:
    harness = Harness(make_memory(page_size=4), page_size=4, chunk_tokens=16)
    prompt = prompt_of(50)
    harness.send("warm", prompt, max_new=1)
    harness.run()
    harness.send(
        "scored",
        prompt,
        max_new=2,
        return_logprob=True,
        logprob_start_len=9,
        token_ids_logprob=int32_buffer([5]),
    )
    harness.turn()
    (req,) = harness.scheduler.requests()
    assert req.num_cached_tokens == 9, "a hit stops where a row's logits are wanted"
    harness.run()
    first = next(out for out in harness.channel.outs if out.rid == "scored")
    assert first.input_logprobs is not None
    assert first.input_logprobs.num_rows == 1, "the stand-in worker adds no rows of its own"
    assert np.isnan(np.frombuffer(first.input_logprobs.logprobs, "<f4")).all()
    assert np.frombuffer(first.input_logprobs.token_ids, "<i4").tolist() == prompt[9:10]


def test_logits_that_are_no_numbers_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(make_memory(page_size=4), page_size=4)
    compute = harness.worker._forward

    def broken(*args: object) -> object:
        return replace(compute(*args), invalid_rows=(1,))  # type: ignore[arg-type]

    harness.worker._forward = broken  # type: ignore[method-assign, assignment]
    harness.send("fine", prompt_of(5), max_new=1)
    harness.send("odd", prompt_of(6), max_new=1)
    harness.run()
    (record,) = caplog.records
    assert "the logits of ['odd'] are not finite" in record.getMessage()


def test_a_burst_is_admitted_without_asking_all_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counting(self: Admission, req: Req, full: bool, lease: KVLease | None = None) -> Any:
        asked.append(req.rid)
        return promise(self, req, full, lease)

    promise = Admission._promise
    monkeypatch.setattr(Admission, "_promise", counting)
    harness = Harness(make_memory(page_size=4), page_size=4, chunk_tokens=1024)
    for number in range(50):
        harness.send(f"r{number}", prompt_of(4, number), max_new=1)
    harness.turn()
    assert harness.scheduler.num_running == 50
    assert len(asked) <= 2 * 50
    harness.run()
    harness.memory.audit()
