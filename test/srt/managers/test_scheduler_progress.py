"""Progress of long prefills: what is logged, listed and sent, and how rarely."""

import logging

import pytest

from srt.managers.scheduler_harness import TURN_S, Harness, make_memory

CHUNK = 64
PROMPT = [i % 90 for i in range(200 * CHUNK)]


def make_harness(*, overlap: bool = False) -> Harness:
    memory = make_memory(page_size=16, segments=256)
    return Harness(memory, page_size=16, chunk_tokens=CHUNK, overlap=overlap)


def test_a_client_that_asked_is_told_now_and_then() -> None:
    harness = make_harness()
    harness.send("quiet", PROMPT[:CHUNK], 1)
    harness.send("r", PROMPT, 2, include_progress=True)
    harness.run()
    news = harness.channel.progress
    assert {state.rid for state in news} == {"r"}
    # 200 steps of 10 ms, told every 500 ms and never after the last token.
    assert 3 <= len(news) <= 5
    done = [state.done_tokens for state in news]
    assert done == sorted(set(done))
    assert all(0 < count < len(PROMPT) for count in done)
    assert all(state.total_tokens == len(PROMPT) for state in news)
    rate = CHUNK / TURN_S
    assert news[-1].tokens_per_s == pytest.approx(rate, rel=0.05)
    left = len(PROMPT) - news[-1].done_tokens
    assert news[-1].eta_s == pytest.approx(left / rate, rel=0.05)


def test_nobody_is_told_who_did_not_ask() -> None:
    harness = make_harness()
    harness.send("r", PROMPT, 2)
    harness.run()
    assert harness.channel.progress == []


def test_only_long_prefills_are_logged_and_rarely(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    harness = make_harness()
    harness.send("short", PROMPT[: 4 * CHUNK], 1)
    harness.run()
    assert "Prefill of" not in caplog.text
    harness.send("long", PROMPT, 1)
    for _ in range(100):
        harness.turn()
        harness.now += 0.2  # a slow step: 100 of them take 21 s
    lines = [line for line in caplog.messages if line.startswith("Prefill of long")]
    assert len(lines) == 4
    assert f"of {len(PROMPT)} tokens" in lines[0]
    assert "tokens/s, ETA" in lines[0]
    harness.run()
    assert "Prefill of long: all 12800 tokens in" in caplog.text


def test_server_info_lists_what_is_under_way() -> None:
    harness = make_harness(overlap=True)
    harness.send("r", PROMPT, 4)
    harness.turn(10)
    (listed,) = harness.control("server_info").data["requests"]
    prefill = listed["prefill"]
    assert 0 < prefill["done_tokens"] <= listed["computed_tokens"]
    assert prefill["total_tokens"] == len(PROMPT)
    assert prefill["tokens_per_s"] > 0
    assert prefill["eta_s"] > 0
    while not harness.output("r"):
        harness.turn()
    (listed,) = harness.control("server_info").data["requests"]
    assert listed["prefill"] is None


def test_an_aborted_prefill_is_forgotten() -> None:
    harness = make_harness()
    harness.send("r", PROMPT, 4)
    harness.turn(10)
    (req,) = harness.scheduler.requests()
    assert harness.scheduler.prefills.of(req) is not None
    harness.abort("r")
    harness.run()
    assert harness.scheduler.prefills.of(req) is None
