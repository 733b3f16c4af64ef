"""The prefix tree with one huge key, and with very many keys that share beginnings.

    PYTHONPATH=python python benchmark/memory/bench_radix.py --markdown

The tree is the same over both backings, so there is one column; what is compared is the cost per
operation with few and with many keys: it must not grow with the number of leaves.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from bench_common import Report, Row, parser, seconds_of, show
from sglang.srt.mem_cache.kv_layout import GroupId, SegmentLayout
from sglang.srt.mem_cache.page_owner import PageIndex
from sglang.srt.mem_cache.radix_cache import RadixCache

PAGES_PER_SEGMENT = 1024
GOAL_MATCH_MS, GOAL_GROWTH = 30.0, 3.0


class Tree:
    """A radix cache over pages that all exist; hands them out in order."""

    def __init__(self, page_size: int, pages: int) -> None:
        segments = 2 + pages // PAGES_PER_SEGMENT
        layout = SegmentLayout(
            GroupId(0), page_size, PAGES_PER_SEGMENT, segments + 1, 1, 1, 1, granule_bytes=1
        )
        self.index = PageIndex(layout)
        for segment in range(1, segments + 1):
            self.index.add_segment(segment)
        self.cache = RadixCache([self.index], page_size)
        self.page_size = page_size
        self._next = PAGES_PER_SEGMENT

    def insert(self, token_ids: np.ndarray) -> float:
        """Seconds to match, insert and release one key, as a request does that computes it."""
        hit = self.cache.match(token_ids, None, len(token_ids))
        held = len(hit.page_ids[0])
        count = len(token_ids) // self.page_size - held
        fresh = np.arange(self._next, self._next + count, dtype=np.int32)
        self._next += count
        self.index.take(fresh)
        pages = np.concatenate([hit.page_ids[0], fresh])

        def work() -> None:
            self.cache.insert(hit.handle, token_ids, len(token_ids), (pages,))
            self.index.drop_row(fresh)
            self.cache.release(hit.handle)

        return seconds_of(work)

    def match(self, token_ids: np.ndarray) -> float:
        """Seconds to match and lock a key; released afterwards."""
        found = []
        seconds = seconds_of(
            lambda: found.append(self.cache.match(token_ids, None, len(token_ids)))
        )
        self.cache.release(found[0].handle)
        return seconds


def huge_key(tokens: int, page_size: int) -> dict[str, float]:
    """Milliseconds per operation on one key of `tokens` tokens."""
    tree = Tree(page_size, tokens // page_size + PAGES_PER_SEGMENT)
    key = np.random.default_rng(2).integers(0, 50_000, tokens - tokens % page_size)
    key = key.astype(np.int32)
    found = {"insert": tree.insert(key), "match": tree.match(key)}
    found["match_len"] = seconds_of(lambda: tree.cache.match_len(key, None, len(key)))
    found["match that splits in the middle"] = tree.match(key[: len(key) // 2])
    tail = len(key) // page_size // 4
    found["evict a quarter"] = seconds_of(lambda: tree.cache.evict(tail))
    found["evict one page"] = seconds_of(lambda: tree.cache.evict(1))
    found["evict the rest"] = seconds_of(lambda: tree.cache.evict(len(key)))
    return {name: value * 1000 for name, value in found.items()}


def many_keys(count: int, length: int, page_size: int, families: int) -> dict[str, float]:
    """Mean microseconds per operation over `count` keys; half of each key is its family's."""
    rng = np.random.default_rng(3)
    tree = Tree(page_size, (count + families) * (length // page_size + 2))
    heads = rng.integers(0, 50_000, (families, length // 2)).astype(np.int32)
    tails = rng.integers(0, 50_000, (count, length - length // 2)).astype(np.int32)

    def key(i: int) -> np.ndarray:
        return np.concatenate([heads[i % families], tails[i]])

    inserts = [tree.insert(key(i)) for i in range(count)]
    some = rng.integers(0, count, min(count, 5000)).tolist()
    matches = [tree.match(key(i)) for i in some]
    leaf = length // page_size - length // 2 // page_size
    evictions = [seconds_of(lambda: tree.cache.evict(leaf)) for _ in range(min(count // 2, 20_000))]
    whole = {"insert": inserts, "match": matches, "evict a leaf": evictions}
    return {name: statistics.median(values) * 1e6 for name, values in whole.items()}


def main(argv: Sequence[str] | None = None) -> Report:
    args = parser(__doc__.splitlines()[0])
    args.add_argument("--tokens", type=int, default=10_000_000)
    args.add_argument("--keys", type=int, default=100_000)
    args.add_argument("--key-tokens", type=int, default=1000)
    args.add_argument("--families", type=int, default=100, help="different first halves")
    settings = args.parse_args(argv)
    report = Report("prefix tree", dict(vars(settings)))
    del report.settings["markdown"]
    for page_size in (64, 1):
        runs = [huge_key(settings.tokens, page_size) for _ in range(settings.repeats)]
        for name in runs[0]:
            value = statistics.median(run[name] for run in runs)
            goal = f"< {GOAL_MATCH_MS:g} ms" if name == "match" else ""
            met = value < GOAL_MATCH_MS if goal else None
            what = f"{settings.tokens:,} tokens: {name}, page size {page_size}"
            report.rows.append(Row(what, value, None, "ms", goal, met))
    few, many = max(settings.families, settings.keys // 100), settings.keys
    for page_size in (64, 16):
        lengths = (settings.key_tokens, page_size, settings.families)
        small = [many_keys(few, *lengths) for _ in range(settings.repeats)]
        large = many_keys(many, *lengths)
        for name, value in large.items():
            base = statistics.median(run[name] for run in small)
            what = f"{settings.key_tokens} tokens: {name}, page size {page_size}"
            report.rows.append(Row(f"{what}, {few:,} keys", base, None, "us"))
            goal = f"< {GOAL_GROWTH:g} x the above"
            met = value < GOAL_GROWTH * base
            report.rows.append(Row(f"{what}, {many:,} keys", value, None, "us", goal, met))
    report.notes.append("with many keys, each figure is the median over thousands of operations.")
    show(report, markdown=settings.markdown)
    return report


if __name__ == "__main__":
    main()
