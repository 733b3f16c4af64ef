"""Drafts of one request by a second, smaller model: how many of its tokens are worth saying.

Which tokens they are the worker finds out, as part of the step that verifies them (see
model_executor/draft_model.py); here they are numbers. A request that is drafted owns one
`ModelDrafts`, asked and told as `NgramDrafts` is. See docs/speculative_decoding.md, Note [A draft
model].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sglang.srt.speculative.chance import Chance
from sglang.srt.speculative.draft_plan import Offer

Int32Array = npt.NDArray[np.int32]

# Stands in a draft for a token that the draft model has yet to say.
UNSAID: Final = 0
_ASSUMED = 0.7
# A request that is not drafted lets the draft model fall so many tokens behind: it reads its
# weights once for all of them.
MOST_BEHIND: Final = 32


@dataclass(frozen=True, slots=True)
class ModelRules:
    """How all requests of a server are drafted by a model.

    The first three as in `NgramRules`. `step_part`: what a step of the draft model is taken to cost
    before that was measured, as a part of a step of the model. `reads_hidden`: it goes on from the
    model's hidden states, not only from tokens.
    """

    max_draft_tokens: int
    max_step_tokens: int
    drafts_edited: bool
    step_part: float
    reads_hidden: bool = False


class ModelDrafts:
    """How the drafts of one request fared; counts are those of `NgramDrafts`."""

    def __init__(self, rules: ModelRules) -> None:
        self.num_verified = 0
        self.num_proposed = 0
        self.num_correct = 0
        self._rules = rules
        self._chance = Chance(_ASSUMED)

    def index(self, tokens: Int32Array, end: int) -> None:
        """Nothing: the draft model reads the text itself."""

    def offer(self, tokens: Int32Array, room: int) -> Offer:
        """What may be drafted behind `tokens` within `room` tokens."""
        del tokens  # any text can be drafted
        return Offer(self._chance.value, max(0, min(room, self._rules.max_draft_tokens)))

    def take(self, tokens: Int32Array, count: int) -> tuple[int, ...]:
        """Places of `count` tokens that are yet to be said; () for none."""
        del tokens
        if count == 0:
            self._chance.rest()
        return (UNSAID,) * count

    def note(self, num_proposed: int, num_correct: int) -> None:
        """What became of the tokens of the last draft."""
        self.num_verified += 1
        self.num_proposed += num_proposed
        self.num_correct += num_correct
        self._chance.note(num_correct, int(num_correct < num_proposed))

    def __repr__(self) -> str:
        return f"ModelDrafts({self._chance.value:.2f}, {self.num_correct}/{self.num_proposed})"
