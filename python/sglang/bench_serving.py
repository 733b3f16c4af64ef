"""`python -m sglang.bench_serving`: throughput and latency of a server, from its clients' side.

    python -m sglang.bench_serving --dataset-name random --num-prompts 64 --request-rate 4

Sends the requests of a dataset to a running server, this one or another with the same API, and
prints a table; with `--output-file` a line of JSON is appended to it. Beside what SGLang's command
of this name measures it tells how much KV memory the server had mapped meanwhile. Flags are
SGLang's: docs/bench_serving.md. Exits 1 with one line on stderr when nothing could be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import aiohttp
from tqdm import tqdm

from sglang.bench.serving_client import KINDS, MemoryWatch, Target, get_json, new_session, run_load
from sglang.bench.serving_figures import Outcome, memory_figures, render, serving_figures
from sglang.bench.serving_flags import TokenizerCodec, add_load_flags, load_shape
from sglang.bench.serving_load import Codec, LoadRequest, arrival_times, make_load

_WARM_UP_TOKENS = 32
_KEPT_SETTINGS = (
    *("backend", "dataset_name", "num_prompts", "request_rate", "max_concurrency", "seed"),
    *("random_input_len", "random_output_len", "random_range_ratio", "sharegpt_output_len"),
)


def main(argv: Sequence[str] | None = None, out: TextIO = sys.stdout) -> int:
    """Measure what the command line asks for; returns the exit status."""
    settings = make_parser().parse_args(argv)
    _raise_file_limit()
    try:
        figures = asyncio.run(measure(settings, out))
    except (ValueError, OSError) as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 1
    if settings.output_file:
        with Path(settings.output_file).open("a", encoding="utf-8") as file:
            print(json.dumps(figures), file=file)
    return 0


async def measure(settings: argparse.Namespace, out: TextIO) -> dict[str, Any]:
    """One run: the figures, which have been printed.

    Raises OSError when the server can't be reached and ValueError when no request succeeded.
    """
    async with new_session() as session:
        target = await _find_target(session, settings)
        codec = await _find_codec(session, target, settings)
        shape = load_shape(settings, settings.tokenize_prompt)
        requests = make_load(
            settings.dataset_name, settings.dataset_path, shape, codec, settings.seed
        )
        times = arrival_times(len(requests), settings.request_rate, settings.seed)
        await _warm_up(session, target, requests[0], settings.warmup_requests)
        if settings.flush_cache:
            await _flush(session, target)
        watch = MemoryWatch(session, target)
        await watch.start()
        with tqdm(total=len(requests), disable=settings.disable_tqdm) as bar:
            outcomes, duration = await run_load(
                session, target, requests, times, settings.max_concurrency, bar.update
            )
        await watch.stop()
        accepted = await _accept_length(session, target)
    again = [len(codec.encode(one.text)) if one.text else one.output_len for one in outcomes]
    figures = {name: _plain(getattr(settings, name)) for name in _KEPT_SETTINGS}
    figures |= serving_figures(outcomes, duration, again)
    figures |= {"accept_length": accepted, "memory": memory_figures(watch.looks)}
    if settings.output_details:
        figures |= _details(outcomes)
    if not figures["completed"]:
        raise ValueError(f"no request succeeded; the first: {outcomes[0].error}")
    print(render(figures, _shown(settings)), file=out, flush=True)
    return figures


def _details(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    return {
        "input_lens": [one.prompt_len for one in outcomes],
        "output_lens": [one.output_len for one in outcomes],
        "ttfts": [one.ttft for one in outcomes],
        "itls": [one.itls for one in outcomes],
        "generated_texts": [one.text for one in outcomes],
        "errors": [one.error or "" for one in outcomes],
    }


def _shown(settings: argparse.Namespace) -> list[tuple[str, str]]:
    most = settings.max_concurrency
    return [
        ("Backend", settings.backend),
        ("Traffic request rate", str(settings.request_rate)),
        ("Max request concurrency", "not set" if most is None else str(most)),
    ]


def _plain(value: Any) -> Any:
    """JSON knows no infinity."""
    return str(value) if value == float("inf") else value


async def _find_target(session: aiohttp.ClientSession, settings: argparse.Namespace) -> Target:
    url = settings.base_url or f"http://{settings.host}:{settings.port}"
    target = Target(
        kind=settings.backend,
        base_url=url.rstrip("/"),
        model=settings.served_model_name or settings.model or "",
        api_key=os.environ.get("OPENAI_API_KEY"),
        stream=not settings.disable_stream,
        ignore_eos=not settings.disable_ignore_eos,
        extra=settings.extra_request_body,
        adapters=settings.lora_name,
    )
    if target.model:
        return target
    models = await get_json(session, target, "/v1/models")
    return replace(target, model=models["data"][0]["id"])


async def _find_codec(
    session: aiohttp.ClientSession, target: Target, settings: argparse.Namespace
) -> Codec:
    path = settings.tokenizer or settings.model
    if path is None:
        with contextlib.suppress(OSError):
            path = (await get_json(session, target, "/model_info")).get("tokenizer_path")
    return TokenizerCodec(path or target.model)


async def _warm_up(
    session: aiohttp.ClientSession, target: Target, request: LoadRequest, count: int
) -> None:
    short = LoadRequest(
        request.prompt, request.prompt_len, min(request.output_len, _WARM_UP_TOKENS)
    )
    outcomes, _ = await run_load(session, target, [short] * count, [0.0] * count, None)
    failed = next((one.error for one in outcomes if one.error is not None), None)
    if failed is not None:
        raise ValueError(f"the warm-up failed: {failed}")


async def _flush(session: aiohttp.ClientSession, target: Target) -> None:
    url = f"{target.base_url}/flush_cache"
    async with session.post(url, headers=target.headers) as reply:
        if reply.status != 200:
            raise OSError(f"{url} answered {reply.status}")


async def _accept_length(session: aiohttp.ClientSession, target: Target) -> float | None:
    """Tokens that a step with a draft brought on average, None where there are none."""
    try:
        info = await get_json(session, target, "/server_info")
        length: float | None = info["internal_states"][0].get("avg_spec_accept_length")
    except (OSError, LookupError, TypeError):
        return None
    return length


def _raise_file_limit() -> None:
    """Every request under way is a file of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def make_parser() -> argparse.ArgumentParser:
    """The command line; names and defaults are SGLang's."""
    parser = argparse.ArgumentParser(prog="python -m sglang.bench_serving", description=__doc__)
    add = parser.add_argument
    add("--backend", choices=list(KINDS), default="sglang", help="the API that is asked")
    add("--base-url", help="instead of --host and --port")
    add("--host", default="127.0.0.1")
    add("--port", type=int, default=30000)
    add("--model", help="name and tokenizer; default: what the server says")
    add("--served-model-name", help="the name in requests; default: --model")
    add("--tokenizer", help="default: --model, or what the server says")
    add_load_flags(parser)
    add("--tokenize-prompt", action="store_true", help="send token ids, of exact lengths")
    add("--request-rate", type=float, default=float("inf"), help="requests a second, Poisson")
    add("--max-concurrency", type=int, help="most requests under way; default: no bound")
    add("--disable-stream", action="store_true")
    add("--lora-name", nargs="+", default=[], help="adapters, in turns")
    add("--warmup-requests", type=int, default=1)
    add("--flush-cache", action="store_true", help="empty the prefix cache before the run")
    add("--output-file", help="a line of JSON is appended to it")
    add("--output-details", action="store_true", help="every request's figures in that line")
    add("--disable-tqdm", action="store_true")
    add("--seed", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
