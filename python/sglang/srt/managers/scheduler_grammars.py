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
from sglang.srt.sampling.sampling_params import Constraint, ReasoningFirst

# A request whose grammar is not there after so long is given up. The library's own bounds end a
# compilation earlier, as far as is known; others may have to be waited for.
COMPILE_LIMIT_S = 30.0
MAX_KEPT = 64
# Of their texts: a grammar of 100,000 characters took up to 30 MB.
MAX_KEPT_CHARS = 1 << 20


@dataclass(slots=True)
class _Compilation:
    """One under way, or done and not yet taken, and how many requests wait for it."""

    future: Future[Grammar]
    num_waiting: int = 0


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
    `MAX_KEPT` grammars that were used last are kept, fewer where their texts are long. What is
    kept, and for whom, follows from the messages and verdicts alone.
    """

    def __init__(self, compiler: GrammarCompiler | None, limit_s: float = COMPILE_LIMIT_S) -> None:
        self._compiler = compiler
        self._limit_s = limit_s
        self._kept: OrderedDict[Constraint, Grammar] = OrderedDict()
        self._kept_chars = 0
        self._compiling: dict[Constraint, _Compilation] = {}
        self._waiting: dict[str, _Waiting] = {}  # by rid, in order of arrival

    def __len__(self) -> int:
        return len(self._waiting)

    def set_vocabulary(self, message: VocabularyReq) -> None:
        """Take what the text side says of the vocabulary; only the first counts."""
        if self._compiler is not None:
            self._compiler.set_vocabulary(message)

    def add(self, req: Req, now: float) -> bool:
        """Take a request that has arrived; True: it need not wait (and is not held here)."""
        constraint = req.params.held_to
        if constraint is None:
            return True
        kept = self._kept.get(constraint)
        if kept is not None:
            self._kept.move_to_end(constraint)
            req.grammar = kept
            return True
        compilation = self._compilation(constraint, req.params.reasoning)
        compilation.num_waiting += 1
        deadline = now + self._limit_s
        self._waiting[req.rid] = _Waiting(req, constraint, compilation.future, deadline)
        return False

    def discard(self, req: Req) -> bool:
        """Hold a request no longer that ends; False: it was not held."""
        return self._let_go(req.rid) is not None

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
        entry = self._let_go(rid)
        if entry is None:
            return None
        entry.req.grammar = entry.future.result()
        self._keep(entry.constraint, entry.req.grammar)
        return entry.req

    def _keep(self, constraint: Constraint, grammar: Grammar) -> None:
        """Keep a grammar as the one used last, and let go of those that were used longest ago."""
        if constraint not in self._kept:
            self._kept_chars += len(constraint.text)
        self._kept[constraint] = grammar
        self._kept.move_to_end(constraint)
        while len(self._kept) > MAX_KEPT or self._kept_chars > MAX_KEPT_CHARS:
            dropped, _ = self._kept.popitem(last=False)
            self._kept_chars -= len(dropped.text)

    def _let_go(self, rid: str) -> _Waiting | None:
        """Forget a request that waits, and a compilation that nobody waits for any more.

        One that has begun can't be stopped: it stays, for whoever comes while it goes on.
        """
        entry = self._waiting.pop(rid, None)
        if entry is None:
            return None
        compilation = self._compiling[entry.constraint]
        compilation.num_waiting -= 1
        if compilation.num_waiting == 0 and (entry.future.done() or entry.future.cancel()):
            del self._compiling[entry.constraint]
        return entry

    def _compilation(
        self, constraint: Constraint, reasoning: ReasoningFirst | None
    ) -> _Compilation:
        """The one under way or not yet taken for a constraint, or a new one."""
        found = self._compiling.get(constraint)
        if found is not None and (found.num_waiting or not found.future.done()):
            return found
        for known, one in list(self._compiling.items()):
            if one.num_waiting == 0 and one.future.done():
                del self._compiling[known]
        if self._compiler is None:
            failed: Future[Grammar] = Future()
            failed.set_exception(RequestError("Constraints are not served here."))
            started = _Compilation(failed)
        else:
            started = _Compilation(self._compiler.start(constraint, reasoning))
        self._compiling[constraint] = started
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
