"""Asks a server for needles and notes what came back, how fast, and what memory it took.

A cell is one length and depth. By default every cell is a full prefill: the cache is flushed before
it, so its time to the first token owes nothing to another's prefix. A second request with the same
prompt then shows what a prefix hit takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from haystack.client import Answer, BackgroundClients, generate
from haystack.machine import MemoryPeak, watched_memory
from haystack.prompts import Ids, Prompt
from haystack.server import Server
from haystack.tasks import Task

# Rows that SGLang's request table has on a large GPU; a dense table has context x 4 bytes in each.
DENSE_TABLE_ROWS = 2048


@dataclass(frozen=True)
class KVCost:
    """Bytes per token of a server's KV memory, from its own report.

    `growing`: of the layers that keep every token, which one decode step reads in whole. `dense`:
    of all layers, were each to keep every token.
    """

    growing: int
    dense: int

    @classmethod
    def of(cls, info: dict[str, Any]) -> KVCost:
        groups = info["memory"]["groups"]
        full = [one["bytes_per_token"] for one in groups if one["kind"] == "full"]
        return cls(sum(full), sum(one["bytes_per_token"] for one in groups))


@dataclass(frozen=True)
class Settings:
    """How cells are measured.

    `shared`: all depths of a length ask one haystack that holds all needles, so only the first is a
    full prefill. `flush`: empty the cache before every cell (before every length when shared).
    `clients`: small clients that stream meanwhile.
    """

    body: str = "json"
    shared: bool = False
    flush: bool = True
    second: bool = True
    clients: int = 0


@dataclass(frozen=True)
class Cell:
    """What one length and depth gave. Bytes and seconds; None where it cannot be known."""

    length: int
    depth: float
    prompt_tokens: int
    needle_at: int
    expected: tuple[int, ...]
    got: tuple[int, ...]
    ttft_s: float
    cached_tokens: int
    decode_tokens_per_s: float | None
    read_bandwidth_bytes_per_s: float | None
    decode_bound_tokens_per_s: float | None
    second_ttft_s: float | None
    second_cached_tokens: int | None
    second_exact: bool | None
    mapped_bytes: int
    kv_bytes: int
    dense_kv_bytes: int
    dense_table_bytes: int
    peak: MemoryPeak
    clients: list[dict[str, Any]]

    @property
    def score(self) -> float:
        """Share of the answer's tokens that are right, each in its place."""
        right = sum(a == b for a, b in zip(self.expected, self.got, strict=False))
        return right / len(self.expected)

    @property
    def exact(self) -> bool:
        return self.got == self.expected

    @property
    def prefill_tokens_per_s(self) -> float:
        """Computed tokens of the prompt over the time to the first token."""
        return (self.prompt_tokens - self.cached_tokens) / self.ttft_s

    def as_dict(self) -> dict[str, Any]:
        share = None
        if self.decode_tokens_per_s and self.decode_bound_tokens_per_s:
            share = self.decode_tokens_per_s / self.decode_bound_tokens_per_s
        return {
            **asdict(self),
            "exact": self.exact,
            "score": self.score,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_share_of_bound": share,
        }


def measure_length(
    server: Server,
    task: Task,
    length: int,
    settings: Settings,
    bandwidth: Callable[[], float] | None,
) -> Iterator[Cell]:
    """The cells of one length, in the order of the task's depths.

    `bandwidth` measures the bytes per second that the machine reads, for the bound of decoding. It
    is asked before and after each answer, because shared machines change within a minute, and the
    larger figure counts. None: no bound.
    """
    prompts = task.shared_prompts(length) if settings.shared else task.prompts(length)
    for turn, (depth, prompt) in enumerate(zip(task.depths, prompts, strict=True)):
        if settings.flush and (turn == 0 or not settings.shared):
            server.flush_cache()
        yield _measure(server, task, length, depth, prompt, settings, bandwidth)


