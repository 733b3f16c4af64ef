"""Drafts for the decoding requests of a step: who gets how many tokens, and what is taken of them.

The scheduler asks it between choosing a step and placing it. Drafts cost a step tokens and never a
request its place: they end before its limits, and where they have no room they are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sglang.srt.managers.schedule_batch import Follow, Req, ScheduledReq
from sglang.srt.managers.step_time import StepTime
from sglang.srt.speculative.draft_plan import Offer, may_gain, plan_lengths
from sglang.srt.speculative.model_drafts import MOST_BEHIND, ModelDrafts, ModelRules
from sglang.srt.speculative.ngram_drafts import NgramDrafts, NgramRules
from sglang.srt.speculative.step_costs import DraftedCosts

Int64Array = npt.NDArray[np.int64]
DraftRules = NgramRules | ModelRules

_EXPECTED_ANSWER = 4096
_NOTHING = Offer(0.0, 0)


class DraftPolicy:
    """Drafts by `rules`, or none (None). Knows what steps cost, as far as it was told."""

    def __init__(self, rules: DraftRules | None) -> None:
        self._rules = rules
        self._costs = DraftedCosts(rules.step_part if isinstance(rules, ModelRules) else 0.0)

    def start(self, req: Req) -> None:
        """Let a request that has just arrived be drafted; an answer of one token has no use for it,
        and one that edits its logits may not be."""
        rules = self._rules
        if isinstance(rules, ModelRules):
            req.num_followed = 0
        if rules is None or req.max_new_tokens < 2:
            return
        edited = req.params.has_penalties or req.params.held_to is not None
        if edited and not rules.drafts_edited:
            return
        if isinstance(rules, ModelRules):
            req.drafts = ModelDrafts(rules)
        else:
            expected = req.prompt_len + min(req.max_new_tokens, _EXPECTED_ANSWER)
            req.drafts = NgramDrafts(rules, expected)

    def observe(self, time: StepTime) -> None:
        """Note what a step took; one with prompts tells nothing."""
        if self._rules is not None and time.num_tokens and not time.num_prefill_tokens:
            self._costs.observe(
                time.num_tokens,
                time.seconds,
                drafting_s=time.drafting_s,
                num_rows=time.num_drafted,
                num_ahead=time.num_ahead,
            )

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
        ahead_s = self._costs.ahead_s(len(decodes))
        if not may_gain(len(decodes), rules.max_draft_tokens, seconds, most, ahead_s):
            return decodes
        offers = [_offer_of(item.req, context_length) for item in decodes]
        lengths = plan_lengths(offers, seconds, most, ahead_s)
        if ahead:
            return None if any(lengths) else decodes
        pairs = zip(decodes, lengths, strict=True)
        return [_drafted(item, length) for item, length in pairs]

    def followed(self, items: tuple[ScheduledReq, ...]) -> tuple[ScheduledReq, ...]:
        """The same parts of a step, each with what the draft model computes beside it."""
        rules = self._rules
        if not isinstance(rules, ModelRules):
            return items
        hidden = rules.reads_hidden
        return tuple(replace(item, follow=_follow(item, reads_hidden=hidden)) for item in items)

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


def _follow(item: ScheduledReq, *, reads_hidden: bool) -> Follow | None:
    """What the draft model computes in this step: all that it lacks and can have, or nothing.

    It must know a text before it can go on with it, and prompts for whoever shares them; where
    tokens come one by one it may be behind. One that `reads_hidden` states computes at a token's
    place what follows it, so the last known token has to wait.
    """
    done = item.req.num_followed
    if done is None:
        return None
    prompt = item.is_extend and not item.from_relay and not item.draft
    end = item.start + item.num_tokens - len(item.draft)
    if not prompt and not item.draft:
        end = item.start  # the token there may not be known yet
    end -= reads_hidden
    wanted = 1 if prompt or item.draft else MOST_BEHIND
    if end - done < wanted:
        return None
    # To say a token takes the one before: the last of a draft is not computed. What was made of
    # states that the model had no part in is made again.
    reached = end if reads_hidden else end + max(0, len(item.draft) - 1)
    return Follow(done, end, reached)


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
