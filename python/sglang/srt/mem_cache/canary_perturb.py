"""Damage on purpose, one page of one group, so that a running server shows that its canary fires.

Asked for by `SGLANG_KV_CANARY_PERTURB`, made and applied by `managers/scheduler_canary.py` right
before a check. Never there otherwise. See docs/kv_segments.md, Note [Canary].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sglang.srt.mem_cache.block_table import BlockTable
from sglang.srt.mem_cache.canary import KVCanary
from sglang.srt.mem_cache.kv_layout import num_pages_for
from sglang.srt.mem_cache.page_owner import PageIndex, PageState

KINDS = ("mark", "table", "free", "byte")
_FORM = re.compile(rf"({'|'.join(KINDS)}):(\d+)@(\d+)")


@dataclass(frozen=True, slots=True)
class Perturbation:
    """What to damage: `kind`, in layer group `group`, at the first step from `step` on that can.

    mark: the mark of a page that is read is another one. table: two entries of a table are
    exchanged. free: a page that a running request reads is freed. byte: a stored key is changed,
    which only mode `full` can see.
    """

    kind: str
    group: int
    step: int

    @classmethod
    def parse(cls, text: str, num_groups: int, *, full: bool) -> Perturbation:
        """Read `kind:group@step`. Raises ValueError with one line for what can't be done."""
        name = "SGLANG_KV_CANARY_PERTURB"
        found = _FORM.fullmatch(text)
        if found is None:
            kinds = ", ".join(KINDS)
            raise ValueError(f"{name} must be kind:group@step, kind one of {kinds}; not {text!r}")
        kind, group, step = found[1], int(found[2]), int(found[3])
        if group >= num_groups:
            raise ValueError(f"{name}: the model has {num_groups} layer groups, none is {group}")
        if kind == "byte" and not full:
            raise ValueError(f"{name}: marks can't see a changed byte; it takes --kv-canary full")
        return cls(kind, group, step)

    def apply(self, canary: KVCanary, reads: Sequence[tuple[BlockTable, int]]) -> bool:
        """Damage what the first table that can bear it reads; False, nothing done: none can.

        `reads`: tables of this group, each with the number of tokens that will be read.
        """
        index = canary.indexes[self.group]
        return any(self._damage(canary, index, table, count) for table, count in reads)

    def _damage(self, canary: KVCanary, index: PageIndex, table: BlockTable, count: int) -> bool:
        num_read = num_pages_for(count, table.page_size) - table.first_page
        pages = table.page_ids[: max(0, num_read)]
        if self.kind == "table":
            return _exchange(table, len(pages))
        if self.kind == "free":
            pages = pages[index.state[pages] == PageState.USED]
        if len(pages) == 0:
            return False
        page = int(pages[len(pages) // 2])
        if self.kind == "mark":
            canary.marks[self.group][page, 0] ^= np.uint64(2)
        elif self.kind == "free":
            index.drop_row(np.array([page], np.int32))
        else:
            canary.flip_byte(self.group, page)
        return True


def _exchange(table: BlockTable, num_read: int) -> bool:
    if num_read < 2:
        return False
    pages: npt.NDArray[np.int32] = table.page_ids.copy()
    pages[[0, num_read - 1]] = pages[[num_read - 1, 0]]
    table.replace_pages(pages)
    return True
