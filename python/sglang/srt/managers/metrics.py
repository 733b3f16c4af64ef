"""Prometheus metrics under SGLang's names, in a registry of their own.

The HTTP doors report every sequence's life here; what only the scheduler knows is read from its
internal state when somebody scrapes. Made only under --enable-metrics; never touches the
process-wide default registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from sglang.srt.managers.generate_request import GenerateDelta

_FIRST_TOKEN_BUCKETS = (
    0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400, 1000, 4000,
)  # fmt: skip
_TOKEN_BUCKETS = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.2, 0.4, 0.6,
    0.8, 1, 2, 4, 6, 8,
)  # fmt: skip
_REQUEST_BUCKETS = (0.1, 0.2, 0.4, 0.8, 1, 2, 5, 10, 20, 40, 60, 100, 200, 400, 1000, 4000)

# Gauges of the scheduler: metric name -> (where in the internal state, description).
_STATE_GAUGES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "num_running_reqs": (("num_running_reqs",), "Requests that are being computed"),
    "num_queue_reqs": (("num_queue_reqs",), "Requests that wait"),
    "spec_accept_length": (("avg_spec_accept_length",), "Tokens of a step with a draft, mean"),
    "gen_throughput": (("last_gen_throughput",), "Generated tokens per second"),
    "max_total_num_tokens": (("memory", "capacity_tokens"), "Tokens that the KV budget can hold"),
    "context_len": (("memory", "context_length"), "Effective context length in tokens"),
    "page_size": (("memory", "page_size"), "Tokens in a page"),
    "kv_mapped_bytes": (("memory", "mapped_bytes"), "Bytes of mapped KV segments"),
    "kv_budget_bytes": (("memory", "budget_bytes"), "Bytes that the KV pool may use"),
    "kv_disk_bytes": (("memory", "disk_bytes"), "Bytes of KV segments on disk"),
    "kv_disk_budget_bytes": (("memory", "disk_budget_bytes"), "Bytes that they may take there"),
    "kv_host_bytes": (("memory", "host_bytes"), "Bytes of KV segments in the host's memory"),
    "kv_host_budget_bytes": (("memory", "host_budget_bytes"), "Bytes that they may take there"),
    "kv_reserved_bytes": (("memory", "reserved_bytes"), "Bytes of reserved address space"),
}
# Totals that the scheduler counts: they only grow, and are shown as counters.
_STATE_TOTALS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "num_retracted_requests": (("num_retracted_requests_total",), "Requests retracted"),
    "num_preempted_requests": (
        ("num_preempted_requests_total",),
        "Requests retracted for a more urgent one",
    ),
    "num_refused_requests": (("num_refused_requests_total",), "Requests refused on arrival"),
    "spec_drafted_tokens": (("num_drafted_tokens_total",), "Tokens drafted"),
    "spec_correct_tokens": (
        ("num_correct_drafted_tokens_total",),
        "Drafted tokens that the model took",
    ),
    "evicted_tokens": (("evicted_tokens_total",), "Cached tokens evicted"),
}


class ServerMetrics:
    """All metrics of one server; `render` gives the exposition text.

    Satisfies `SequenceObserver`. Every metric carries the label `model_name`; with several
    replicas, what is read from their schedulers carries `dp_rank` as well.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model_name: str, num_replicas: int = 1) -> None:
        self._registry = CollectorRegistry()
        self._labels = {"model_name": model_name}
        self._replicas: list[Mapping[str, str]] = (
            [{}] if num_replicas == 1 else [{"dp_rank": str(one)} for one in range(num_replicas)]
        )
        self._requests = self._counter("num_requests", "Requests received")
        self._aborted = self._counter("num_aborted_requests", "Requests that ended in an abort")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of ended requests")
        self._cached = self._counter("cached_tokens", "Prompt tokens found in the prefix cache")
        self._generated = self._counter("generation_tokens", "Tokens generated")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Time to the first token", _FIRST_TOKEN_BUCKETS
        )
        self._between = self._histogram(
            "inter_token_latency_seconds", "Time between tokens", _TOKEN_BUCKETS
        )
        self._whole = self._histogram(
            "e2e_request_latency_seconds", "Time from arrival to the last token", _REQUEST_BUCKETS
        )
        self._gauges = {name: self._gauge(name, text) for name, (_, text) in _STATE_GAUGES.items()}
        self._derived = {
            "num_used_tokens": self._gauge("num_used_tokens", "KV tokens of running requests"),
            "kv_used_tokens": self._gauge("kv_used_tokens", "KV tokens of running requests"),
            "kv_evictable_tokens": self._gauge("kv_evictable_tokens", "Cached KV tokens"),
            "kv_available_tokens": self._gauge("kv_available_tokens", "KV tokens still free"),
            "token_usage": self._gauge("token_usage", "Used share of the KV tokens"),
            "cache_hit_rate": self._gauge("cache_hit_rate", "Cached share of all prompt tokens"),
        }
        self._totals = {
            name: self._totals_of(name, text) for name, (_, text) in _STATE_TOTALS.items()
        }
        self._seen_totals = [dict.fromkeys(_STATE_TOTALS, 0.0) for _ in self._replicas]

    # ---- one sequence's life ----

    def started(self) -> None:
        """A sequence was sent off."""
        self._requests.inc()

    def news(self, delta: GenerateDelta, new_tokens: int, seconds_since_last: float) -> None:
        """A delta came; its seconds are shared among its tokens."""
        if new_tokens == 0:
            return
        self._generated.inc(new_tokens)
        if delta.completion_tokens == new_tokens:
            self._first_token.observe(seconds_since_last)
            return
        for _ in range(new_tokens):
            self._between.observe(seconds_since_last / new_tokens)

    def ended(self, last: GenerateDelta | None, seconds: float) -> None:
        """A sequence ended; `last` is None when it was given up before its end."""
        reason = last.finish_reason if last is not None else None
        if last is None or reason is None or reason.type == "abort":
            self._aborted.inc()
            return
        self._prompt.inc(last.prompt_tokens)
        self._cached.inc(last.cached_tokens)
        self._whole.observe(seconds)

    # ---- scraping ----

    def render(self, states: Sequence[Mapping[str, Any]]) -> bytes:
        """The exposition text; `states` are the replicas' internal states, none when unknown."""
        for replica, state in enumerate(states):
            self._take_state(replica, state)
        return generate_latest(self._registry)

    def _take_state(self, replica: int, state: Mapping[str, Any]) -> None:
        for name, (path, _) in _STATE_GAUGES.items():
            value = _number_at(state, path)
            if value is not None:
                self._gauges[name][replica].set(value)
        seen = self._seen_totals[replica]
        for name, (path, _) in _STATE_TOTALS.items():
            value = _number_at(state, path)
            if value is not None and value > seen[name]:
                self._totals[name][replica].inc(value - seen[name])
                seen[name] = value
        self._take_tokens(replica, state)

    def _take_tokens(self, replica: int, state: Mapping[str, Any]) -> None:
        page_size = _number_at(state, ("memory", "page_size")) or 0
        used = (_number_at(state, ("memory", "pages", "used")) or 0) * page_size
        cached = (_number_at(state, ("memory", "pages", "cached")) or 0) * page_size
        capacity = _number_at(state, ("memory", "capacity_tokens")) or 0
        prompt = _number_at(state, ("prompt_tokens_total",)) or 0
        hits = _number_at(state, ("cached_tokens_total",)) or 0
        values = {
            "num_used_tokens": used,
            "kv_used_tokens": used,
            "kv_evictable_tokens": cached,
            "kv_available_tokens": max(0, capacity - used - cached),
            "token_usage": used / capacity if capacity else 0,
            "cache_hit_rate": hits / prompt if prompt else 0,
        }
        for name, value in values.items():
            self._derived[name][replica].set(value)

    # ---- construction ----

    def _counter(self, name: str, text: str) -> Counter:
        metric = Counter(f"sglang:{name}", text, list(self._labels), registry=self._registry)
        return metric.labels(**self._labels)

    def _gauge(self, name: str, text: str) -> list[Gauge]:
        """One for each replica."""
        labels = [*self._labels, *self._replicas[0]]
        metric = Gauge(f"sglang:{name}", text, labels, registry=self._registry)
        return [metric.labels(**self._labels, **replica) for replica in self._replicas]

    def _totals_of(self, name: str, text: str) -> list[Counter]:
        """One for each replica."""
        labels = [*self._labels, *self._replicas[0]]
        metric = Counter(f"sglang:{name}", text, labels, registry=self._registry)
        return [metric.labels(**self._labels, **replica) for replica in self._replicas]

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(
            f"sglang:{name}", text, list(self._labels), buckets=buckets, registry=self._registry
        )
        return metric.labels(**self._labels)


def _number_at(state: Mapping[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = state
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
