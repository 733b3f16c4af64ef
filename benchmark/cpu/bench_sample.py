"""Drawing tokens: PyTorch's passes against the native call, through the sampler's own functions.

Logits are random: normal numbers of a deviation of 2.5, flatter than a trained model's. Measured in
turns on one thread, figures are medians; "speedup" is PyTorch's time over the native one. JSON out.

    python benchmark/cpu/bench_sample.py [--rounds 7]
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from bench_attention import medians
from cpu_report import parser, print_report
from sglang.srt.layers.sampler import Draw, _choose, _choose_by_torch, uniform
from sglang.srt.sampling.sampling_params import SamplingParams

FILTERS = {
    "temperature": SamplingParams(),
    "top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "top_k 50, top_p 0.9": SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
    "min_p 0.05": SamplingParams(temperature=0.7, min_p=0.05),
}
VOCABULARIES = (49_152, 201_088)
ROWS = (1, 16)


def measure(params: SamplingParams, vocabulary: int, rows: int, rounds: int) -> dict[str, Any]:
    logits = torch.randn(rows, vocabulary) * 2.5
    best, tokens = logits.max(-1)
    draws = [Draw(row, params, uniform(row, 1)) for row in range(rows)]
    ways = {
        "torch": partial(_choose_by_torch, logits, best, tokens, draws),
        "native": partial(_choose, logits, best, tokens, draws),
    }
    seconds = medians(ways, rounds, time.thread_time)
    return {
        "ms": {name: round(value * 1e3, 3) for name, value in seconds.items()},
        "speedup": round(seconds["torch"] / seconds["native"], 1),
    }


def main() -> None:
    args = parser(__doc__, rounds=7).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = [
        {"filters": name, "vocabulary": vocabulary, "rows": rows}
        | measure(params, vocabulary, rows, args.rounds)
        for name, params in FILTERS.items()
        for vocabulary in VOCABULARIES
        for rows in ROWS
    ]
    print_report("cpu_sample", {"rounds": args.rounds}, {"draws": found})


if __name__ == "__main__":
    main()
