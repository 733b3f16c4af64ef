"""Drafts of one request from its own text: what followed when its newest tokens stood there before.

Answers repeat their prompts (quotes, summaries, edits of code, fields of records) and themselves,
and then the next tokens are there to be read (prompt lookup, or n-gram speculation). A request that
is drafted owns one `NgramDrafts`: it is asked for an offer before a decode step, for as much of it
as the step has use for, and told how many tokens the model took. It goes by counts of tokens alone,
so that all ranks draft alike. See docs/speculative_decoding.md.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang.srt.speculative.chance import Chance
from sglang.srt.speculative.draft_plan import Offer
from sglang.srt.speculative.ngram_index import Match, NgramIndex

Int32Array = npt.NDArray[np.int32]

# Positions that are indexed at a time, so that a long cached prompt holds up no step.
_INDEX_TOKENS = 1 << 14
# Matches of so many tokens at least, and the chance of a token after one that nothing is known of.
_CLASSES = ((8, 0.8), (4, 0.55), (0, 0.3))


@dataclass(frozen=True, slots=True)
class NgramRules:
    """How all requests of a server are drafted.

    At most `max_draft_tokens` for one request, where at least `min_match` of its newest tokens,
    of `max_match` that are compared, stood before. A step with drafts has at most `max_step_tokens`
    tokens. `drafts_edited`: also requests whose logits depend on the tokens sampled before
    (penalties, grammars).
    """

    max_draft_tokens: int
    min_match: int
    max_match: int
    max_step_tokens: int
    drafts_edited: bool


class NgramDrafts:
    """The index of one request's tokens, and how its drafts fared.

    Long matches are more often right than short ones, so chances are kept for each class of
    lengths. `num_verified` counts drafts, `num_proposed` their tokens and `num_correct` those that
    the model took.
    """

    def __init__(self, rules: NgramRules, expected_tokens: int) -> None:
        self.num_verified = 0
        self.num_proposed = 0
        self.num_correct = 0
        self._rules = rules
        self._expected_tokens = expected_tokens
        self._index: NgramIndex | None = None  # made when it is filled: many wait
        self._chances = tuple(Chance(assumed) for _, assumed in _CLASSES)
        self._match: Match | None = None  # that of the offer

    def index(self, tokens: Int32Array, end: int) -> None:
        """Take in tokens before position `end`, a bounded number of them; the rest another time."""
        self._filled(tokens, end)

    def offer(self, tokens: Int32Array, room: int) -> Offer:
        """What may be drafted behind `tokens`, all that are known, within `room` tokens.

        Side effect: takes in what was not indexed yet, the newest token excepted.
        """
        index = self._filled(tokens, len(tokens) - 1)
        most = min(room, self._rules.max_draft_tokens)
        self._match = index.find(tokens, self._rules.max_match) if most > 0 else None
        if self._match is None:
            return Offer(0.0, 0)
        return Offer(self._chance_of(self._match).value, most)

    def take(self, tokens: Int32Array, count: int) -> tuple[int, ...]:
        """The first `count` tokens of the offer, fewer where an image follows; () for none."""
        if self._match is None or count == 0:
            for chance in self._chances:
                chance.rest()
            return ()
        # A match that reaches the end goes on with what it drafts: text that repeats itself.
        place = self._match.next_position
        found = np.resize(tokens[place : place + count], count).tolist()
        # A number below 0 stands for a part of an image, which no model says.
        return tuple(itertools.takewhile(lambda token: token >= 0, found))

    def note(self, num_proposed: int, num_correct: int) -> None:
        """What became of the tokens that were taken of the last offer."""
        self.num_verified += 1
        self.num_proposed += num_proposed
        self.num_correct += num_correct
        if self._match is not None:
            self._chance_of(self._match).note(num_correct, int(num_correct < num_proposed))

    def _filled(self, tokens: Int32Array, end: int) -> NgramIndex:
        """The index, with what `index` takes in."""
        if self._index is None:
            self._index = NgramIndex(self._rules.min_match, self._expected_tokens)
        self._index.extend(tokens, min(end, self._index.num_indexed + _INDEX_TOKENS))
        return self._index

    def _chance_of(self, match: Match) -> Chance:
        return next(
            chance
            for (least, _), chance in zip(_CLASSES, self._chances, strict=True)
            if match.length >= least
        )

    def __repr__(self) -> str:
        chances = ", ".join(f"{chance.value:.2f}" for chance in self._chances)
        return f"NgramDrafts({self._index!r}, {chances}, {self.num_correct}/{self.num_proposed})"
