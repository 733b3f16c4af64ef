"""How tensor-parallel ranks agree on what came of a map or unmap: one small element-wise minimum.

Every rank makes the same plans from the same states, but its machine maps at its own pace and may
refuse. The votes of all tickets under way travel in one min-all-reduce at a step boundary; with
nothing under way nothing is sent. Owns the meaning of a vote, no memory and no communicator. See
docs/kv_segments.md, Note [Ranks agree on growth].
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol


class VoteStatus(enum.IntEnum):
    """What a rank says of a ticket. In this order, so that the minimum is the common answer:
    somebody still works, else somebody was refused, else all are done."""

    PENDING = 0
    REFUSED = 1
    DONE = 2


class Vote(NamedTuple):
    """One ticket's vote.

    `unmapped[g]`: group g's unmaps took place (somewhere, once agreed). `moved[g]`: all of its
    moves between the tiers did (everywhere, once agreed).
    """

    status: VoteStatus
    unmapped: tuple[bool, ...]
    moved: tuple[bool, ...]


class RankAgreement(Protocol):
    """The ranks' common minimum. All ranks call in the same order with equally long votes."""

    @property
    def size(self) -> int: ...

    def agree(self, votes: Sequence[int]) -> Sequence[int]:
        """The element-wise minimum of all ranks' votes; blocks until every rank has called."""


class SingleRank:
    """The agreement of one rank with itself: identity, no communication."""

    size = 1

    def agree(self, votes: Sequence[int]) -> Sequence[int]:
        """The votes themselves."""
        return votes


def agree_on(ranks: RankAgreement, votes: Sequence[Vote], num_groups: int) -> list[Vote]:
    """The agreed vote of each ticket; no round trip without tickets.

    A ticket is refused when any rank was refused, and an unmap took place when it did on any rank:
    memory that is gone on one can't be promised back, memory that stayed on another is harmless. A
    move took place when it did on all: what moved can be moved back.
    """
    if not votes:
        return []
    numbers = [n for vote in votes for n in _numbers(vote)]
    agreed = ranks.agree(numbers)
    width = 1 + 2 * num_groups
    found: list[Vote] = []
    for at in range(0, len(numbers), width):
        gone, moved = agreed[at + 1 : at + 1 + num_groups], agreed[at + 1 + num_groups : at + width]
        flags = tuple(tuple(bool(number) for number in some) for some in (gone, moved))
        found.append(Vote(VoteStatus(agreed[at]), *flags))
    return found


def _numbers(vote: Vote) -> tuple[int, ...]:
    """A vote as numbers whose minimum over the ranks is the common answer."""
    gone, moved = (-int(one) for one in vote.unmapped), (int(one) for one in vote.moved)
    return (vote.status, *gone, *moved)
