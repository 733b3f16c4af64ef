"""What a step computes, as one word: shared by planning and compute."""

from __future__ import annotations

import enum


class ForwardMode(enum.Enum):
    """What a batch computes: new prompt tokens, one token each, that and drafts, prompts
    beside decodes, or nothing (padding)."""

    EXTEND = "extend"
    DECODE = "decode"
    TARGET_VERIFY = "target_verify"
    MIXED = "mixed"
    IDLE = "idle"
