"""How often drafted tokens of a kind are right, what is long past counting less."""

from __future__ import annotations

from typing import Final

# What is assumed counts as much as so many tokens seen; what was seen fades.
_ASSUMED_WEIGHT: Final = 2.0
_FADING: Final = 0.9
_IDLE_FADING: Final = 0.98


class Chance:
    """The chance of a token to be right when all before it were; `assumed` until one was seen."""

    def __init__(self, assumed: float) -> None:
        self._assumed = assumed
        self._right = self._wrong = 0.0

    @property
    def value(self) -> float:
        right = self._right + _ASSUMED_WEIGHT * self._assumed
        return right / (self._right + self._wrong + _ASSUMED_WEIGHT)

    def note(self, right: int, wrong: int) -> None:
        """Tokens of one draft that were taken, and whether (0 or 1) one was not."""
        self._fade(_FADING)
        self._right += right
        self._wrong += wrong

    def rest(self) -> None:
        """Believe less in what was seen, so that what went wrong is tried again."""
        self._fade(_IDLE_FADING)

    def _fade(self, factor: float) -> None:
        self._right *= factor
        self._wrong *= factor
