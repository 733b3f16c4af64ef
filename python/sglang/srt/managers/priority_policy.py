"""Decisions about priorities as pure functions: how urgent a request is, and who gives way to it.

With priority scheduling off every request is equally urgent, and nothing here is asked. See
docs/structures.md, Note [Priorities].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sglang.srt.managers.schedule_batch import Req, ReqState
from sglang.srt.managers.schedule_policy import retraction_cost

# Below every priority that can be named, by more than any of them differ.
LEAST_URGENT = -(1 << 40)


@dataclass(frozen=True, slots=True)
class PriorityRules:
    """What --enable-priority-scheduling and the flags beside it ask for.

    `low_first`: the lowest value is the most urgent. `default` None: who names no priority comes
    after all who do. `threshold` None: nobody takes a running request's place.
    """

    low_first: bool = False
    default: int | None = None
    threshold: int | None = 10

    def urgency(self, priority: int | None) -> int:
        """A request's place among others, the highest first; `priority` None: it named none."""
        value = self.default if priority is None else priority
        if value is None:
            return LEAST_URGENT
        return -value if self.low_first else value

    def preemptible(self, running: Iterable[Req], urgency: int) -> list[Req]:
        """Running requests that one of `urgency` may take the place of, in the order given."""
        if self.threshold is None:
            return []
        # Equals never: they would take each other's place in turn.
        least = max(1, self.threshold)
        return [req for req in running if urgency - req.urgency >= least]


def plan_preemption(preemptible: Sequence[Req], fits: Callable[[Sequence[Req]], bool]) -> list[Req]:
    """Which of `preemptible` to retract so that a request fits; none when not even all help.

    `fits` tells whether it would without the given ones; without more of them it fits all the
    more. Least urgent first, then those with the fewest tokens to compute again; nobody is in the
    plan without whom it would do.
    """
    if not preemptible or not fits(preemptible):
        return []
    plan: list[Req] = []
    for req in sorted(preemptible, key=retraction_cost):
        if fits(plan):
            break
        plan.append(req)
    for req in plan[::-1]:
        rest = [other for other in plan if other is not req]
        if fits(rest):
            plan = rest
    return plan


def choose_displaced(waiting: Iterable[Req], urgency: int) -> Req | None:
    """Who leaves a full queue for a newcomer of `urgency`; None: nobody is less urgent.

    The least urgent; of those one that was never admitted before one that was retracted, whose
    tokens would be lost; then the newest.
    """
    below = [req for req in waiting if req.urgency < urgency]
    return min(
        below,
        key=lambda req: (req.urgency, req.state is ReqState.RETRACTED, -req.arrival),
        default=None,
    )
