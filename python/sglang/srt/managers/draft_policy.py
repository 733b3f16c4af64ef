"""Drafts for the decoding requests of a step: who gets how many tokens, and what is taken of them.

The scheduler asks it between choosing a step and placing it. Drafts cost a step tokens and never a
request its place: they end before its limits, and where they have no room they are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sglang.srt.managers.schedule_batch import Req, ScheduledReq
from sglang.srt.speculative.draft_plan import Offer, may_gain, plan_lengths
from sglang.srt.speculative.ngram_drafts import NgramDrafts, NgramRules
from sglang.srt.speculative.step_costs import StepCosts

Int64Array = npt.NDArray[np.int64]

_EXPECTED_ANSWER = 4096
_NOTHING = Offer(0.0, 0)


class DraftPolicy:
    """Drafts by `rules`, or none (None). Knows what steps cost, as far as it was told."""

    def __init__(self, rules: NgramRules | None) -> None:
        self._rules = rules
        self._costs = StepCosts()

    def start(self, req: Req) -> None:
        """Let a request that has just arrived be drafted; an answer of one token has no use for it,
        and one that edits its logits may not be."""
        rules = self._rules
        if rules is None or req.max_new_tokens < 2:
            return
        edited = req.params.has_penalties or req.params.held_to is not None
        if rules.drafts_edited or not edited:
            expected = req.prompt_len + min(req.max_new_tokens, _EXPECTED_ANSWER)
            req.drafts = NgramDrafts(rules, expected)

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Note what a step without prompts took."""
        if self._rules is not None and num_tokens:
            self._costs.observe(num_tokens, seconds)

    def with_drafts(
        self, decodes: Sequence[ScheduledReq], context_length: int, *, ahead: bool
    ) -> Sequence[ScheduledReq] | None:
        """The same decodes, drafted where their text says what may follow and a step gains by it.

        `ahead`: a step is under way, whose results would be missing in the drafts. None: there is
        something to draft, so it is better to wait for them.
        """
        rules = self._rules
        if rules is None or not decodes:
            return decodes
        most, seconds = rules.max_step_tokens, self._costs.seconds
        if not may_gain(len(decodes), rules.max_draft_tokens, seconds, most):
            return decodes
        offers = [_offer_of(item.req, context_length) for item in decodes]
        lengths = plan_lengths(offers, seconds, most)
        if ahead:
            return None if any(lengths) else decodes
        pairs = zip(decodes, lengths, strict=True)
        return [_drafted(item, length) for item, length in pairs]

    def index_prompts(self, items: Iterable[ScheduledReq]) -> None:
        """Take in what a step computes of prompts; takes time that the step takes, too."""
        for item in items:
            drafts = item.req.drafts
            if drafts is not None and not item.draft:
                tokens = item.req.tokens.view()
                drafts.index(tokens, min(item.start + item.num_tokens, len(tokens) - 1))


def without_drafts(decodes: Iterable[ScheduledReq]) -> list[ScheduledReq]:
    """The same decodes of one token each."""
    return [replace(item, num_tokens=1, draft=()) for item in decodes]


def num_taken(token_ids: Int64Array, expected: Sequence[int]) -> int:
    """How many of the tokens sampled at neighbouring places are a request's next ones.

    `expected[i]` is what was drafted to stand at place i: the place after it was computed for that
    token and no other. The last place has none.
    """
    taken = 1
    for token, wanted in zip(token_ids.tolist(), expected[:-1], strict=False):
        if token != wanted:
            break
        taken += 1
    return taken


def _offer_of(req: Req, context_length: int) -> Offer:
    """Within the request's own limit and the context's; one token more is sampled than drafted."""
    if req.drafts is None:
        return _NOTHING
    room = min(req.new_tokens_left(), context_length - req.known) - 1
    return req.drafts.offer(req.tokens.view(), room)


def _drafted(item: ScheduledReq, length: int) -> ScheduledReq:
    drafts = item.req.drafts
    draft = () if drafts is None else drafts.take(item.req.tokens.view(), length)
    return replace(item, num_tokens=1 + len(draft), draft=draft) if draft else item
