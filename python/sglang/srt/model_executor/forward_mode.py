"""What a step computes, as one word: shared by planning and compute."""

from __future__ import annotations

import enum


class ForwardMode(enum.Enum):
    """What a batch computes: new prompt tokens, one token each, both, or nothing (padding)."""

    EXTEND = "extend"
    DECODE = "decode"
    MIXED = "mixed"
    IDLE = "idle"
