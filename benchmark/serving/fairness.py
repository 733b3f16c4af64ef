"""What short requests feel of one long prompt that is computed beside them.

    PYTHONPATH=python:benchmark/memory python benchmark/serving/fairness.py [--model-path MODEL]

Starts a server and lets `--clients` clients stream short answers one after another, first on the
idle server, then while a prompt of `--long-tokens` tokens is computed. Prints JSON: time to the
first token and longest gap between two tokens of each phase, their ratios, and what the long
prompt took alone and beside the others. Rounds with and without the long prompt take turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench_common import demo_model, describe_machine
from bench_server import Server, running


@dataclass
class Felt:
    """Seconds that clients waited: for first tokens, and the longest gap of each answer."""

    ttft_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)

    def note(self, began: float, times: list[float]) -> None:
        self.ttft_s.append(times[0] - began)
        self.gap_s.append(max((b - a for a, b in itertools.pairwise(times)), default=0.0))

    def as_dict(self) -> dict[str, Any]:
        return {
            "answers": len(self.ttft_s),
            "ttft_median_s": round(statistics.median(self.ttft_s), 4),
            "ttft_longest_s": round(max(self.ttft_s), 4),
            "gap_median_s": round(statistics.median(self.gap_s), 4),
            "gap_longest_s": round(max(self.gap_s), 4),
        }


def token_times(server: Server, ids: list[int], new_tokens: int) -> tuple[float, list[float]]:
    """When a request was sent and when each piece of its answer came."""
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"input_ids": ids, "stream": True, "sampling_params": params}
    times = []
    began = time.perf_counter()
    with server.post("/generate", body) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    return began, times


def client(server: Server, settings: argparse.Namespace, seed: int, stop: threading.Event) -> Felt:
    """Ask for short answers, one after another, until `stop`."""
    rng = np.random.default_rng(seed)
    felt = Felt()
    while not stop.is_set():
        ids = rng.integers(10, settings.vocab, settings.short_tokens).tolist()
        felt.note(*token_times(server, ids, settings.new_tokens))
    return felt


def one_round(
    server: Server, settings: argparse.Namespace, seed: int, felt: Felt, busy: bool
) -> float:
    """Seconds of the long prompt (of the idle phase when not `busy`); fills `felt`."""
    stop = threading.Event()
    ids = np.random.default_rng(seed).integers(10, settings.vocab, settings.long_tokens).tolist()
    with ThreadPoolExecutor(settings.clients) as pool:
        seeds = range(100 * seed, 100 * seed + settings.clients)
        asked = [pool.submit(client, server, settings, one, stop) for one in seeds]
        began = time.perf_counter()
        try:
            if busy:
                began, times = token_times(server, ids, 1)
                seconds = times[0] - began
            else:
                time.sleep(settings.idle_seconds)
                seconds = time.perf_counter() - began
        finally:
            stop.set()
        for future in asked:
            got = future.result()
            felt.ttft_s += got.ttft_s
            felt.gap_s += got.gap_s
    server.flush()
    return seconds


def alone(server: Server, settings: argparse.Namespace, seed: int) -> float:
    """Seconds of the long prompt on the idle server."""
    ids = np.random.default_rng(seed).integers(10, settings.vocab, settings.long_tokens).tolist()
    began, times = token_times(server, ids, 1)
    server.flush()
    return times[0] - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", default="", help="default: the demo model")
    parser.add_argument("--long-tokens", type=int, default=6000)
    parser.add_argument("--short-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle-seconds", type=float, default=10.0)
    parser.add_argument("--vocab", type=int, default=40_000, help="ids are drawn below it")
    parser.add_argument("--server-flag", action="append", default=[], metavar="FLAG=VALUE")
    settings = parser.parse_args()
    model = settings.model_path or demo_model()
    idle, busy = Felt(), Felt()
    alone_s, beside_s = [], []
    flags = ["--model-path", model, "--log-level", "error", *settings.server_flag]
    with running(*flags) as server:
        one_round(
            server, argparse.Namespace(**{**vars(settings), "idle_seconds": 1}), 0, Felt(), False
        )
        for seed in range(1, settings.rounds + 1):
            one_round(server, settings, 2 * seed, idle, busy=False)
            alone_s.append(alone(server, settings, 1000 + seed))
            beside_s.append(one_round(server, settings, 2 * seed + 1, busy, busy=True))
    values = {**vars(settings), "model_path": model.rpartition("/")[2]}
    quiet, felt = idle.as_dict(), busy.as_dict()
    names = [name for name in quiet if name.endswith("_s")]
    result = {
        "benchmark": "fairness",
        "settings": values,
        "machine": describe_machine(),
        "idle": quiet,
        "beside_long_prompt": felt,
        "ratios": {name[:-2]: round(felt[name] / quiet[name], 2) for name in names if quiet[name]},
        "long_prompt_alone_s": round(statistics.median(alone_s), 3),
        "long_prompt_beside_others_s": round(statistics.median(beside_s), 3),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
