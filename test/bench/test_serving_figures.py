"""Figures of a serving benchmark, computed by hand for a few requests."""

from __future__ import annotations

import pytest

from sglang.bench.serving_figures import (
    MemoryLook,
    Outcome,
    memory_figures,
    render,
    serving_figures,
)

GOOD = [
    Outcome(10, began=0.0, ttft=0.1, latency=0.5, itls=[0.1, 0.3], output_len=3, text="abc"),
    Outcome(20, began=0.4, ttft=0.2, latency=0.2, output_len=1, text="d"),
    Outcome(30, began=1.0, ttft=0.3, latency=1.0, itls=[0.7], output_len=2, text="ef"),
]
BAD = Outcome(1000, began=0.0, latency=9.0, error="503: full", output_len=50)


def test_rates_and_latencies() -> None:
    figures = serving_figures([*GOOD, BAD], 2.0, [4, 1, 2, 99])
    assert (figures["completed"], figures["failed"]) == (3, 1)
    assert figures["total_input_tokens"] == 60
    assert figures["total_output_tokens"] == 6
    assert figures["total_output_tokens_retokenized"] == 7
    assert figures["request_throughput"] == 1.5
    assert figures["input_throughput"] == 30
    assert figures["output_throughput"] == 3
    assert figures["total_throughput"] == 33
    assert figures["concurrency"] == pytest.approx(0.85)
    assert figures["max_concurrent_requests"] == 2
    assert figures["median_e2e_latency_ms"] == pytest.approx(500)
    assert figures["mean_e2e_latency_ms"] == pytest.approx(1700 / 3)
    assert figures["p90_e2e_latency_ms"] == pytest.approx(900)
    assert figures["median_ttft_ms"] == pytest.approx(200)
    assert figures["std_ttft_ms"] == pytest.approx(100 * (2 / 3) ** 0.5)
    # (0.5 - 0.1) / 2 and (1.0 - 0.3) / 1; one token has no time after it
    assert figures["mean_tpot_ms"] == pytest.approx((200 + 700) / 2)
    assert figures["mean_itl_ms"] == pytest.approx(1100 / 3)
    assert figures["max_itl_ms"] == pytest.approx(700)
    assert figures["p95_itl_ms"] == pytest.approx(660)


def test_nothing_measured_is_zero() -> None:
    figures = serving_figures([BAD], 2.0, None)
    assert figures["completed"] == 0
    assert figures["total_output_tokens_retokenized"] is None
    assert figures["mean_ttft_ms"] == figures["max_itl_ms"] == figures["concurrency"] == 0
    assert figures["max_concurrent_requests"] == 0


def test_memory_is_averaged_over_time() -> None:
    looks = [MemoryLook(0, 100, 900), MemoryLook(3, 500, 900), MemoryLook(4, 200, 800)]
    assert memory_figures(looks) == {
        "budget_bytes": 800,
        "mapped_bytes_before": 100,
        "mapped_bytes_max": 500,
        "mapped_bytes_mean": (3 * 100 + 1 * 500) / 4,
        "mapped_bytes_after": 200,
        "num_looks": 3,
    }
    assert memory_figures([]) is None
    alone = memory_figures(looks[:1])
    assert alone is not None
    assert alone["mapped_bytes_mean"] == 100


def test_the_table_leaves_out_what_was_not_measured() -> None:
    figures = serving_figures(GOOD, 2.0, None) | {"accept_length": None, "memory": None}
    lines = render(figures, [("Backend", "sglang")]).splitlines()
    assert lines[1] == "Backend:                                 sglang"
    assert "Request throughput (req/s):              1.50" in lines
    assert "P99 ITL (ms):                            692.00" in lines
    assert not any("retokenized" in line or "Accept" in line or "KV" in line for line in lines)
    figures |= {
        "accept_length": 1.5,
        "memory": memory_figures([MemoryLook(0, 1 << 20, 1 << 22)]),
    }
    lines = render(figures, []).splitlines()
    assert "Accept length:                           1.50" in lines
    assert "Mapped at most (MiB):                    1.0" in lines
