"""Decisions of the scheduler as pure functions of numbers: order, admission, chunks, victims.

Nothing here touches memory, a clock or a socket; the scheduler asks, then acts. Queues come the
most urgent first, equals in arrival order, and ties always fall to the earlier arrival, so that
every rank decides alike. Without priority scheduling all are equals (`priority_policy`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Sequence

from sglang.srt.managers.schedule_batch import Req, ReqState, ScheduledReq
from sglang.srt.mem_cache.kv_layout import num_pages_for

# Under lpm a request that was passed over this often goes first: a stream of better prefix hits
# must not starve anyone.
LPM_MAX_PASSED_OVER = 64
# lpm looks at no more than this many waiting requests; matching every one of a long queue each
# step costs more than the order gains.
LPM_MAX_QUEUE = 128


def service_key(req: Req) -> tuple[int, int]:
    """Sorts requests by who is served first: the most urgent, equals by arrival."""
    return (-req.urgency, req.arrival)


def order_waiting(
    waiting: Sequence[Req], policy: str, match_len: Callable[[Req], int]
) -> list[Req]:
    """Waiting requests, sorted by `service_key`, in the order of admission.

    `policy` "fcfs": as they come. "lpm": among the equally urgent the longest cached prefix
    first, those passed over `LPM_MAX_PASSED_OVER` times before; the queue's tail beyond
    `LPM_MAX_QUEUE` stays as it is behind.
    """
    if policy == "fcfs":
        return list(waiting)
    head, tail = waiting[:LPM_MAX_QUEUE], waiting[LPM_MAX_QUEUE:]

    def rank(req: Req) -> tuple[int, int, int, int]:
        if req.num_passed_over >= LPM_MAX_PASSED_OVER:
            return (-req.urgency, 0, 0, req.arrival)
        return (-req.urgency, 1, -match_len(req), req.arrival)

    return [*sorted(head, key=rank), *tail]


def pages_promised(
    req: Req,
    ends: Sequence[int],
    held: Sequence[int],
    page_size: int,
    window_pages: tuple[int | None, ...],
    *,
    full: bool,
    context_length: int = sys.maxsize,
) -> tuple[int, ...]:
    """Pages per group that `req` may still take beside those that its lease already has.

    `held[g]` are the pages that it has for itself, and its tables reach up to page `ends[g]` (both
    0 while it has none). `window_pages[g]`
    bounds what a window group holds at a time (None: the group keeps every token); the head that
    such a group dropped is neither held nor taken again. `full` counts every token of
    max_new_tokens instead of the clipped number. No request grows beyond `context_length`,
    whatever it asked for when the context was longer.
    """
    target = min(req.target_len(full=full), context_length)
    wanted = num_pages_for(target, page_size)
    promised = []
    for group, window in enumerate(window_pages):
        need = wanted if window is None else min(wanted, window)
        still_to_come = wanted - ends[group]
        promised.append(max(0, min(need - held[group], still_to_come)))
    return tuple(promised)


def total_pages(promised: Sequence[tuple[int, ...]], candidate: tuple[int, ...]) -> tuple[int, ...]:
    """The running requests' promises and the candidate's, added up per group."""
    return tuple(sum(pages) for pages in zip(candidate, *promised, strict=True))


def share_chunk_tokens(left: Sequence[int], budget: int, page_size: int) -> list[int]:
    """Split a step's prefill budget over requests in mid-prefill: max-min fair.

    `left[i]` tokens remain of prompt i. Short prompts are finished first from an equal share,
    what they leave goes to the others, so a huge prompt never delays a short one's first token.
    Shares that do not finish a prompt are whole pages (at least one when the budget has room).
    """
    shares = [0] * len(left)
    remaining = budget
    order = sorted((i for i in range(len(left)) if left[i] > 0), key=lambda i: (left[i], i))
    for position, i in enumerate(order):
        if remaining <= 0:
            break
        equal = max(1, remaining // (len(order) - position))
        take = min(left[i], equal)
        if take < left[i]:
            take = max(page_size, take - take % page_size)
            take = min(take, left[i], remaining)
        shares[i] = take
        remaining -= take
    return shares


def retraction_cost(req: Req) -> tuple[int, bool, int, bool, int]:
    """Sorts running requests by who gives up its place first.

    The least urgent; of those one without a full reservation, then the one with the fewest own
    computed tokens, decode before prefill on ties, then the newest.
    """
    return (
        req.urgency,
        req.needs_reservation,
        req.own_computed(),
        req.state is not ReqState.DECODE,
        -req.arrival,
    )


def choose_victim(running: Sequence[Req]) -> Req | None:
    """The running request to retract when pages run out, or None when nobody may be.

    Never the oldest of the most urgent. Scarcity so leaves it its pages until it ends, and only
    one that is more urgent yet may take its place: why everybody is served in the end is told in
    docs/structures.md, Note [Priorities].
    """
    if len(running) < 2:
        return None
    kept = min(running, key=service_key)
    return min((req for req in running if req is not kept), key=retraction_cost)


class ChunkSizer:
    """Adapts the prefill budget of a step so that a step stays near a target time.

    Fed with finished steps only, asked for the next budget; an explicit --chunked-prefill-size
    makes it constant (`adaptive` False). A step that others wait on aims at `target_s`, one of a
    prompt alone at `alone_s`: whoever arrives then waits for the steps under way, so they too are
    bounded, but longer, as long steps compute faster.

    A prompt's cost per token grows with its length, so a slower step is believed at once and a
    faster one (a short prompt beside the long one) by and by. A step well under the target is no
    reason for shorter ones: its few tokens paid for the weights and for others' decoding.
    """

    def __init__(
        self, max_tokens: int, page_size: int, target_s: float, alone_s: float, *, adaptive: bool
    ) -> None:
        self._max = max_tokens
        self._page = page_size
        self._target_s = target_s
        self._alone_s = alone_s
        self._adaptive = adaptive
        self._tokens_per_s: float | None = None

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Note a finished step by its prefill tokens; few of them say nothing about their speed."""
        if num_tokens < 16 or seconds <= 0:
            return
        rate = num_tokens / seconds
        old = self._tokens_per_s
        if seconds < self._target_s / 2 and (old is None or rate < old):
            return
        self._tokens_per_s = rate if old is None or rate < old else 0.7 * old + 0.3 * rate

    def next_budget(self, *, shared: bool) -> int:
        """Prefill tokens of the next step; `shared` when other requests wait on it."""
        if not self._adaptive or self._tokens_per_s is None:
            return self._max
        wanted = int(self._tokens_per_s * (self._target_s if shared else self._alone_s))
        return max(self._page, min(self._max, wanted - wanted % self._page))


