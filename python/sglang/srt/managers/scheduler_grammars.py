"""Requests that wait for their grammar: compiled aside, kept for those that want the same.

Which request goes on, and when, is told by rank 0 (`GrammarVerdict` in a turn's inputs), so that
all ranks agree although their threads do not; every rank compiles for itself, since every rank
samples. Called by the scheduler alone.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

from sglang.srt.constrained.compiler import GrammarCompiler
from sglang.srt.constrained.grammar import Grammar
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import VocabularyReq
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_limits import GrammarVerdict
from sglang.srt.sampling.sampling_params import Constraint

# A request whose grammar is not there after so long is given up. The library's own bounds end a
# compilation earlier, as far as is known; others may have to be waited for.
COMPILE_LIMIT_S = 30.0
MAX_KEPT = 64


@dataclass(slots=True)
class _Waiting:
    """A request, what it waits for, and whether its verdict is on its way."""

    req: Req
    constraint: Constraint
    future: Future[Grammar]
    deadline: float
    is_told: bool = False


class GrammarQueue:
    """Holds requests from their arrival until their grammar is compiled.

    `compiler` None: constraints are not served, and whoever has one is given up at once. The
    `MAX_KEPT` grammars that were used last are kept. What is kept, and for whom, follows from the
    messages and verdicts alone.
    """

    def __init__(self, compiler: GrammarCompiler | None, limit_s: float = COMPILE_LIMIT_S) -> None:
        self._compiler = compiler
        self._limit_s = limit_s
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._compiling: dict[Constraint, Future[Grammar]] = {}
        self._waiting: dict[str, _Waiting] = {}  # by rid, in order of arrival

    def __len__(self) -> int:
        return len(self._waiting)

    def set_vocabulary(self, message: VocabularyReq) -> None:
        """Take what the text side says of the vocabulary; only the first counts."""
        if self._compiler is not None:
            self._compiler.set_vocabulary(message)

    def add(self, req: Req, now: float) -> bool:
        """Take a request that has arrived; True: it need not wait (and is not held here)."""
        constraint = req.params.constraint
        if constraint is None:
            return True
        kept = self._kept.get(constraint)
        if kept is not None:
            self._kept.move_to_end(constraint)
            req.grammar = kept
            return True
        future = self._compilation(constraint)
        self._waiting[req.rid] = _Waiting(req, constraint, future, now + self._limit_s)
        return False

    def discard(self, req: Req) -> bool:
        """Hold a request no longer that ends; False: it was not held."""
        return self._waiting.pop(req.rid, None) is not None

    def decided(self, now: float) -> list[GrammarVerdict]:
        """What has become of requests since the last call, in order of arrival; each once.

        Asked on rank 0; `take` acts on it on every rank.
        """
        verdicts: list[GrammarVerdict] = []
        for rid, entry in self._waiting.items():
            if entry.is_told or not (entry.future.done() or now >= entry.deadline):
                continue
            entry.is_told = True
            verdicts.append(self._verdict(rid, entry))
        return verdicts

    def take(self, rid: str) -> Req | None:
        """A request whose grammar is there by rank 0's word; None: it has ended meanwhile.

        Waits where this rank is slower.
        """
        entry = self._waiting.pop(rid, None)
        if entry is None:
            return None
        entry.req.grammar = self._kept[entry.constraint] = entry.future.result()
        self._kept.move_to_end(entry.constraint)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return entry.req

    def _compilation(self, constraint: Constraint) -> Future[Grammar]:
        """The one under way or not yet taken for a constraint, or a new one."""
        wanted = {entry.future for entry in self._waiting.values()}
        for known, future in list(self._compiling.items()):
            if future.done() and future not in wanted:
                del self._compiling[known]
        found = self._compiling.get(constraint)
        if found is not None:
            return found
        if self._compiler is None:
            failed: Future[Grammar] = Future()
            failed.set_exception(RequestError("Constraints are not served here."))
            return failed
        started = self._compiling[constraint] = self._compiler.start(constraint)
        return started

    def _verdict(self, rid: str, entry: _Waiting) -> GrammarVerdict:
        if not entry.future.done():
            text = f"{entry.constraint.kind} was not compiled within {self._limit_s:g} s."
            return GrammarVerdict(rid, text, 400)
        error = entry.future.exception()
        if error is None:
            return GrammarVerdict(rid)
        if isinstance(error, RequestError):
            return GrammarVerdict(rid, error.message, error.http_status)
        raise error
