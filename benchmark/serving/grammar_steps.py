"""What a grammar adds to decode steps: the same batch without one and with several, in turns.

    export PYTHONPATH=python:benchmark/memory OMP_NUM_THREADS=1
    python benchmark/serving/grammar_steps.py --model-path MODEL --batch-size 1 8

One engine without sockets; each round runs one batch of every kind with as many tokens. Prints
Markdown: the process's own time of a decode step (all threads), median of the rounds, and its ratio
to the batch without a grammar.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence

import numpy as np

from bench_common import describe_machine
from bench_growth import MemoryChannel
from sglang.srt.environ import Environ
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput, VocabularyReq, int32_buffer
from sglang.srt.managers.scheduler_process import make_scheduler
from sglang.srt.managers.scheduler_setup import build_scheduler_parts
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.utils.progress import Progress

# Texts that can't end before the tokens are used up.
KINDS: Mapping[str, dict[str, str]] = {
    "no grammar": {},
    "any text": {"regex": "(.|\\n){4000,}"},
    "lower-case words": {"regex": "([a-z]+ ){2000,}"},
    "JSON, a list of people": {
        "json_schema": '{"type": "array", "minItems": 1000, "items": {"type": "object", '
        '"properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, '
        '"required": ["name", "age"], "additionalProperties": false}}'
    },
    "any JSON": {"json_schema": '{"type": "array", "minItems": 1000}'},
}


class Bench:
    """An engine with the model's own vocabulary; grammars are compiled once, before they count."""

    def __init__(self, args: ServerArgs) -> None:
        progress = Progress()
        self.parts = build_scheduler_parts(args, Environ(), progress)
        self.channel = MemoryChannel()
        self.scheduler = make_scheduler(self.parts, self.channel, progress)
        tokenizer = load_tokenizer(args.tokenizer_path)
        found = tokenizer.library_json()
        if found is None:
            raise SystemExit("the bytes of this tokenizer's tokens are not known")
        self.channel.inbox.append(VocabularyReq(*found, tokenizer.eos_token_ids))
        self.num_sent = 0

    def run(self, batch: int, tokens: int, constraint: Mapping[str, str]) -> float:
        """Seconds of the process's time for a decode step."""
        self.parts.memory.flush()
        random = np.random.default_rng(7)
        for _ in range(batch):
            self.num_sent += 1
            params = SamplingParams(max_new_tokens=tokens, temperature=0.0, **constraint)
            ids = int32_buffer(random.integers(100, 20_000, 64))
            self.channel.inbox.append(
                TokenizedGenerateReqInput(f"r{self.num_sent}", memoryview(ids), params, True)
            )
        self.scheduler.turn()
        while any(req.num_output < 4 for req in self.scheduler.requests()):
            self.scheduler.turn()
        known = sum(req.num_output for req in self.scheduler.requests())
        began, steps = time.process_time(), 0
        while self.scheduler.busy:
            self.scheduler.turn()
            steps += 1
        seconds = time.process_time() - began
        return seconds * batch / (batch * tokens - known)


def main(argv: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-threads", type=int, default=1)
    settings = parser.parse_args(argv)
    bench = Bench(
        ServerArgs.from_kwargs(
            model_path=settings.model_path,
            dtype=settings.dtype,
            kv_memory_budget="512MiB",
            random_seed=1,
            cpu_threads=settings.cpu_threads,
        )
    )
    print(f"{describe_machine()}\n")
    print("| requests | grammar | ms of CPU a step | ratio |\n|---:|---|---:|---:|")
    for batch in settings.batch_size:
        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for number in range(settings.rounds + 1):
            turn = number % len(KINDS)  # no kind always comes first
            for kind in [*list(KINDS)[turn:], *list(KINDS)[:turn]]:
                seconds = bench.run(batch, settings.tokens, KINDS[kind])
                if number:  # the first round compiles and records
                    found[kind].append(seconds)
        base = found["no grammar"]
        for kind, times in found.items():
            ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
            print(f"| {batch} | {kind} | {1e3 * statistics.median(times):.2f} | {ratio:.3f} |")
    bench.parts.worker.close()


if __name__ == "__main__":
    main()
