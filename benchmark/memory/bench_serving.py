"""Throughput and time per token of the real server with concurrent requests.

    PYTHONPATH=python python benchmark/memory/bench_serving.py --markdown

Two servers run at the same time, one per backing, and are asked in turns, never both at once.
With --idle-release-seconds 0 the segmented one gives its memory back between rounds, so each of its
rounds pays for growth; by default it keeps it for 30 s, as servers do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bench_common import BACKINGS, Report, Row, demo_model, parser, show
from bench_server import Server, running

GOAL_RATIO = 0.99


def one_round(server: Server, settings: object, seed: int) -> dict[str, float]:
    """Tokens per second, median TPOT and median time to the first token of one round."""
    rng = np.random.default_rng(seed)
    prompts = [
        rng.integers(100, 40_000, settings.prompt_tokens).tolist()
        for _ in range(settings.concurrency)
    ]
    began = time.perf_counter()
    with ThreadPoolExecutor(settings.concurrency) as pool:
        answers = list(pool.map(lambda ids: server.stream(ids, settings.new_tokens), prompts))
    seconds = time.perf_counter() - began
    server.flush()
    assert all(answer.tokens == settings.new_tokens for answer in answers)
    return {
        "throughput": settings.concurrency * settings.new_tokens / seconds,
        "tpot": statistics.median(one.seconds_per_token for one in answers) * 1000,
        "ttft": statistics.median(one.first - one.began for one in answers) * 1000,
    }


def main(argv: Sequence[str] | None = None) -> Report:
    args = parser(__doc__.splitlines()[0])
    args.add_argument("--concurrency", type=int, default=16)
    args.add_argument("--prompt-tokens", type=int, default=64)
    args.add_argument("--new-tokens", type=int, default=48)
    args.add_argument("--budget", default="1GiB")
    args.add_argument(
        "--idle-release-seconds", default="30", help="0: every round pays for growth again"
    )
    args.add_argument("--model-path", default="", help="default: the demo model")
    settings = args.parse_args(argv)
    settings.model_path = settings.model_path or demo_model()
    report = Report("serving", dict(vars(settings)))
    report.settings["model_path"] = settings.model_path.rpartition("/")[2]
    del report.settings["markdown"]
    flags = ["--model-path", settings.model_path, "--kv-memory-budget", settings.budget]
    flags += ["--kv-idle-release-seconds", settings.idle_release_seconds, "--log-level", "error"]
    with (
        running(*flags, "--kv-backing", "mmap") as segmented,
        running(*flags, "--kv-backing", "static") as static,
    ):
        servers = dict(zip(BACKINGS, (segmented, static), strict=True))
        for server in servers.values():
            one_round(server, settings, 0)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in BACKINGS}
        for turn in range(settings.repeats):
            for name in BACKINGS if turn % 2 == 0 else tuple(reversed(BACKINGS)):
                runs[name].append(one_round(servers[name], settings, turn + 1))
        memory = segmented.info()["memory"]
        maps = sum(group["map_count"] for group in memory["groups"])
    report.notes.append(f"{maps} segments were mapped by the segmented server.")
    add_rows(report, runs)
    show(report, markdown=settings.markdown)
    return report


def add_rows(report: Report, runs: dict[str, list[dict[str, float]]]) -> None:
    def medians_of(key: str) -> tuple[float, float]:
        ours, static = (statistics.median(run[key] for run in runs[name]) for name in BACKINGS)
        return ours, static

    ours, static = medians_of("throughput")
    met = ours / static >= GOAL_RATIO
    goal = f"ratio >= {GOAL_RATIO}"
    report.rows.append(Row("output tokens per second", ours, static, "tok/s", goal, met))
    ours, static = medians_of("tpot")
    goal = f"ratio <= {1 / GOAL_RATIO:.3g}"
    met = ours / static <= 1 / GOAL_RATIO
    report.rows.append(Row("time per output token, median", ours, static, "ms", goal, met))
    report.rows.append(Row("time to the first token, median", *medians_of("ttft"), "ms"))
    turns = zip(*(runs[name] for name in BACKINGS), strict=True)
    pairs = [ours["throughput"] / static["throughput"] for ours, static in turns]
    what = "throughput over the static round beside it, median"
    report.rows.append(Row(what, statistics.median(pairs), 1.0, "x"))
    report.notes.append(f"these ratios, round by round: {', '.join(f'{p:.3f}' for p in pairs)}.")


if __name__ == "__main__":
    main()
