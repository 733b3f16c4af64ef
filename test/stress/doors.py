"""Random calls of every door of a running server: no 500 ever, and all is idle again afterwards.

    PYTHONPATH=python:test python -m stress.doors --seeds 0:2000 [-- server flags]

Prints JSON, a line for each finding and a summary; exits with 1 when something was found.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from e2e.server_process import ServerProcess, wait_until
from stress.bodies import Call, draw_call
from stress.worlds import World, vocabulary

TIMEOUT_S = 60.0
GOOD = {200, 400, 404, 405, 409, 413, 415, 422, 499, 501, 503}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{{ m.tool_calls or '' }}"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}<assistant>"
)
FLAGS = (
    *("--dtype", "float32", "--kv-memory-budget", "600KiB", "--page-size", "16"),
    *("--kv-segment-size", "64", "--speculative-algorithm", "NGRAM", "--max-lora-rank", "4"),
    *("--kv-idle-release-seconds", "0.2", "--prefix-cache-idle-seconds", "1"),
    *("--enable-metrics", "--max-running-requests", "6", "--max-queued-requests", "40"),
    *("--tool-call-parser", "qwen25", "--reasoning-parser", "deepseek-r1", "--random-seed", "1"),
    *("--cpu-threads", "1", "--enable-priority-scheduling", "--lora-target-modules", "all"),
    *("--log-level", "warning", "--max-loras-per-batch", "2"),
)


def make_model(folder: Path) -> tuple[str, list[str]]:
    """A tiny model with a tokenizer of bytes and a chat template; its path and server flags."""
    world = World("llama", folder)
    path = Path(world.path)
    (path / "tokenizer.json").write_text(vocabulary().tokenizer_json)
    settings = {"eos_token": "<end>", "chat_template": TEMPLATE, "model_max_length": 512}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    refs = [f"a{number}={where}" for number, where in enumerate(world.adapters, 1)]
    return str(path), ["--lora-paths", *refs]


def check(call: Call, client: httpx.Client, counts: Counter[str]) -> str:
    """Make a call; what is wrong with its reply, or nothing."""
    if call.leaves is not None:
        counts["left"] += 1
        _leave(call, client.base_url)
        return ""
    began = time.monotonic()
    headers = {"content-type": call.kind}
    try:
        reply = client.request(call.method, call.path, content=call.body, headers=headers)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {error} after {time.monotonic() - began:.1f} s"
    counts[f"{reply.status_code}"] += 1
    if reply.status_code not in GOOD:
        return f"status {reply.status_code}: {reply.text[:300]}"
    if '"code":500' in reply.text.replace(" ", "") or "InternalServer" in reply.text:
        return f"{reply.status_code}: {reply.text[:300]}"  # in a stream that has begun
    return ""


def _leave(call: Call, url: httpx.URL) -> None:
    """A client that goes away in the middle."""
    head = (
        f"{call.method} {call.path} HTTP/1.1\r\nhost: x\r\ncontent-type: {call.kind}\r\n"
        f"content-length: {len(call.body)}\r\n\r\n"
    )
    with socket.create_connection((url.host, url.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(head.encode() + call.body)
        if call.leaves:
            connection.recv(call.leaves)


def left_behind(server: ServerProcess) -> str:
    """What an idle server should not have."""
    found: list[str] = []

    def idle() -> bool:
        found.clear()
        info: Any = server.server_info()
        states = info["internal_states"]
        if any(state["requests"] for state in states):
            found.append(f"requests: {[state['requests'] for state in states]}")
        memory = info["memory"]
        for name in ("mapped_bytes", "cached_tokens", "locked_cached_tokens"):
            if memory[name]:
                found.append(f"{name}: {memory[name]}")
        if memory["rows"]["taken"]:
            found.append(f"rows: {memory['rows']}")
        return not found

    wait_until(idle, 20.0)
    return "; ".join(found)


def storm(url: str, seeds: range, threads: int = 4) -> tuple[list[Any], Counter[str]]:
    """Calls of all seeds, so many at once; (findings, counts)."""
    findings: list[Any] = []
    counts: Counter[str] = Counter()

    def one(seed: int) -> None:
        call = draw_call(random.Random(seed))
        wrong = check(call, client, counts)
        counts["calls"] += 1
        if wrong:
            text = call.body.decode(errors="replace")[:1500]
            findings.append({"seed": seed, "path": call.path, "wrong": wrong, "body": text})

    with (
        httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client,
        ThreadPoolExecutor(threads) as pool,
    ):
        list(pool.map(one, seeds))
    return findings, counts


def aftermath(server: ServerProcess) -> list[Any]:
    """What is wrong with the server when all is over."""
    if server.process.poll() is not None:
        return [{"wrong": "the server has ended", "text": server.text[-4000:]}]
    found = [{"wrong": left}] if (left := left_behind(server)) else []
    health = server.get("/health").status_code
    if health != 200:
        found.append({"wrong": f"/health says {health}"})
    if "Traceback" in server.text:
        at = server.text.index("Traceback")
        found.append({"wrong": "a traceback", "text": server.text[at : at + 4000]})
    return found


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="0:500", help="first:end")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("flags", nargs="*", help="of the server, behind --")
    args = parser.parse_args()
    first, _, end = args.seeds.partition(":")
    seeds = range(int(first), int(end or int(first) + 1))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stress") as folder:
        path, refs = make_model(Path(folder))
        server = ServerProcess("--model-path", path, *FLAGS, *refs, *args.flags)
        try:
            server.wait_ready()
            findings, counts = storm(server.url, seeds, args.threads)
            findings += aftermath(server)
        finally:
            server.close()
    for one in findings:
        print(json.dumps(one), flush=True)
    print(
        json.dumps({"found": len(findings), "seconds": round(time.monotonic() - began), **counts})
    )
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
