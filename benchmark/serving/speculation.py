"""What drafting brings: the same answers with and without it, engines in turns.

    export PYTHONPATH=python:benchmark/memory
    python benchmark/serving/speculation.py --model-path MODEL [--batch-size 1 4] [--dtype float32]
        [--draft-model-path SMALL_MODEL]

Prints JSON: for each task, batch size and kind of drafts (from the text, and by a draft model where
one is named) the generated tokens, seconds with and without (medians), the median of the ratios of
neighbouring rounds (drafted over plain), drafted tokens, how many of them were right, and whether
the answers were the same. Prefixes are cached in all, so decoding counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import sglang
from bench_common import describe_machine

CODE = """class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        return self.balance

    def withdraw(self, amount):
        if amount > self.balance:
            raise ValueError("insufficient funds")
        self.balance -= amount
        return self.balance
"""
NOTICE = (
    "The library opens at nine on weekdays and at ten on Saturdays. Books can be kept for four "
    "weeks and renewed twice unless somebody waits for them. Members pay twelve euros a year, "
    "students and pensioners six. Laptops are lent for two hours at the desk on the first floor, "
    "and the reading room on the second floor is open until midnight in June."
)
TASKS = {
    "edit": f"Rename `amount` to `value` in this code and print all of it:\n```python\n{CODE}```",
    "quote": f"Repeat this text word by word.\n\n{NOTICE}",
    "answer": f"{NOTICE}\n\nWhen does the library open, and what does a membership cost?",
    "story": "Tell me a story about a fox and a crow.",
}


def main() -> None:
    """Run all tasks and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--draft-model-path")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    flags: dict[str, Any] = {"model_path": settings.model_path, "dtype": settings.dtype}
    flags |= {"quantization": settings.quantization, "random_seed": 1, "log_level": "error"}
    engines = {"plain": sglang.Engine(**flags)}
    engines["ngram"] = sglang.Engine(**flags, speculative_algorithm="NGRAM")
    if settings.draft_model_path is not None:
        engines["model"] = sglang.Engine(
            **flags,
            speculative_algorithm="STANDALONE",
            speculative_draft_model_path=settings.draft_model_path,
        )
    try:
        tasks = [
            row
            for batch in settings.batch_size
            for name in TASKS
            for row in measure(engines, name, batch, settings.tokens, settings.rounds)
        ]
    finally:
        for engine in engines.values():
            engine.shutdown()
    report = {"machine": describe_machine(), "settings": vars(settings), "tasks": tasks}
    print(json.dumps(report, indent=1))


def measure(
    engines: dict[str, sglang.Engine], name: str, batch: int, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """One task, `batch` times at once, after a round that does not count; a row for each kind."""
    text = f"<|im_start|>user\n{TASKS[name]}<|im_end|>\n<|im_start|>assistant\n"
    params = {"temperature": 0, "max_new_tokens": tokens}
    seconds: dict[str, list[float]] = {kind: [] for kind in engines}
    answers: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds + 1):
        for kind, engine in engines.items():
            begun = time.perf_counter()
            answers[kind] = engine.generate([text] * batch, params)
            seconds[kind].append(time.perf_counter() - begun)
    plain = seconds["plain"][1:]
    said = [one["output_ids"] for one in answers["plain"]]
    rows = []
    for kind in list(engines)[1:]:
        infos = [answer["meta_info"] for answer in answers[kind]]
        pairs = zip(seconds[kind][1:], plain, strict=True)
        rows.append(
            {
                "task": name,
                "batch_size": batch,
                "drafts": kind,
                "tokens": sum(info["completion_tokens"] for info in infos),
                "plain_s": round(statistics.median(plain), 4),
                "drafted_s": round(statistics.median(seconds[kind][1:]), 4),
                "ratio": round(statistics.median(one / other for one, other in pairs), 3),
                "proposed": sum(info.get("spec_num_proposed_drafts", 0) for info in infos),
                "correct": sum(info.get("spec_num_correct_drafts", 0) for info in infos),
                "same": said == [one["output_ids"] for one in answers[kind]],
            }
        )
    return rows


if __name__ == "__main__":
    main()
