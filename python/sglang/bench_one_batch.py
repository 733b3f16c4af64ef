"""`python -m sglang.bench_one_batch`: time one batch without a server, and see where a step goes.

    python -m sglang.bench_one_batch --model-path MODEL --batch-size 1 16 --input-len 128 --profile

Takes every flag of the server beside its own. Each combination of sizes runs once to warm up and
then `--repeats` times; medians are printed, and with `--result-filename` a line of JSON each is
appended to a file. `--profile` then runs the first combination's prefill and decode steps once
more, under a clock for every module. Exits 1 with one line on stderr when a size does not fit or
the engine can't be set up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from sglang.bench.batch_run import BatchRunner, BatchSize, BatchTimes
from sglang.bench.module_times import ModuleTimes
from sglang.srt.environ import Environ
from sglang.srt.errors import BackingError
from sglang.srt.server_args import prepare_server_args


def main(argv: Sequence[str] | None = None, out: TextIO = sys.stdout) -> int:
    """Run what the command line asks for; returns the exit status."""
    settings, rest = _parser().parse_known_args(argv)
    args = prepare_server_args(rest)
    sizes = [
        BatchSize(*numbers)
        for numbers in itertools.product(
            settings.batch_size, settings.input_len, settings.output_len
        )
    ]
    try:
        runner = BatchRunner(args, Environ.from_os())
    except (ValueError, OSError, MemoryError, BackingError) as error:
        return _fail(error)
    try:
        for size in sizes:
            runner.check(size)
        for size in sizes:
            figures = measure(runner, size, settings.repeats)
            print(report(figures), file=out, flush=True)
            _append(settings.result_filename, {"run_name": settings.run_name, **figures})
        if settings.profile:
            print(profile(runner, sizes[0]), file=out, flush=True)
    except ValueError as error:
        return _fail(error)
    finally:
        runner.close()
    return 0


def measure(runner: BatchRunner, size: BatchSize, repeats: int) -> dict[str, float | int]:
    """Medians of `repeats` runs of a size, after one that warms up."""
    runner.run(size)
    found = [runner.run(size).as_dict() for _ in range(repeats)]
    return {name: statistics.median(run[name] for run in found) for name in found[0]}


def report(figures: dict[str, float | int]) -> str:
    """The figures of one size in three lines."""
    get = figures.__getitem__
    return "\n".join(
        (
            f"Batch {get('batch_size'):.0f}, {get('input_len'):.0f} tokens in, "
            f"{get('output_len'):.0f} out: {get('total_latency'):.3f} s, "
            f"{get('overall_throughput'):,.1f} tokens/s",
            f"  Prefill: {get('prefill_latency'):.4f} s, {get('prefill_throughput'):,.1f} tokens/s",
            f"  Decode:  {1e3 * get('median_decode_latency'):.2f} ms a step "
            f"({1e3 * get('median_decode_forward'):.2f} ms of it in the forward), "
            f"{get('median_decode_throughput'):,.1f} tokens/s",
        )
    )


def profile(runner: BatchRunner, size: BatchSize) -> str:
    """Tables: what each class of modules spent itself in a whole prefill, and a decode step, and
    what the native calls of a recorded decode step took, if such steps are recorded.

    Decode steps follow prompts of one token, so their attention reads short contexts only.
    """
    prompts = BatchSize(size.batch_size, size.input_len, 1)
    answers = BatchSize(size.batch_size, 1, max(size.output_len, 2))
    tables = []
    for run, what in (
        (prompts, f"Prefill of {size.batch_size} x {size.input_len} tokens"),
        (answers, f"A decode step of {size.batch_size} rows"),
    ):
        runner.run(run)
        with runner.without_tapes(), ModuleTimes(runner.model) as times:
            found = runner.run(run)
        tables.append(table(what, found, times))
    runner.run(answers)
    calls = runner.tape_times(answers)
    if calls:
        tables.append(tape_table(f"A recorded decode step of {size.batch_size} rows", calls))
    return "\n\n".join(tables)


def tape_table(what: str, calls: Sequence[tuple[str, float]]) -> str:
    """Microseconds of a recorded step by kind of call."""
    total = sum(seconds for _, seconds in calls)
    kinds: dict[str, list[float]] = {}
    for name, seconds in calls:
        kinds.setdefault(name, []).append(seconds)
    lines = [f"{what}, {1e3 * total:.2f} ms in native calls:"]
    lines.append(f"{'calls of':<34}{'calls':>7}{'us':>10}{'share':>8}")
    for name, found in sorted(kinds.items(), key=lambda kind: -sum(kind[1])):
        lines.append(
            f"{name:<34}{len(found):>7}{1e6 * sum(found):>10.0f}{sum(found) / total:>8.1%}"
        )
    return "\n".join(lines)


def table(what: str, found: BatchTimes, times: ModuleTimes) -> str:
    """Microseconds for each token of the answers by class, then what is outside the model."""
    steps = found.size.output_len
    inside = sorted(times.own.items(), key=lambda item: -item[1].seconds)
    rows = [(name, own.calls / steps, own.seconds / steps) for name, own in inside]
    forward = sum(found.forward_s) / steps
    wall = found.total_s / steps
    rows.append(("(sampling, rest of the forward)", 1, forward - times.total_seconds / steps))
    rows.append(("(scheduler, beside the forward)", 1, wall - forward))
    lines = [f"{what}, {1e3 * wall:.2f} ms, with every module timed:"]
    lines.append(f"{'own time of':<34}{'calls':>7}{'us':>10}{'share':>8}")
    lines += [
        f"{name:<34}{calls:>7.0f}{1e6 * seconds:>10.0f}{seconds / wall:>8.1%}"
        for name, calls, seconds in rows
    ]
    return "\n".join(lines)


def _append(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps(figures), file=file)


def _fail(error: BaseException) -> int:
    print(f"bench_one_batch: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang.bench_one_batch",
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="All flags of sglang.launch_server are taken as well.",
        allow_abbrev=False,
    )
    number: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--batch-size", default=[1], help="Requests.", **number)
    parser.add_argument("--input-len", default=[1024], help="Tokens of each prompt.", **number)
    parser.add_argument("--output-len", default=[16], help="Tokens of each answer.", **number)
    parser.add_argument("--repeats", type=int, default=3, help="Measured runs of each size.")
    parser.add_argument("--run-name", default="default", help="Goes into the results.")
    parser.add_argument("--result-filename", type=Path, help="Lines of JSON are appended here.")
    parser.add_argument("--profile", action="store_true", help="Show where a decode step goes.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
