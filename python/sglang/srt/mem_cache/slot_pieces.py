"""How the slots of a step's new tokens lie: whether they exist, and in which ranges.

Pools ask before they write; nothing is written here.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from sglang.srt.errors import InvariantError

# More pieces than this in one write and scattered copying is the cheaper way.
_MAX_COPY_PIECES: Final = 8

Piece = tuple[int, int, int]
"""First row, first slot, count."""


def check_slots_below(loc: torch.Tensor, num_slots: int) -> None:
    """Raises InvariantError unless every slot of int64 `loc` is in [0, num_slots)."""
    # Read without a sign a negative number is larger than any slot: one look for both bounds.
    if len(loc) and int(loc.numpy().view(np.uint64).max()) >= num_slots:
        raise InvariantError(f"new tokens were given slots outside [0, {num_slots})")


def find_pieces(loc: torch.Tensor) -> list[Piece] | None:
    """The ranges of slots in int64 `loc` [T], in order; None: they are too many."""
    if len(loc) == 0:
        return []
    breaks = torch.nonzero(loc[1:] - loc[:-1] != 1).flatten()
    if len(breaks) >= _MAX_COPY_PIECES:
        return None
    starts = [0, *(int(row) + 1 for row in breaks)]
    ends = [*starts[1:], len(loc)]
    return [(row, int(loc[row]), end - row) for row, end in zip(starts, ends, strict=True)]
