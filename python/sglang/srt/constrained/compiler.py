"""Compiles constraints on threads of its own, so that a step never waits for a schema.

The scheduler's `GrammarQueue` starts a compilation and asks for it later; nobody else does.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from sglang.srt.constrained.grammar import Grammar, JsonStyle, Vocabulary, compile_grammar
from sglang.srt.errors import RequestError
from sglang.srt.managers.io_struct import VocabularyReq
from sglang.srt.sampling.sampling_params import Constraint

NUM_THREADS = 2

Compile = Callable[[Constraint, Vocabulary, JsonStyle], Grammar]


class GrammarCompiler:
    """Turns constraints into grammars of one model's vocabulary, at most `NUM_THREADS` at a time.

    `vocab_size` is the model's. The threads start with the first vocabulary.
    """

    def __init__(
        self, vocab_size: int, style: JsonStyle, compile_one: Compile = compile_grammar
    ) -> None:
        self._vocab_size = vocab_size
        self._style = style
        self._compile_one = compile_one
        self._pool: ThreadPoolExecutor | None = None
        self._vocabulary: Future[Vocabulary] | None = None

    def set_vocabulary(self, message: VocabularyReq) -> None:
        """Begin to make the vocabulary that later constraints are compiled over."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
            self._vocabulary = self._pool.submit(Vocabulary, message, self._vocab_size)

    def start(self, constraint: Constraint) -> Future[Grammar]:
        """Begin to compile; the future raises RequestError when that can't be."""
        if self._pool is None:
            failed: Future[Grammar] = Future()
            failed.set_exception(RequestError("Constraints are not served: no vocabulary came."))
            return failed
        return self._pool.submit(self._compile, constraint)

    def close(self) -> None:
        """Begin no further compilation; those under way are not waited for."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, constraint: Constraint) -> Grammar:
        assert self._vocabulary is not None  # it was submitted before
        return self._compile_one(constraint, self._vocabulary.result(), self._style)
