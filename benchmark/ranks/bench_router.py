"""Two of our servers behind sglang-router: what its cache-aware policy gains over taking turns.

    PYTHONPATH=python:benchmark/memory python benchmark/ranks/bench_router.py \
        --model-path MODEL.gguf --router-python /tmp/venv-router/bin/python --markdown

Prompts of several tenants, each with a long beginning of its own, come in random order through
the router. Policies are measured in turns (A B A B ...) on the same two servers, whose caches are
emptied before every round: the share of prompt tokens that were cached, and tokens per second.
At the end one server is killed in mid-load; it is counted whose requests failed and how long the
router took to mark it. The package sglang-router may live in an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bench_server import Server
from sglang.srt.utils.network import get_free_port

POLICIES = ("round_robin", "cache_aware")
START_TIMEOUT_S = 60.0
WORDS = ("river", "stone", "lantern", "harbour", "winter", "copper", "meadow", "signal", "orchard")


@dataclass(frozen=True)
class Load:
    """What is sent: `tenants` beginnings of `prefix_words`, `per_tenant` requests each."""

    tenants: int = 12
    per_tenant: int = 8
    prefix_words: int = 450
    new_tokens: int = 8
    at_once: int = 8

    def prompts(self, seed: int) -> list[str]:
        """All prompts of a round in random order; other seeds give other texts."""
        chance = random.Random(seed)
        prompts = []
        for tenant in range(self.tenants):
            words = [f"Tenant {seed}-{tenant}.", *chance.choices(WORDS, k=self.prefix_words)]
            prompts += [
                f"{' '.join(words)} Question {chance.randrange(10**6)}: what follows?"
                for _ in range(self.per_tenant)
            ]
        chance.shuffle(prompts)
        return prompts


@dataclass(frozen=True)
class Round:
    """One round of a policy."""

    policy: str
    hit_rate: float
    tokens_per_s: float
    seconds: float


def post(url: str, body: object, timeout_s: float = 300.0) -> dict[str, Any]:
    """Send JSON, read JSON. Raises OSError for any status but 200."""
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


@contextlib.contextmanager
def router(python: str, workers: Sequence[str], policy: str) -> Iterator[str]:
    """A router that knows all its workers; gives its URL."""
    port = get_free_port()
    command = [python, "-m", "sglang_router.launch_router", "--worker-urls", *workers]
    command += ["--host", "127.0.0.1", "--port", str(port), "--policy", policy]
    command += ["--prometheus-port", str(get_free_port()), "--log-level", "error"]
    command += ["--health-check-interval-secs", "2", "--health-failure-threshold", "1"]
    command += ["--cb-failure-threshold", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(healthy_workers(url)) < len(workers):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the router did not start ({process.poll()})")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def healthy_workers(url: str) -> list[str]:
    """The servers that a router sends requests to; none while it starts."""
    try:
        with urllib.request.urlopen(f"{url}/workers", timeout=5) as reply:
            workers = json.load(reply)["workers"]
    except OSError:
        return []
    return [worker["url"] for worker in workers if worker["is_healthy"]]


def ask(url: str, prompt: str, new_tokens: int) -> dict[str, Any]:
    params = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    info: dict[str, Any] = post(f"{url}/generate", {"text": prompt, "sampling_params": params})[
        "meta_info"
    ]
    return info


def measure(url: str, policy: str, load: Load, seed: int) -> Round:
    """Send a round's prompts through the router at `url`."""
    began = time.perf_counter()
    with ThreadPoolExecutor(load.at_once) as threads:
        infos = list(threads.map(lambda text: ask(url, text, load.new_tokens), load.prompts(seed)))
    seconds = time.perf_counter() - began
    prompt, cached, new = (
        sum(info[name] for info in infos)
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
    )
    return Round(policy, cached / prompt, (prompt + new) / seconds, seconds)


def kill_in_mid_load(
    python: str, servers: Sequence[Server], policy: str, load: Load
) -> dict[str, Any]:
    """Kill the second server while requests run; tells what became of them and when it was marked.

    A request that the dead server was computing fails or is sent again by the router; all that
    come later have to be answered.
    """
    urls = [server.url for server in servers]
    failures: list[str] = []
    killed_at: list[float] = []

    def one(prompt: str) -> bool:
        began = time.monotonic()
        try:
            ask(url, prompt, load.new_tokens)
        except OSError as error:
            after = "after" if killed_at and began > killed_at[0] else "before"
            failures.append(f"{error}, sent {after} the kill")
            return False
        return True

    with router(python, urls, policy) as url, ThreadPoolExecutor(load.at_once) as threads:
        prompts = load.prompts(99)
        runs = [threads.submit(one, prompt) for prompt in prompts]
        while sum(run.done() for run in runs) < len(runs) // 4:
            time.sleep(0.02)
        killed_at.append(time.monotonic())
        servers[1].process.kill()
        while healthy_workers(url) != urls[:1]:
            if time.monotonic() > killed_at[0] + START_TIMEOUT_S:
                break
            time.sleep(0.05)
        marked_s = time.monotonic() - killed_at[0]
        answered = sum(run.result() for run in runs)
        left = healthy_workers(url)
    return {
        "requests": len(prompts),
        "answered": answered,
        "failed": failures,
        "marked_after_s": round(marked_s, 2),
        "others_marked_healthy": left == urls[:1],
    }


def run(args: argparse.Namespace, load: Load) -> dict[str, Any]:
    flags = ("--model-path", args.model_path, "--cpu-threads", "1", "--log-level", "error")
    servers = [Server(*flags) for _ in range(2)]
    try:
        for server in servers:
            server.wait_ready()
        urls = [server.url for server in servers]
        rounds = []
        for number in range(args.rounds):
            for policy in POLICIES:
                for server in servers:
                    server.flush()
                with router(args.router_python, urls, policy) as url:
                    rounds.append(measure(url, policy, load, number))
        killed = kill_in_mid_load(args.router_python, servers, POLICIES[1], load)
    finally:
        for server in servers:
            server.close()
    return {
        "benchmark": "router",
        "settings": vars(load),
        "rounds": [vars(one) for one in rounds],
        "medians": {
            policy: {
                name: statistics.median(getattr(r, name) for r in rounds if r.policy == policy)
                for name in ("hit_rate", "tokens_per_s", "seconds")
            }
            for policy in POLICIES
        },
        "killed": killed,
    }


def as_markdown(report: dict[str, Any]) -> str:
    lines = ["| policy | cached prompt tokens | tokens/s | s a round |", "|---|---:|---:|---:|"]
    for policy, row in report["medians"].items():
        cells = (f"{row['hit_rate']:.1%}", f"{row['tokens_per_s']:,.0f}", f"{row['seconds']:.1f}")
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    killed = report["killed"]
    lines += [
        "",
        f"One server killed in mid-load: {killed['answered']} of {killed['requests']} requests "
        f"answered; marked after {killed['marked_after_s']} s.",
        *(f"Failed: {failure}." for failure in killed["failed"]),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--router-python", default=sys.executable, help="has sglang-router")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tenants", type=int, default=Load.tenants)
    parser.add_argument("--per-tenant", type=int, default=Load.per_tenant)
    parser.add_argument("--prefix-words", type=int, default=Load.prefix_words)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    load = Load(args.tenants, args.per_tenant, args.prefix_words)
    report = run(args, load)
    print(as_markdown(report) if args.markdown else json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
