"""The figures of a serving benchmark, from what its requests saw. Pure.

Names are those of the JSON lines that SGLang's benchmark writes, so that scripts which read those
read these; definitions are in docs/bench_serving.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(slots=True)
class Outcome:
    """What became of one request, filled in as its answer comes.

    Times are in seconds; `began` counts from the start of the run. `itls` are the gaps between
    tokens after the first: a piece of several tokens shares its gap among them. `error` None: it
    succeeded. `output_len` is what the server counted.
    """

    prompt_len: int
    began: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    itls: list[float] = field(default_factory=list)
    output_len: int = 0
    text: str = ""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class MemoryLook:
    """One look at a server's KV memory, in bytes; `at` in seconds from the start of the run."""

    at: float
    mapped_bytes: int
    budget_bytes: int


def serving_figures(
    outcomes: Sequence[Outcome], duration: float, retokenized: Sequence[int] | None
) -> dict[str, Any]:
    """All figures of a run of `duration` seconds; times in milliseconds.

    Only requests that succeeded count. `retokenized`: the tokens of each outcome's text by the
    client's own tokenizer, None where it has none. What nothing was measured of is 0.
    """
    good = [one for one in outcomes if one.error is None]
    inputs, outputs = sum(one.prompt_len for one in good), sum(one.output_len for one in good)
    again = None
    if retokenized is not None:
        again = sum(n for n, one in zip(retokenized, outcomes, strict=True) if one.error is None)
    latencies = [one.latency for one in good]
    streamed = [one for one in good if one.output_len > 1]
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_output_tokens_retokenized": again,
        "request_throughput": len(good) / duration,
        "input_throughput": inputs / duration,
        "output_throughput": outputs / duration,
        "total_throughput": (inputs + outputs) / duration,
        "concurrency": sum(latencies) / duration,
        "max_concurrent_requests": _most_at_once(good),
    }
    figures |= _spread("e2e_latency_ms", latencies, ("mean", "median", "std", "p90", "p99"))
    figures |= _spread("ttft_ms", [one.ttft for one in good])
    figures |= _spread(
        "tpot_ms", [(one.latency - one.ttft) / (one.output_len - 1) for one in streamed]
    )
    gaps = [gap for one in good for gap in one.itls]
    figures |= _spread("itl_ms", gaps, ("mean", "median", "std", "p95", "p99", "max"))
    return figures


def memory_figures(looks: Sequence[MemoryLook]) -> dict[str, int | float] | None:
    """KV memory over a run: what was mapped before, at most, on average and at its end.

    The average is over time, each look standing until the next. None: the server has none to show.
    """
    if not looks:
        return None
    times = np.array([look.at for look in looks])
    mapped = np.array([look.mapped_bytes for look in looks], np.float64)
    spans = np.diff(times)
    mean = float(np.average(mapped[:-1], weights=spans)) if spans.sum() > 0 else float(mapped[0])
    return {
        "budget_bytes": looks[-1].budget_bytes,
        "mapped_bytes_before": looks[0].mapped_bytes,
        "mapped_bytes_max": int(mapped.max()),
        "mapped_bytes_mean": mean,
        "mapped_bytes_after": looks[-1].mapped_bytes,
        "num_looks": len(looks),
    }


_SPREADS = ("mean", "median", "std", "p99")


def _spread(
    name: str, seconds: Sequence[float], kinds: Sequence[str] = _SPREADS
) -> dict[str, float]:
    values = np.asarray(seconds if len(seconds) else [0.0]) * 1e3
    return {f"{kind}_{name}": _statistic(kind, values) for kind in kinds}


