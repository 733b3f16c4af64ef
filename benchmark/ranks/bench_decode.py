"""What a decoded token of a server of several ranks takes, with and without shared memory.

    PYTHONPATH=python:benchmark/memory python benchmark/ranks/bench_decode.py \
        --model-path MODEL.gguf --tp-sizes 3 --markdown

Two servers of the same number of ranks stand side by side, one with --disable-custom-all-reduce,
and answer one request at a time in turns (A B A B ...); who does not answer sleeps. A server of one
rank is measured beside. Figures are medians of milliseconds a token after the first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Sequence
from typing import Any

from bench_server import running

PROMPT = list(range(100, 164))


def measure(model: str, tp_size: int, tokens: int, repeats: int) -> dict[str, Any]:
    flags = ("--model-path", model, "--log-level", "error", "--skip-tokenizer-init")
    ranks = ("--tp-size", str(tp_size), "--cpu-threads", "1")
    kinds = {
        "one rank": ("--cpu-threads", "1"),
        "sockets": (*ranks, "--disable-custom-all-reduce"),
        "shared": ranks,
    }
    with contextlib.ExitStack() as stack:
        servers = {
            kind: stack.enter_context(running(*flags, *more)) for kind, more in kinds.items()
        }
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for number in range(repeats + 1):
            for kind, server in servers.items():
                answer = server.stream(PROMPT, tokens)
                if number:
                    times[kind].append(answer.seconds_per_token * 1e3)
    ratios = [b / a for a, b in zip(times["sockets"], times["shared"], strict=True)]
    return {
        "tp_size": tp_size,
        **{kind: round(statistics.median(t), 2) for kind, t in times.items()},
        "ratio": round(statistics.median(ratios), 3),
    }


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| ranks | one rank, ms | sockets, ms | shared, ms | shared over sockets |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--tp-sizes", default="3")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv)
    sizes = [int(size) for size in args.tp_sizes.split(",")]
    rows = [measure(args.model_path, size, args.tokens, args.repeats) for size in sizes]
    print(as_markdown(rows) if args.markdown else json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
