"""Where a step's new tokens are written: slots checked against a plane, and cut into ranges.

Called by the KV pools once a step; `loc` are int64 [T] slots.
"""

from __future__ import annotations

import numpy as np
import torch

from sglang.srt.errors import InvariantError

# More pieces than this in one write and scattered copying is the cheaper way.
_MAX_COPY_PIECES = 8

Piece = tuple[int, int, int]


def check_slots(loc: torch.Tensor, num_slots: int) -> None:
    """Raises InvariantError unless all of `loc` are below `num_slots` and none is negative."""
    # Read without a sign a negative number is larger than any slot: one look for both bounds.
    if len(loc) and int(loc.numpy().view(np.uint64).max()) >= num_slots:
        raise InvariantError(f"new tokens were given slots outside [0, {num_slots})")


def find_pieces(loc: torch.Tensor) -> list[Piece] | None:
    """(first row, first slot, count) of the ranges in `loc`; None when there are too many."""
    if len(loc) == 0:
        return []
    breaks = torch.nonzero(loc[1:] - loc[:-1] != 1).flatten()
    if len(breaks) >= _MAX_COPY_PIECES:
        return None
    starts = [0, *(int(row) + 1 for row in breaks)]
    ends = [*starts[1:], len(loc)]
    return [(row, int(loc[row]), end - row) for row, end in zip(starts, ends, strict=True)]
