"""Parameters that are tried with one another: which pairs everyday, which only in the slow run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def crossed(firsts: Sequence[Any], seconds: Sequence[Any], *, each: int = 1) -> list[Any]:
    """All pairs; slow are those of the later firsts, but for `each` seconds of everyone.

    Everyday the first of `firsts` meets all of `seconds`, and every other one meets `each` of
    them: the next ones in turn, so that they are spread. Where the firsts are a fixture's, say its
    scope as well, or it is set up for each test.
    """
    pairs = []
    for place, first in enumerate(firsts):
        kept = {(each * (place - 1) + step) % len(seconds) for step in range(each)}
        for number, second in enumerate(seconds):
            marks = [] if place == 0 or number in kept else [pytest.mark.slow]
            pairs.append(pytest.param(first, second, marks=marks))
    return pairs


def mostly_slow(everyday: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Values that are tried everyday, then those that only the slow run tries."""
    return [*everyday, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]
