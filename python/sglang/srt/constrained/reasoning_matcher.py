"""Lets a model reason before its text is held to a grammar, and bounds how long.

Until the end marker of its reasoning was generated a text is free; behind the marker it begins
anew for the grammar. When a budget of reasoning is used up, its end marker is forced. Used by
whoever admits a request to the sampler, in place of the grammar's own matcher. What was read is in
the tokens alone, so a replay after a retraction, and every rank, come to the same.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np

from sglang.srt.constrained.grammar import BitArray, Grammar, TokenMatcher
from sglang.srt.sampling.sampling_params import ReasoningFirst


class _Stage(enum.Enum):
    OPENING = enum.auto()  # reasoning if the begin marker comes, else the grammar's text
    FREE = enum.auto()
    HELD = enum.auto()


class ReasoningMatcher(TokenMatcher):
    """A `TokenMatcher` that begins behind `reasoning`, of at most `budget` tokens (None: any).

    While the text is free all may follow but what would end it, and tokens that say more than the
    rest of the end marker: the grammar's text begins with a token. Before free text these may
    follow, too. A model that never ends its reasoning ends by its limit, or behind the budget: then
    only the end marker may follow, in the fewest tokens that the vocabulary has for it.
    """

    def __init__(
        self, grammar: Grammar, reasoning: ReasoningFirst, budget: int | None = None
    ) -> None:
        super().__init__(grammar.fresh(), grammar.vocabulary)
        self._grammar = grammar
        self._begin = reasoning.begin.encode()
        self._end = reasoning.end.encode()
        self._budget = budget
        self._stage = _Stage.FREE if reasoning.inside else _Stage.OPENING
        self._said = b""  # OPENING: so far; FREE: the last of it, shorter than the end marker
        self._fits = True  # OPENING: the grammar has taken what was said, too
        self._num_thought = 0  # tokens of the reasoning, its begin marker not counted

    def hidden(self, stops: Sequence[int] | None = None) -> BitArray | None:
        """See `TokenMatcher`."""
        if self._stage is _Stage.FREE and self.error is None:
            return self._hidden_in_reasoning(stops)
        if self._stage is not _Stage.OPENING or self.error is not None:
            return super().hidden(stops)
        bits = super().hidden(stops) if self._fits else np.ones(self._vocab_size, np.uint8)
        if bits is not None:
            bits[self._vocabulary.beginnings(self._begin, len(self._said))] = 0
        return bits

    def accept(self, token_id: int) -> None:
        """See `TokenMatcher`."""
        if self._stage is _Stage.HELD or self.error is not None:
            super().accept(token_id)
            return
        spelling = self._vocabulary.spelling(token_id)
        if self._stage is _Stage.FREE:
            self._num_thought += 1
            self._read(spelling)
            return
        said = self._said + spelling
        if self._matcher is None:
            said = said.lstrip()  # as the parser of reasoning passes over white space
        if said.startswith(self._begin):
            self._stage, self._said = _Stage.FREE, b""
            if self._begin != said:
                self._read(said[len(self._begin) :])
        elif (spelling or self._matcher is None) and self._begin.startswith(said):
            self._said = said
            self._fits = self._fits and self._takes(token_id)
        elif self._fits:
            self._stage = _Stage.HELD
            super().accept(token_id)
        else:
            self.error = f"token {token_id} is not allowed"

    def _takes(self, token_id: int) -> bool:
        """Let the grammar go on with a token, too, if it allows that."""
        return self._matcher is None or self._matcher.try_consume_tokens([token_id]) == 1

    def _read(self, spelling: bytes) -> None:
        """Reasoning goes on; behind its end marker the grammar begins."""
        said = self._said + spelling
        at = said.find(self._end)
        if at < 0:
            self._said = said[-(len(self._end) - 1) :]
            return
        self._stage, self._said = _Stage.HELD, b""
        self._matcher = self._grammar.fresh()
        if at + len(self._end) < len(said) and self._matcher is not None:
            self.error = "text follows the end of the reasoning within its token"

    def _hidden_in_reasoning(self, stops: Sequence[int] | None) -> BitArray | None:
        said, end = self._said, self._end
        known = next(n for n in range(len(end) - 1, -1, -1) if said.endswith(end[:n]))
        if self._budget is not None and self._num_thought >= self._budget:
            closings = self._vocabulary.closings(end, known)
            if len(closings):  # a vocabulary may be unable to say it
                bits = np.ones(self._vocab_size, np.uint8)
                bits[closings] = 0
                return bits
        if self._matcher is None:
            return None if stops is None else self._only_hides(stops)
        bits = self._only_hides(stops or ())
        bits[self._vocabulary.overruns(end, known)] = 1
        return bits


def start_matcher(
    grammar: Grammar, reasoning: ReasoningFirst | None, budget: int | None = None
) -> TokenMatcher:
    """A matcher at the beginning of a text, behind the reasoning that comes first (None: none).

    `budget` is how many tokens that may have; None: any number.
    """
    return grammar.matcher() if reasoning is None else ReasoningMatcher(grammar, reasoning, budget)
