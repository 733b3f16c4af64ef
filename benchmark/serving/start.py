"""How long a server takes to be ready, and what it holds then, by --context-length.

    python benchmark/serving/start.py --model-path MODEL [--contexts 8192,10000000] [--runs 5]

Starts servers in turn (A B A B ...), waits for /health to answer 200, and prints JSON: medians of
the seconds from exec to ready, of the resident bytes of all processes, and their ratios to the
first context's. A warm-up start of each is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request

import psutil

from sglang.srt.utils.network import get_free_port


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def start_once(model_path: str, context: int) -> tuple[float, int]:
    """Seconds from exec to ready, and resident bytes of the server's processes at that moment."""
    port = get_free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model_path]
    command += ["--port", str(port), "--context-length", str(context), "--log-level", "error"]
    env = {**os.environ, "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    began = time.perf_counter()
    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            while not is_ready(port):
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with {process.returncode}")
                time.sleep(0.02)
            seconds = time.perf_counter() - began
            root = psutil.Process(process.pid)
            family = [root, *root.children(recursive=True)]
            return seconds, sum(member.memory_info().rss for member in family)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--contexts", default="8192,10000000")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    contexts = [int(text) for text in args.contexts.split(",")]
    seconds: dict[int, list[float]] = {context: [] for context in contexts}
    resident: dict[int, list[int]] = {context: [] for context in contexts}
    for run in range(args.runs + 1):
        for context in contexts:
            took, held = start_once(args.model_path, context)
            if run:
                seconds[context].append(took)
                resident[context].append(held)
    base_s = statistics.median(seconds[contexts[0]])
    base_bytes = statistics.median(resident[contexts[0]])
    result = [
        {
            "context_length": context,
            "ready_s": round(statistics.median(seconds[context]), 3),
            "ready_ratio": round(statistics.median(seconds[context]) / base_s, 3),
            "resident_bytes": int(statistics.median(resident[context])),
            "resident_ratio": round(statistics.median(resident[context]) / base_bytes, 3),
        }
        for context in contexts
    ]
    print(json.dumps({"runs": args.runs, "results": result}, indent=2))


if __name__ == "__main__":
    main()
