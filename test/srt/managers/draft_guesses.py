"""Stands in for `NgramDrafts`: guesses that are right as often as a test wants."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from sglang.srt.speculative.draft_plan import Offer
from sglang.srt.speculative.ngram_drafts import NgramRules

RULES = NgramRules(
    max_draft_tokens=7, min_match=1, max_match=8, max_step_tokens=64, drafts_edited=True
)
# What must follow the tokens so far, so many of it.
Follow = Callable[[list[int], int], list[int]]


class GuessingDrafts:
    """Knows what must follow, and is wrong from a random place on, once in `1 / odds` tokens.

    `skips`: the part of the offers that are empty.
    """

    def __init__(self, follow: Follow, dice: random.Random, odds: float, skips: float) -> None:
        self._follow, self._dice, self._odds, self._skips = follow, dice, odds, skips
        self.num_verified = self.num_proposed = self.num_correct = 0

    def index(self, tokens: np.ndarray, end: int) -> None:
        assert 0 <= end < max(1, len(tokens))

    def offer(self, tokens: np.ndarray, room: int) -> Offer:
        most = 0 if self._dice.random() < self._skips else self._dice.randrange(1, 8)
        return Offer(1.0, max(0, min(most, room)))

    def take(self, tokens: np.ndarray, count: int) -> tuple[int, ...]:
        known = tokens.tolist()
        guessed = self._follow(known, count)
        assert len(guessed) == count
        return tuple(
            abs(token - 1) if self._dice.random() < self._odds else token for token in guessed
        )

    def note(self, num_proposed: int, num_correct: int) -> None:
        assert 0 <= num_correct <= num_proposed > 0
        self.num_verified += 1
        self.num_proposed += num_proposed
        self.num_correct += num_correct


def guess(
    monkeypatch: pytest.MonkeyPatch,
    follow: Follow,
    *,
    odds: float = 0.2,
    skips: float = 0.2,
    seed: int = 0,
) -> None:
    """Let all requests be drafted by guesses; the same ones on every rank."""

    def make(rules: NgramRules, expected_tokens: int) -> GuessingDrafts:
        return GuessingDrafts(follow, random.Random(seed + expected_tokens), odds, skips)

    monkeypatch.setattr("sglang.srt.managers.draft_policy.NgramDrafts", make)
