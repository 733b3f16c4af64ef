"""The scheduler's part of the KV canary: which tokens a batch reads, and which it will write.

Made only under `--kv-canary`. Called right before a batch is built, with no forward in flight,
and by the audit. See docs/kv_segments.md, Note [Canary].
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import numpy as np

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.canary import (
    ChainPoint,
    KVCanary,
    UInt64Array,
    chain_marks,
    chain_start,
)
from sglang.srt.mem_cache.canary_perturb import Perturbation

logger = logging.getLogger(__name__)


class _RequestMarks:
    """The marks of a request's tokens so far; extended by what is new."""

    def __init__(self, extra_key: str | None) -> None:
        self._end: ChainPoint = chain_start(extra_key)
        self._marks: UInt64Array = np.empty(0, np.uint64)

    def upto(self, req: Req, count: int) -> UInt64Array:
        """Marks of the first `count` tokens."""
        if count > self._end.position:
            new, self._end = chain_marks(self._end, req.tokens.view(self._end.position, count))
            self._marks = np.concatenate([self._marks, new])
        return self._marks[:count]

    def of_draft(self, draft: Sequence[int]) -> UInt64Array:
        """Marks of tokens that may come behind those so far."""
        return chain_marks(self._end, np.array(draft, np.int32))[0]


class SchedulerCanary:
    """Checks what every forward reads, marks what it writes.

    `perturbation` is damage to be done once, in order to see it found; None: none.
    """

    def __init__(self, canary: KVCanary, perturbation: Perturbation | None = None) -> None:
        self._canary = canary
        self._perturbation = perturbation
        self._marks: WeakKeyDictionary[Req, _RequestMarks] = WeakKeyDictionary()

    def before_forward(self, batch: ScheduleBatch) -> None:
        """All that the batch will read was written by the same tokens; raises InvariantError."""
        self._canary.seal()
        self._perturb(batch)
        for item in batch.items:
            read = self._marks_of(item.req).upto(item.req, item.start)
            self._canary.check_tables(repr(item.req), item.lease.tables, read)
        for item in batch.items:
            known = item.start + item.num_tokens - len(item.draft)
            marks = self._marks_of(item.req)
            written = marks.upto(item.req, known)[item.start :]
            if item.draft:
                written = np.concatenate([written, marks.of_draft(item.draft)])
            self._canary.write(item.lease.tables, item.start, written)

    def audit(self, requests: Sequence[Req]) -> None:
        """Everything that running requests have computed is theirs; raises InvariantError.

        The prefix tree is part of the memory's own audit.
        """
        self._canary.seal()
        for req in requests:
            if req.kv is not None:
                marks = self._marks_of(req).upto(req, min(req.num_scheduled, req.known))
                self._canary.check_tables(repr(req), req.kv.tables, marks)

    def _perturb(self, batch: ScheduleBatch) -> None:
        wanted = self._perturbation
        if wanted is None or batch.step < wanted.step:
            return
        reads = [(item.lease.tables[wanted.group], item.start) for item in batch.items]
        if wanted.apply(self._canary, reads):
            logger.warning("KV canary: step %d was damaged on purpose: %r", batch.step, wanted)
            self._perturbation = None

    def _marks_of(self, req: Req) -> _RequestMarks:
        marks = self._marks.get(req)
        if marks is None:
            marks = self._marks[req] = _RequestMarks(req.extra_key)
        return marks
