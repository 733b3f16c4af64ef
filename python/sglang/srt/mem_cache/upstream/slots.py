"""Between slots, which SGLang's API speaks, and pages, which ours does. Arrays in, arrays out."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


def as_int64(values: Any) -> Int64Array:
    """A tensor, an array or a list of whole numbers as int64 [n]; copies only at need."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, np.int64).reshape(-1)


def slots_of_pages(pages: Int32Array, page_size: int) -> Int64Array:
    """All slots of `pages` in order, int64 [len(pages) * page_size]."""
    return (pages.astype(np.int64)[:, None] * page_size + np.arange(page_size)).reshape(-1)


def pages_of_slots(slots: Int64Array, page_size: int) -> Int32Array:
    """The pages that `slots` lie in, each once, int32; in order where the slots are in order."""
    pages = slots // page_size
    if len(pages) == 0:
        return np.empty(0, np.int32)
    steps = np.diff(pages)
    if (steps >= 0).all():
        pages = pages[np.concatenate([[True], steps != 0])]
    else:
        pages = np.unique(pages)
    return pages.astype(np.int32)


def pages_in_order(slots: Int64Array, page_size: int) -> Int32Array:
    """Pages of whole-page `slots`, int32 [len(slots) / page_size], in the order of positions.

    Raises ValueError unless each page's slots stand together and in order.
    """
    pages = slots[::page_size] // page_size
    count = len(slots) // page_size
    if len(slots) % page_size or (slots != slots_of_pages(pages.astype(np.int32), page_size)).any():
        raise ValueError("slots are not whole pages in order")
    return pages[:count].astype(np.int32)
