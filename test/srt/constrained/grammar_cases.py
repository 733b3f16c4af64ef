"""Vocabularies of both families for tests of grammars, and texts written token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sglang.srt.constrained.grammar import (
    Grammar,
    JsonStyle,
    TokenMatcher,
    Vocabulary,
    compile_grammar,
)
from sglang.srt.managers.io_struct import VocabularyReq
from sglang.srt.sampling.sampling_params import Constraint
from sglang.srt.tokenizer.loader import load_tokenizer
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.tokenizer.vocabularies import write_gguf

END = 2


def golden_tokenizer(folder: Path, family: str) -> Tokenizer:
    """The small vocabulary "bpe" or "spm"; END ends a text."""
    return load_tokenizer(str(write_gguf(folder / f"{family}.gguf", family)))


def vocabulary_message(tokenizer: Tokenizer, end_ids: tuple[int, ...] = (END,)) -> VocabularyReq:
    found = tokenizer.library_json()
    assert found is not None
    return VocabularyReq(*found, end_ids)


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int | None = None) -> Vocabulary:
    return Vocabulary(vocabulary_message(tokenizer), vocab_size or tokenizer.vocab_size)


def compiled(
    vocabulary: Vocabulary, kind: str, text: str, style: JsonStyle | None = None
) -> Grammar:
    return compile_grammar(Constraint(kind, text), vocabulary, style or JsonStyle())


def allowed(matcher: TokenMatcher, stops: tuple[int, ...] | None = None) -> set[int]:
    """Ids that may follow."""
    hidden = matcher.hidden(stops)
    assert hidden is not None
    return set(np.flatnonzero(hidden == 0).tolist())


def can_write(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether `text` as whole and nothing else can be generated, byte by byte or faster."""
    matcher = grammar.matcher()
    rest = text.encode()
    pieces = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    while rest:
        may = allowed(matcher)
        fitting = [i for i in may if pieces[i] and rest.startswith(pieces[i]) and i != END]
        if not fitting:
            return False
        best = max(fitting, key=lambda i: len(pieces[i]))
        matcher.accept(best)
        assert matcher.error is None
        rest = rest[len(pieces[best]) :]
    return END in allowed(matcher)
