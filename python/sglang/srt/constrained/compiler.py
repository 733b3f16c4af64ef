"""Compiles constraints on threads of its own, so that a step never waits for a schema.

The scheduler's `GrammarQueue` starts a compilation and asks for it later; nobody else does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from sglang.srt.constrained.grammar import Grammar, JsonStyle, Vocabulary, compile_grammar
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import VocabularyReq
from sglang.srt.sampling.sampling_params import Constraint, ReasoningFirst

# The library follows references by recursion: a schema of 20 KB overflowed a stack of 8 MiB, which
# ends the process. The deepest of those that `MAX_CONSTRAINT_CHARS` lets through needed between 32
# and 64 MiB. Only what is touched takes memory.
STACK_BYTES = 256 << 20
# Longer constraints have a thread of their own: they may take many seconds, and others do not wait.
LONG_CONSTRAINT_CHARS = 1 << 13
NUM_THREADS = 2  # for those that are not long

Compile = Callable[[Constraint, Vocabulary, JsonStyle], Grammar]


class GrammarCompiler:
    """Turns constraints into grammars of one model's vocabulary, on threads with large stacks.

    At most `NUM_THREADS` short constraints and one long one at a time, each kind in order.
    `vocab_size` is the model's. The threads start with the first vocabulary.
    """

    def __init__(
        self, vocab_size: int, style: JsonStyle, compile_one: Compile = compile_grammar
    ) -> None:
        self._vocab_size = vocab_size
        self._style = style
        self._compile_one = compile_one
        self._short: ThreadPoolExecutor | None = None
        self._long: ThreadPoolExecutor | None = None
        self._vocabulary: Future[Vocabulary] | None = None

    def set_vocabulary(self, message: VocabularyReq) -> None:
        """Begin to make the vocabulary that later constraints are compiled over."""
        if self._short is None:
            self._short = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
            self._long = ThreadPoolExecutor(1, thread_name_prefix="grammar-long")
            with _large_stacks():
                self._vocabulary = self._short.submit(Vocabulary, message, self._vocab_size)

    def start(
        self, constraint: Constraint, reasoning: ReasoningFirst | None = None
    ) -> Future[Grammar]:
        """Begin to compile; the future raises RequestError when that can't be.

        What is needed of the vocabulary for `reasoning` is looked up as well, so that no step has
        to.
        """
        pool = self._long if len(constraint.text) > LONG_CONSTRAINT_CHARS else self._short
        if pool is None:
            failed: Future[Grammar] = Future()
            failed.set_exception(RequestError("Constraints are not served: no vocabulary came."))
            return failed
        with _large_stacks():
            return pool.submit(self._compile, constraint, reasoning)

    def close(self) -> None:
        """Begin no further compilation; those under way are not waited for."""
        for pool in (self._short, self._long):
            if pool is not None:
                pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, constraint: Constraint, reasoning: ReasoningFirst | None) -> Grammar:
        assert self._vocabulary is not None  # it was submitted before
        vocabulary = self._vocabulary.result()
        for marker in () if reasoning is None else (reasoning.begin, reasoning.end):
            vocabulary.look_up(marker.encode())
        return self._compile_one(constraint, vocabulary, self._style)


@contextmanager
def _large_stacks() -> Iterator[None]:
    """Threads that a pool starts meanwhile have `STACK_BYTES`; others may too, without harm.

    Afterwards the system's own size holds. What was set before is not asked for: of two threads
    that are here at once, the second would restore what the first had set.
    """
    threading.stack_size(STACK_BYTES)
    try:
        yield
    finally:
        threading.stack_size(0)
