"""Needle in a haystack through a real server, up to 10M tokens.

    python scripts/needle.py --lengths 64k,1M --depths 0,25,50,75,100 --heat-map needle.png

Makes a small Llama 4 whose constructed weights find needles exactly at any length (docs/needle.md),
starts `python -m sglang.launch_server` with it, hides and asks, and prints JSON: whether the whole
answer came, time to the first token, decode rate against the bound of reading the KV memory once
per token, what a second request with the same prefix takes, and memory. With --model-path it asks
any other checkpoint for the needle that --needle, --question, --answer and --haystack tell.

Every depth of a length is a full prefill, with the cache flushed before it; --shared hides all
needles of a length in one prompt, so only its first depth is one: a quick check.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from haystack.bare_loop import BareLoop
from haystack.checkpoint import write_checkpoint
from haystack.circuit import Shape, build_weights
from haystack.client import BODIES
from haystack.machine import describe_machine, read_bandwidth
from haystack.margins import measure_margins
from haystack.measure import Cell, Settings, measure_length, predict_quadratic
from haystack.report import draw_heat_map, markdown_table
from haystack.server import Server, started_server
from haystack.tasks import Task, circuit_task, given_task
from sglang.srt.utils.sizes import parse_bytes, parse_count


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the process when it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask = parser.add_argument_group("what is asked")
    ask.add_argument("--lengths", type=_counts, default=[64_000], help="tokens: 64k,1M,10M")
    ask.add_argument("--depths", type=_numbers, default=[0, 25, 50, 75, 100], help="percent")
    ask.add_argument("--answer-tokens", type=int, default=8, help="of the circuit's needles")
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--shared", action="store_true", help="all needles of a length in one prompt")
    ask.add_argument("--no-flush", action="store_true", help="let prompts hit earlier prefixes")
    ask.add_argument("--no-second", action="store_true", help="do not send each prompt twice")
    ask.add_argument("--body", choices=BODIES, default="json", help="how token ids are sent")
    ask.add_argument("--clients", type=int, default=0, help="small clients that stream meanwhile")
    ask.add_argument("--predict", type=_counts, default=[], help="lengths to compare with a fit")
    ask.add_argument("--baseline", action="store_true", help="a bare torch loop beside the server")
    ask.add_argument("--baseline-step", type=int, default=8192, help="tokens of one of its steps")

    model = parser.add_argument_group("model")
    model.add_argument("--layers", type=int, default=2, choices=(2, 4), help="of the circuit")
    model.add_argument("--checkpoint", type=Path, help="where to write it (a temporary folder)")
    model.add_argument("--only-write", action="store_true", help="write the checkpoint and end")
    model.add_argument("--only-margins", action="store_true", help="compute them and end")
    model.add_argument("--model-path", default="", help="another checkpoint; needs the four below")
    for name in ("needle", "question", "answer", "haystack"):
        model.add_argument(f"--{name}", default="", help="a text, ids:5,6,7 or @file")
    model.add_argument("--keep-within", type=int, help="needles within chunks of so many tokens")

    server = parser.add_argument_group("server")
    server.add_argument("--url", default="", help="ask this one instead of starting one")
    server.add_argument("--server-flags", default="", help="further flags of launch_server")
    server.add_argument("--server-log", type=Path, help="keep its output (a temporary file)")
    server.add_argument("--bandwidth-buffer", type=parse_bytes, default=1 << 30)

    out = parser.add_argument_group("output")
    out.add_argument("--output", type=Path, help="write the JSON there, too")
    out.add_argument("--heat-map", type=Path, help="draw a PNG (needs matplotlib)")
    out.add_argument("--markdown", action="store_true", help="print a table instead of JSON")
    args = parser.parse_args(argv)
    given = [args.needle, args.question, args.answer, args.haystack]
    if args.model_path and not all(given):
        parser.error("--model-path needs --needle, --question, --answer and --haystack")
    if args.only_write and not args.checkpoint:
        parser.error("--only-write needs --checkpoint")
    if args.heat_map and not importlib.util.find_spec("matplotlib"):
        parser.error("--heat-map needs matplotlib: pip install matplotlib")
    return args


def _counts(text: str) -> list[int]:
    return [parse_count(part) for part in text.split(",")]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report; 1 when an answer was not exact."""
    args = parse_arguments(argv)
    shape = Shape(num_layers=args.layers)
    if args.only_write:
        write_checkpoint(args.checkpoint, shape)
        return 0
    if args.only_margins:
        print(json.dumps(_margins(shape, args.lengths), indent=2))
        return 0
    report: dict[str, Any] = {
        "benchmark": "needle",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": describe_machine(),
    }
    cells: list[Cell] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_server(args, shape))
        task = _task(args, shape, server)
        bandwidth = functools.partial(read_bandwidth, args.bandwidth_buffer)
        settings = Settings(
            body=args.body,
            shared=args.shared,
            flush=not args.no_flush,
            second=not args.no_second,
            clients=args.clients,
        )
        loops: list[dict[str, Any]] = []
        for length in args.lengths:
            if args.baseline:
                loops.append(_baseline(args, shape, task, length))
            for cell in measure_length(server, task, length, settings, bandwidth):
                cells.append(cell)
                print(_progress(cell), file=sys.stderr, flush=True)
        report["server_info"] = _settings_of(server)
    report["cells"] = [cell.as_dict() for cell in cells]
    if loops:
        report["bare_loop"] = loops
    if args.predict:
        report["quadratic"] = predict_quadratic(cells, args.predict).as_dict()
    if not args.model_path:
        report["margins"] = _margins(shape, args.lengths)
    _show(args, report, cells)
    return 0 if all(cell.exact for cell in cells) else 1


