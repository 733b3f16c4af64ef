"""Whether and how the priorities of requests order them.

A part of `ServerArgs`, which says how fields are flags.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.configs.flag_spec import flag

PRIORITIES = "Priorities of requests"

# The field `priority` of a request lies within plus and minus this.
MAX_PRIORITY = 1 << 31


@dataclass(frozen=True)
class PriorityArgs:
    """Settings of priority scheduling; docs/structures.md, Note [Priorities], has the rules."""

    enable_priority_scheduling: bool = flag(
        False,
        "Serve waiting requests by their field priority, the highest value first, and only then "
        "by --schedule-policy. Low ones may wait for ever.",
        group=PRIORITIES,
    )
    schedule_low_priority_values_first: bool = flag(
        False, "The lowest value is the most urgent, not the highest.", group=PRIORITIES
    )
    default_priority_value: int | None = flag(
        None,
        "Priority of requests that name none.",
        group=PRIORITIES,
        parse=int,
        default_text="less urgent than any that is named",
        metavar="N",
        minimum=-MAX_PRIORITY,
        maximum=MAX_PRIORITY,
    )
    priority_scheduling_preemption_threshold: int = flag(
        10,
        "A waiting request that has no room takes the place of running ones that are less urgent "
        "by at least so much; theirs is computed again later.",
        group=PRIORITIES,
        parse=int,
        metavar="N",
        minimum=0,
    )
    disable_priority_preemption: bool = flag(
        False, "Let no waiting request take the place of a running one.", group=PRIORITIES
    )
    abort_on_priority_when_disabled: bool = flag(
        False,
        "Refuse requests that name a priority, unless --enable-priority-scheduling is set.",
        group=PRIORITIES,
    )

    @property
    def refuses_priority(self) -> bool:
        """Whether requests that name a priority are refused."""
        return self.abort_on_priority_when_disabled and not self.enable_priority_scheduling
