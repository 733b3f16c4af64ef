"""Mapped bytes over time against tokens in use: the real server under bursts.

    PYTHONPATH=python python benchmark/memory/bench_timeline.py --out t.json --png t.png

Samples /server_info while bursts of requests and one long prompt come and go, with short idle
times, so that memory is given back within seconds. The plot needs
matplotlib (the dependency group `bench`); `--from t.json` draws what was measured before.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from bench_common import MIB, demo_model, describe_machine
from bench_server import Server, running

SAMPLE_S = 0.1
# What happens, in order: (label, requests at once, prompt tokens, new tokens, quiet seconds after)
PHASES = (
    ("4 short requests", 4, 200, 40, 6.0),
    ("one long prompt", 1, 3000, 30, 2.0),
    ("12 requests at once", 12, 300, 40, 9.0),
)


class Sampler:
    """Asks the server for its memory again and again on a thread of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.samples: list[dict[str, float]] = []
        self.began = time.perf_counter()

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            memory = self._server.info()["memory"]
            width = memory["bytes_per_token"]
            locked = memory["locked_cached_tokens"]
            used = memory["pages"]["used"] * memory["page_size"]
            self.samples.append(
                {
                    "seconds": self.seconds(),
                    "mapped_bytes": memory["mapped_bytes"],
                    "resident_bytes": memory["resident_bytes"],
                    "used_bytes": (used + locked) * width,
                    "cached_bytes": (memory["cached_tokens"] - locked) * width,
                    "budget_bytes": memory["budget_bytes"],
                }
            )


def measure(model_path: str, budget: str) -> dict[str, Any]:
    """Run the phases; samples and when each phase began."""
    flags = ["--model-path", model_path, "--kv-backing", "mmap", "--kv-memory-budget", budget]
    flags += ["--kv-idle-release-seconds", "1", "--prefix-cache-idle-seconds", "3"]
    marks = []
    rng = np.random.default_rng(5)
    with running(*flags, "--log-level", "error") as server, Sampler(server) as sampler:
        time.sleep(1.0)
        for label, count, prompt, new, quiet in PHASES:
            marks.append({"seconds": sampler.seconds(), "label": label})
            prompts = [rng.integers(100, 40_000, prompt).tolist() for _ in range(count)]
            with ThreadPoolExecutor(count) as pool:
                for _ in pool.map(lambda ids, new=new: server.stream(ids, new), prompts):
                    pass
            time.sleep(quiet)
    return {"machine": describe_machine(), "marks": marks, "samples": sampler.samples}


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw the figure as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    samples = found["samples"]

    def series(*keys: str) -> list[float]:
        return [sum(one[key] for key in keys) / MIB for one in samples]

    seconds = [one["seconds"] for one in samples]
    figure, axes = pyplot.subplots(figsize=(8, 3.6), dpi=110)
    axes.fill_between(seconds, series("used_bytes", "cached_bytes"), step="post", color="#9ecae1")
    axes.fill_between(seconds, series("used_bytes"), step="post", color="#3182bd")
    axes.step(seconds, series("mapped_bytes"), where="post", color="#d95f02", linewidth=1.6)
    axes.step(seconds, series("budget_bytes"), where="post", color="#555555", linestyle="--")
    names = ["idle cached prefixes", "tokens in use", "mapped", "budget (a static pool)"]
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncol": 4}
    axes.legend(names, fontsize=8, frameon=False, **place)
    top = samples[0]["budget_bytes"] / MIB
    for mark in found["marks"]:
        axes.axvline(mark["seconds"], color="#bbbbbb", linewidth=0.8)
        axes.text(mark["seconds"] + 0.2, top * 0.5, mark["label"], fontsize=8, rotation=90)
    axes.set(xlabel="seconds", ylabel="MiB", xlim=(0, seconds[-1]), ylim=(0, top * 1.1))
    figure.tight_layout()
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--model-path", default="", help="default: the demo model")
    args.add_argument("--budget", default="384MiB")
    args.add_argument("--from", dest="source", type=Path, help="draw this file, measure nothing")
    args.add_argument("--out", type=Path, help="write the samples as JSON")
    args.add_argument("--png", type=Path, help="draw the figure")
    settings = args.parse_args(argv)
    if settings.source is not None:
        found = json.loads(settings.source.read_text())
    else:
        found = measure(settings.model_path or demo_model(), settings.budget)
    if settings.out is not None:
        settings.out.write_text(json.dumps(found))
    if settings.png is not None:
        plot(found, settings.png)
    last, most = found["samples"][-1], max(one["mapped_bytes"] for one in found["samples"])
    summary = {
        "samples": len(found["samples"]),
        "most_mapped_bytes": most,
        "mapped_bytes_at_the_end": last["mapped_bytes"],
        "resident_bytes_at_the_end": last["resident_bytes"],
        "machine": found["machine"],
    }
    print(json.dumps(summary, indent=2))
    return found


if __name__ == "__main__":
    main()
