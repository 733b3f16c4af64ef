"""How long the drafts of a step are: as long as they let it give the most tokens per second.

Pure arithmetic. With draft tokens that are each taken with probability p when all before them were,
a draft of k tokens adds p + p^2 + ... + p^k to the one token that a decode gives anyway (arXiv
2211.17192, section 3.1). The step gives them in the time that its number of tokens costs, so the
best total is the one with the highest quotient (goodput, arXiv 2406.14066).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

# Drafting keeps the host from preparing a step while the one before it is computed.
_LEAST_GAIN: Final = 1.05


class Offer(NamedTuple):
    """A request has up to `most` drafted tokens, each taken with probability `chance`."""

    chance: float
    most: int


def may_gain(
    num_decodes: int,
    max_draft: int,
    seconds: Callable[[int], float],
    max_tokens: int,
    ahead_s: float = 0.0,
) -> bool:
    """Whether drafts of some length would pay if all were right; else nobody need look for any.

    `ahead_s` as in `plan_lengths`.
    """
    plain = _LEAST_GAIN / seconds(num_decodes)
    lengths = range(1, min(max_draft, max_tokens // num_decodes - 1) + 1)
    return any(
        (1 + length) / (seconds(num_decodes * (1 + length)) + length * ahead_s) > plain
        for length in lengths
    )


def plan_lengths(
    offers: Sequence[Offer],
    seconds: Callable[[int], float],
    max_tokens: int,
    ahead_s: float = 0.0,
) -> list[int]:
    """Draft tokens of each of a step's decoding requests.

    `seconds(n)` is what a step of n tokens takes; it has no more than `max_tokens`. `ahead_s` is
    what it takes to find the next token of all drafts, once for each of the longest. Tokens are
    added one by one, the likeliest to be taken first, equals in order; the number with the best
    quotient stands, the smallest of equals.
    """
    num_decodes = len(offers)
    lengths = [0] * num_decodes
    if num_decodes == 0:
        return lengths
    heap = [(-offer.chance, i) for i, offer in enumerate(offers) if offer.most > 0]
    heapq.heapify(heap)
    gained = float(num_decodes)
    best = _LEAST_GAIN * gained / seconds(num_decodes)
    added: list[int] = []
    kept = longest = 0
    while heap and num_decodes + len(added) < max_tokens:
        chance, i = heapq.heappop(heap)
        gained -= chance
        lengths[i] += 1
        added.append(i)
        if lengths[i] < offers[i].most:
            heapq.heappush(heap, (chance * offers[i].chance, i))
        longest = max(longest, lengths[i])
        rate = gained / (seconds(num_decodes + len(added)) + longest * ahead_s)
        if rate > best:
            best, kept = rate, len(added)
    for i in added[kept:]:
        lengths[i] -= 1
    return lengths
