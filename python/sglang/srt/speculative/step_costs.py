"""What a step of decoding requests costs by its number of tokens, learnt from timed steps.

And what drafting costs, where a model does it.

Drafts are worth a step's longer time only where it is not much longer. How much depends on model,
machine, batch and context, so it is measured while the server runs, on rank 0 for all.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Final

# Before anything is known: a token more costs this part of a step of one token.
_FIRST_SLOPE: Final = 0.1
# The first steps of a size are recorded or compiled: their times say nothing of the next.
_FIRST_STEPS: Final = 2
# A step may be slow for reasons of its own (another process); it is never fast for such. So faster
# ones are believed sooner.
_BELIEF_FASTER, _BELIEF_SLOWER = 0.5, 0.1
# After so many steps of other sizes a time is forgotten: it may have been bad luck.
_FORGET_STEPS: Final = 500


@dataclass(slots=True)
class _Seen:
    """Steps of a size: how many, what they take, and when the last one was (in steps)."""

    count: int = 0
    seconds: float = 0.0
    last: int = 0


class StepCosts:
    """Seconds of a step by its tokens; what was not seen lies between what was, on a line.

    Invariant: `_sizes` are the sizes in ascending order whose seconds are known.
    """

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._sizes: list[int] = []
        self._num_steps = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Note a step of decoding requests alone."""
        self._num_steps += 1
        seen = self._seen.setdefault(num_tokens, _Seen())
        seen.count += 1
        seen.last = self._num_steps
        if seen.count <= _FIRST_STEPS:
            return
        if num_tokens not in self._sizes:
            insort(self._sizes, num_tokens)
            seen.seconds = seconds
        belief = _BELIEF_FASTER if seconds < seen.seconds else _BELIEF_SLOWER
        seen.seconds += belief * (seconds - seen.seconds)
        self._forget()

    def seconds(self, num_tokens: int) -> float:
        """What a step of so many tokens takes, by what is known; in any unit before the first."""
        sizes = self._sizes
        at = bisect_left(sizes, num_tokens)
        if at < len(sizes) and sizes[at] == num_tokens:
            return self._seen[num_tokens].seconds
        if not sizes:
            return _first_cost(num_tokens)
        low, high = sizes[max(0, at - 1)], sizes[min(at, len(sizes) - 1)]
        if low < num_tokens < high:
            part = (num_tokens - low) / (high - low)
            return (1 - part) * self._seen[low].seconds + part * self._seen[high].seconds
        # Outside of what is known: as steep as what is assumed, from the nearest.
        return self._seen[low].seconds * _first_cost(num_tokens) / _first_cost(low)

    @property
    def is_known(self) -> bool:
        """Whether `seconds` are seconds."""
        return bool(self._sizes)

    def _forget(self) -> None:
        oldest = self._num_steps - _FORGET_STEPS
        if any(self._seen[size].last < oldest for size in self._sizes):
            self._sizes = [size for size in self._sizes if self._seen[size].last >= oldest]

    def __repr__(self) -> str:
        known = ", ".join(
            f"{size}: {1e3 * self._seen[size].seconds:.2f} ms" for size in self._sizes
        )
        return f"StepCosts({known})"


class DraftedCosts:
    """Seconds of a step's parts: the model's own, and those of a draft model beside it.

    `step_part` is that of `ModelRules`; 0: drafts cost nothing.
    """

    def __init__(self, step_part: float) -> None:
        self._step_part = step_part
        self._own = StepCosts()
        self._drafting = StepCosts()

    def observe(
        self,
        num_tokens: int,
        seconds: float,
        *,
        drafting_s: float = 0.0,
        num_rows: int = 0,
        num_ahead: int = 0,
    ) -> None:
        """Note a step of decoding requests alone.

        Of its `seconds` drafting took `drafting_s`, for `num_ahead` tokens of each of the
        `num_rows` that were drafted, or of those with the longest drafts.
        """
        self._own.observe(num_tokens, max(0.0, seconds - drafting_s))
        if num_ahead:
            self._drafting.observe(num_rows, drafting_s / num_ahead)

    def seconds(self, num_tokens: int) -> float:
        """Of the model's own part, see `StepCosts.seconds`."""
        return self._own.seconds(num_tokens)

    def ahead_s(self, num_rows: int) -> float:
        """What it takes to draft one token more of `num_rows` requests, in the same unit."""
        if self._own.is_known and self._drafting.is_known:
            return self._drafting.seconds(num_rows)
        return self._step_part * self._own.seconds(num_rows)

    def __repr__(self) -> str:
        return f"DraftedCosts({self._own!r}, {self._drafting!r})"


def _first_cost(num_tokens: int) -> float:
    return 1 + _FIRST_SLOPE * (num_tokens - 1)