def _statistic(kind: str, values: npt.NDArray[np.float64]) -> float:
    if kind in ("mean", "std", "max"):
        return float(getattr(values, kind)())
    return float(np.percentile(values, 50 if kind == "median" else int(kind[1:])))


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were under way at a time."""
    edges = [(one.began, 1) for one in outcomes]
    edges += [(one.began + one.latency, -1) for one in outcomes]
    most = now = 0
    for _, change in sorted(edges):
        now += change
        most = max(most, now)
    return most


_TABLE: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...] = (
    (
        "",
        (
            ("Successful requests", "completed", "d"),
            ("Failed requests", "failed", "d"),
            ("Benchmark duration (s)", "duration", ".2f"),
            ("Total input tokens", "total_input_tokens", "d"),
            ("Total generated tokens", "total_output_tokens", "d"),
            ("Total generated tokens (retokenized)", "total_output_tokens_retokenized", "d"),
            ("Request throughput (req/s)", "request_throughput", ".2f"),
            ("Input token throughput (tok/s)", "input_throughput", ".2f"),
            ("Output token throughput (tok/s)", "output_throughput", ".2f"),
            ("Total token throughput (tok/s)", "total_throughput", ".2f"),
            ("Concurrency", "concurrency", ".2f"),
            ("Peak concurrent requests", "max_concurrent_requests", "d"),
            ("Accept length", "accept_length", ".2f"),
        ),
    ),
    (
        "End-to-End Latency",
        (
            ("Mean E2E Latency (ms)", "mean_e2e_latency_ms", ".2f"),
            ("Median E2E Latency (ms)", "median_e2e_latency_ms", ".2f"),
            ("P90 E2E Latency (ms)", "p90_e2e_latency_ms", ".2f"),
            ("P99 E2E Latency (ms)", "p99_e2e_latency_ms", ".2f"),
        ),
    ),
    (
        "Time to First Token",
        (
            ("Mean TTFT (ms)", "mean_ttft_ms", ".2f"),
            ("Median TTFT (ms)", "median_ttft_ms", ".2f"),
            ("P99 TTFT (ms)", "p99_ttft_ms", ".2f"),
        ),
    ),
    (
        "Time per Output Token (excl. 1st token)",
        (
            ("Mean TPOT (ms)", "mean_tpot_ms", ".2f"),
            ("Median TPOT (ms)", "median_tpot_ms", ".2f"),
            ("P99 TPOT (ms)", "p99_tpot_ms", ".2f"),
        ),
    ),
    (
        "Inter-Token Latency",
        (
            ("Mean ITL (ms)", "mean_itl_ms", ".2f"),
            ("Median ITL (ms)", "median_itl_ms", ".2f"),
            ("P95 ITL (ms)", "p95_itl_ms", ".2f"),
            ("P99 ITL (ms)", "p99_itl_ms", ".2f"),
            ("Max ITL (ms)", "max_itl_ms", ".2f"),
        ),
    ),
)
_WIDTH, _LABEL = 50, 40
_MIB = 1 << 20


def render(figures: Mapping[str, Any], settings: Sequence[tuple[str, str]]) -> str:
    """The figures for people, below the `settings` that they were measured under."""
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
    lines += [_line(label, value) for label, value in settings]
    for title, rows in _TABLE:
        if title:
            lines.append(title.center(_WIDTH, "-"))
        for label, name, form in rows:
            if figures.get(name) is not None:
                lines.append(_line(label, format(figures[name], form)))
    memory = figures.get("memory")
    if memory is not None:
        lines.append("KV Memory".center(_WIDTH, "-"))
        for label, name in (
            ("Budget (MiB)", "budget_bytes"),
            ("Mapped before (MiB)", "mapped_bytes_before"),
            ("Mapped at most (MiB)", "mapped_bytes_max"),
            ("Mapped on average (MiB)", "mapped_bytes_mean"),
            ("Mapped at the end (MiB)", "mapped_bytes_after"),
        ):
            lines.append(_line(label, format(memory[name] / _MIB, ".1f")))
    return "\n".join([*lines, "=" * _WIDTH])


def _line(label: str, value: str) -> str:
    return f"{label + ':':<{_LABEL}} {value}"