@contextlib.contextmanager
def _server(args: argparse.Namespace, shape: Shape) -> Iterator[Server]:
    if args.url:
        yield Server(args.url.rstrip("/"))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), args.model_path
        if not model:
            model = str(args.checkpoint or folder / f"needle-{args.layers}")
            write_checkpoint(Path(model), shape)
        flags = ["--model-path", model, *shlex.split(args.server_flags)]
        with started_server(flags, args.server_log or folder / "server.log") as server:
            yield server


def _task(args: argparse.Namespace, shape: Shape, server: Server) -> Task:
    if not args.model_path:
        return circuit_task(shape, args.depths, args.answer_tokens, args.seed)
    filler, needle, question, answer = (
        _token_ids(text, server)
        for text in (args.haystack, args.needle, args.question, args.answer)
    )
    return given_task(filler, needle, question, answer, args.depths, args.keep_within)


def _token_ids(given: str, server: Server) -> list[int]:
    """The ids themselves, or those of a text; `@` before the name of a file that holds either."""
    text = Path(given[1:]).read_text() if given.startswith("@") else given
    if text.startswith("ids:"):
        return [int(part) for part in text.removeprefix("ids:").replace(",", " ").split()]
    return server.tokenize(text)


def _baseline(args: argparse.Namespace, shape: Shape, task: Task, length: int) -> dict[str, Any]:
    prompt = task.prompts(length)[0]
    loop = BareLoop(build_weights(shape), shape, args.baseline_step)
    found = loop.prefill(prompt.ids)
    return {
        "length": length,
        "seconds": found.seconds,
        "tokens_per_s": found.tokens_per_s,
        "exact": found.first_token == prompt.answer[0],
    }


def _settings_of(server: Server) -> dict[str, Any]:
    names = ("chunked_prefill_size", "kv_backing", "page_size", "dtype", "attention_backend")
    info = server.info()
    return {
        **{name: info[name] for name in names if name in info},
        "max_req_input_len": info["max_req_input_len"],
        "groups": [
            {k: one[k] for k in ("kind", "num_layers", "bytes_per_token", "segment_tokens")}
            for one in info["memory"]["groups"]
        ],
    }


def _margins(shape: Shape, lengths: Sequence[int]) -> dict[str, Any]:
    found = measure_margins(build_weights(shape), shape)
    return {
        "distance_heads_nats": found.distance_margin(),
        "lookup_nats": {str(length): found.lookup_margin(length) for length in lengths},
        "logits": found.logit_gap,
    }


def _progress(cell: Cell) -> str:
    return (
        f"{cell.prompt_tokens:,} tokens, depth {cell.depth:g} %: "
        f"{'exact' if cell.exact else 'WRONG'}, first token after {cell.ttft_s:.2f} s"
    )


def _show(args: argparse.Namespace, report: dict[str, Any], cells: Sequence[Cell]) -> None:
    text = json.dumps(report, indent=2)
    if args.output:
        args.output.write_text(text + "\n")
    if args.heat_map:
        name = args.model_path or f"needle circuit of {args.layers} layers"
        draw_heat_map(cells, name, args.heat_map)
    print(markdown_table(cells) if args.markdown else text)


if __name__ == "__main__":
    sys.exit(main())