def _measure(
    server: Server,
    task: Task,
    length: int,
    depth: float,
    prompt: Prompt,
    settings: Settings,
    bandwidth: Callable[[], float] | None,
) -> Cell:
    fastest = bandwidth() if bandwidth else None
    wanted = len(prompt.answer)
    filler = task.haystack.tokens(32, task.seed + 1)
    second: Answer | None = None
    with watched_memory(server.pid) as peak:
        with_clients = _beside(server.url, settings.clients, filler)
        answer = generate(server.url, prompt.ids, wanted, settings.body)
        reports = [asdict(report) for report in with_clients.stop()]
        if settings.second:
            second = generate(server.url, prompt.ids, wanted, settings.body)
        info = server.info()
    cost, tokens = KVCost.of(info), len(prompt.ids)
    if bandwidth and fastest:
        fastest = max(fastest, bandwidth())
    bound = fastest / (cost.growing * tokens) if fastest and cost.growing else None
    return Cell(
        length=length,
        depth=depth,
        prompt_tokens=answer.prompt_tokens,
        needle_at=prompt.needle_at,
        expected=prompt.answer,
        got=answer.output_ids,
        ttft_s=answer.ttft_s,
        cached_tokens=answer.cached_tokens,
        decode_tokens_per_s=answer.decode_tokens_per_s,
        read_bandwidth_bytes_per_s=fastest,
        decode_bound_tokens_per_s=bound,
        second_ttft_s=second.ttft_s if second else None,
        second_cached_tokens=second.cached_tokens if second else None,
        second_exact=second.output_ids == prompt.answer if second else None,
        mapped_bytes=info["memory"]["mapped_bytes"],
        kv_bytes=cost.growing * tokens,
        dense_kv_bytes=cost.dense * tokens,
        dense_table_bytes=DENSE_TABLE_ROWS * 4 * int(info["max_req_input_len"]),
        peak=peak,
        clients=reports,
    )


def _beside(url: str, count: int, prompt_ids: Ids) -> BackgroundClients:
    clients = BackgroundClients(url, count, prompt_ids)
    clients.start()
    return clients


@dataclass(frozen=True)
class Prediction:
    """Seconds of a prefill as a + b n + c n^2, fitted to the shorter lengths of the same run."""

    coefficients: tuple[float, float, float]
    fitted: dict[int, float]
    predicted: dict[int, tuple[float, float]]  # length -> (measured, predicted)

    def as_dict(self) -> dict[str, Any]:
        return {
            "seconds_of_n": dict(zip(("1", "n", "n^2"), self.coefficients, strict=True)),
            "fitted": {str(n): seconds for n, seconds in self.fitted.items()},
            "predicted": {
                str(n): {"measured_s": real, "predicted_s": said, "ratio": real / said}
                for n, (real, said) in self.predicted.items()
            },
        }


def predict_quadratic(cells: Sequence[Cell], lengths: Sequence[int]) -> Prediction:
    """Compare the full prefills of `lengths` with what all shorter ones foretell.

    Each length counts with its median over depths; errors count relative to the time. Raises
    ValueError when fewer than three lengths are left to fit.
    """
    times: dict[int, float] = {}
    for length in sorted({cell.length for cell in cells}):
        full = [one.ttft_s for one in cells if one.length == length and not one.cached_tokens]
        if full:
            times[length] = float(np.median(full))
    fitted = {n: seconds for n, seconds in times.items() if n < min(lengths)}
    if len(fitted) < 3:
        raise ValueError("a quadratic needs three lengths below those that it predicts")
    count, seconds = np.array(list(fitted), float), np.array(list(fitted.values()))
    terms = np.stack([np.ones_like(count), count, count**2], axis=1)
    scale = terms.max(axis=0)
    found = np.linalg.lstsq(terms / scale / seconds[:, None], np.ones_like(seconds))[0] / scale
    predicted = {n: (times[n], float(np.polyval(found[::-1], n))) for n in lengths if n in times}
    a, b, c = found.tolist()
    return Prediction((a, b, c), fitted, predicted)
