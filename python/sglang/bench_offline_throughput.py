"""`python -m sglang.bench_offline_throughput`: how many tokens a second an Engine makes.

    python -m sglang.bench_offline_throughput --model-path MODEL --dataset-name random \
        --num-prompts 64 --random-input-len 256 --random-output-len 64

All requests of a dataset at once, in this process, without HTTP. Takes every flag of the server
beside its own, which are those of `sglang.bench_serving`. Prints a table and, with
`--result-filename`, appends a line of JSON. Exits 1 with one line on stderr when the engine can't
be set up or a request is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from sglang.bench.serving_flags import TokenizerCodec, add_load_flags, load_shape
from sglang.bench.serving_load import LoadRequest, make_load
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.entrypoints.processes import StartError
from sglang.srt.errors import BackingError, RequestError
from sglang.srt.server_args import ServerArgs, prepare_server_args

_WARM_UP_TOKENS = 16
_TABLE = (
    ("Successful requests", "successful_requests", "d"),
    ("Benchmark duration (s)", "total_latency", ".2f"),
    ("Total input tokens", "total_input_tokens", "d"),
    ("Total generated tokens", "total_output_tokens", "d"),
    ("Request throughput (req/s)", "request_throughput", ".2f"),
    ("Input token throughput (tok/s)", "input_throughput", ".2f"),
    ("Output token throughput (tok/s)", "output_throughput", ".2f"),
    ("Total token throughput (tok/s)", "total_throughput", ".2f"),
    ("Mapped at the end (MiB)", "mapped_mib", ".1f"),
)


def main(argv: Sequence[str] | None = None, out: TextIO = sys.stdout) -> int:
    """Measure what the command line asks for; returns the exit status."""
    settings, rest = make_parser().parse_known_args(argv)
    args = prepare_server_args(rest)
    try:
        figures = measure(settings, args)
    except (ValueError, OSError, BackingError, RequestError, StartError) as error:
        print(f"bench_offline_throughput: {error}", file=sys.stderr)
        return 1
    print(render(figures), file=out, flush=True)
    if settings.result_filename:
        with Path(settings.result_filename).open("a", encoding="utf-8") as file:
            print(json.dumps(figures), file=file)
    return 0


def measure(settings: argparse.Namespace, args: ServerArgs) -> dict[str, Any]:
    """Start an engine, warm it up, and time one batch of everything."""
    codec = TokenizerCodec(args.tokenizer_path)
    requests = make_load(
        settings.dataset_name,
        settings.dataset_path,
        load_shape(settings, as_ids=True),
        codec,
        settings.seed,
    )
    with Engine(server_args=args) as engine:
        if not settings.skip_warmup:
            _generate(engine, requests[:_WARM_UP_TOKENS], settings, _WARM_UP_TOKENS)
            engine.flush_cache()
        began = time.perf_counter()
        answers = _generate(engine, requests, settings, None)
        seconds = time.perf_counter() - began
        memory = engine.get_server_info()["memory"]
    outputs = sum(answer["meta_info"]["completion_tokens"] for answer in answers)
    return offline_figures(requests, outputs, seconds) | {
        "mapped_bytes": memory["mapped_bytes"],
        "budget_bytes": memory["budget_bytes"],
    }


def offline_figures(
    requests: Sequence[LoadRequest], outputs: int, seconds: float
) -> dict[str, float | int]:
    """Figures of a batch that took `seconds` and brought `outputs` tokens."""
    inputs = sum(request.prompt_len for request in requests)
    return {
        "successful_requests": len(requests),
        "total_latency": seconds,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(requests) / seconds,
        "input_throughput": inputs / seconds,
        "output_throughput": outputs / seconds,
        "total_throughput": (inputs + outputs) / seconds,
    }


def render(figures: Mapping[str, Any]) -> str:
    """The figures for people."""
    shown = {**figures, "mapped_mib": figures["mapped_bytes"] / (1 << 20)}
    lines = [" Offline Throughput Benchmark Result ".center(50, "=")]
    lines += [f"{label + ':':<40} {shown[name]:{form}}" for label, name, form in _TABLE]
    return "\n".join([*lines, "=" * 50])


def _generate(
    engine: Engine,
    requests: Sequence[LoadRequest],
    settings: argparse.Namespace,
    most: int | None,
) -> list[dict[str, Any]]:
    """All answers; of each at most `most` tokens, None: as many as are asked for."""
    extra = dict(settings.extra_request_body)
    more = extra.pop("sampling_params", {})
    params = [
        {
            "temperature": 0.0,
            "max_new_tokens": min(request.output_len, most or request.output_len),
            "ignore_eos": not settings.disable_ignore_eos,
            **more,
        }
        for request in requests
    ]
    found = engine.generate(
        input_ids=[request.prompt for request in requests], sampling_params=params, **extra
    )
    assert isinstance(found, list)
    return [dict(answer) for answer in found]


def make_parser() -> argparse.ArgumentParser:
    """The benchmark's own flags; all others are the server's."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang.bench_offline_throughput", description=__doc__, allow_abbrev=False
    )
    add_load_flags(parser)
    parser.add_argument("--result-filename", help="a line of JSON is appended to it")
    parser.add_argument("--skip-warmup", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