def pages_expected(running: Collection[Req], chunk_tokens: int, page_size: int) -> int:
    """Pages that the next step may ask for in every group, so that memory maps ahead of it."""
    left = sum(req.extend_left for req in running)
    pages = num_pages_for(min(left, chunk_tokens), page_size) if left else 0
    return pages + len(running)


def step_candidates(
    running: Iterable[Req], chunks: ChunkSizer, *, context_length: int, page_size: int
) -> tuple[list[ScheduledReq], list[ScheduledReq]]:
    """Every running request's part of the next step: decoded tokens, shares of the prompt budget.

    No request decodes beyond `context_length`. Prompts share what `chunks` allows for the step.
    """
    decodes: list[ScheduledReq] = []
    prefills: list[Req] = []
    for req in running:
        if req.wants_decode(context_length):
            relay = req.num_scheduled >= req.known
            decodes.append(ScheduledReq(req, req.num_scheduled, 1, True, relay))
        elif req.state is ReqState.PREFILL and not req.is_ending and req.extend_left > 0:
            prefills.append(req)
    prefills.sort(key=service_key)
    budget = chunks.next_budget(shared=bool(decodes) or len(prefills) > 1)
    shares = share_chunk_tokens([req.extend_left for req in prefills], budget, page_size)
    extends = []
    for req, share in zip(prefills, shares, strict=True):
        if share:
            last = req.num_scheduled + share == req.known
            sample = last and req.new_tokens_left() > 0
            extends.append(ScheduledReq(req, req.num_scheduled, share, sample))
    return decodes, extends
