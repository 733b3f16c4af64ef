"""Reasoning before a text that is held to a grammar: where it ends, and what may be said in it."""

from __future__ import annotations

import numpy as np
import pytest

from sglang.srt.constrained.grammar import Grammar, TokenMatcher, Vocabulary
from sglang.srt.constrained.reasoning_matcher import start_matcher
from sglang.srt.sampling.sampling_params import FREE_TEXT, ReasoningFirst
from sglang.srt.tokenizer.tokenizer import Tokenizer
from srt.constrained.grammar_cases import END, allowed, compiled, golden_tokenizer, vocabulary_of

INSIDE = ReasoningFirst("<think>", "</think>", True)
OPEN = ReasoningFirst("<think>", "</think>", False)


@pytest.fixture(scope="module", params=["bpe", "spm"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return golden_tokenizer(tmp_path_factory.mktemp("vocabulary"), request.param)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return vocabulary_of(tokenizer)


@pytest.fixture(scope="module")
def grammar(vocabulary: Vocabulary) -> Grammar:
    return compiled(vocabulary, "regex", "[0-9]{2}|<a>")


def say(matcher: TokenMatcher, tokenizer: Tokenizer, text: str) -> list[int]:
    """Say `text` with tokens of one character; each must be allowed."""
    said = []
    for char in text:
        hidden = matcher.hidden()
        assert hidden is not None
        wanted = char.encode()
        ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == wanted]
        said.append(next(i for i in ids if not hidden[i]))
        matcher.accept(said[-1])
        assert matcher.error is None
    return said


def spellings(tokenizer: Tokenizer, ids: set[int]) -> set[bytes]:
    return {tokenizer.token_bytes(i) for i in ids}


def everything(vocabulary: Vocabulary) -> set[int]:
    return set(range(vocabulary.vocab_size))


def test_reasoning_is_free_but_for_the_end(
    tokenizer: Tokenizer, vocabulary: Vocabulary, grammar: Grammar
) -> None:
    matcher = start_matcher(grammar, INSIDE)
    assert everything(vocabulary) - allowed(matcher) == {END}
    say(matcher, tokenizer, "Why < 3? </thin")
    hidden = everything(vocabulary) - allowed(matcher)
    assert all(b"k>" in spelling for spelling in spellings(tokenizer, hidden - {END}))
    say(matcher, tokenizer, "k")
    for spelling in spellings(tokenizer, everything(vocabulary) - allowed(matcher) - {END}):
        assert spelling.startswith(b">")
        assert len(spelling) > 1
    say(matcher, tokenizer, ">")
    assert allowed(matcher) == allowed(grammar.matcher())


@pytest.mark.parametrize("thought", ["", "x", "</</", "<think>"])
def test_the_grammar_begins_behind_the_marker(
    tokenizer: Tokenizer, grammar: Grammar, thought: str
) -> None:
    matcher = start_matcher(grammar, INSIDE)
    said = say(matcher, tokenizer, f"{thought}</think>4")
    held = grammar.matcher()
    say(held, tokenizer, "4")
    assert allowed(matcher) == allowed(held)
    again = start_matcher(grammar, INSIDE)  # as after a retraction
    again.replay(said)
    assert allowed(again) == allowed(held)
    say(matcher, tokenizer, "2")
    assert allowed(matcher) == {END}
    matcher.accept(END)
    assert matcher.hidden() is None
    assert matcher.error is None


def test_a_text_may_begin_with_reasoning(tokenizer: Tokenizer, grammar: Grammar) -> None:
    matcher = start_matcher(grammar, OPEN)
    both = allowed(matcher)
    assert allowed(grammar.matcher()) <= both
    assert {b"<", b"1"} <= spellings(tokenizer, both)
    assert b"x" not in spellings(tokenizer, both)
    say(matcher, tokenizer, "<think>free")
    assert END not in allowed(matcher)
    say(matcher, tokenizer, "</think>")
    assert allowed(matcher) == allowed(grammar.matcher())


@pytest.mark.parametrize("text", ["12", "<a>"])
def test_a_text_may_begin_without_reasoning(
    tokenizer: Tokenizer, grammar: Grammar, text: str
) -> None:
    """Also where the grammar's text begins as the marker does."""
    matcher = start_matcher(grammar, OPEN)
    say(matcher, tokenizer, text)
    assert allowed(matcher) == {END}


def test_a_beginning_that_only_the_marker_has_is_gone_on_with(
    tokenizer: Tokenizer, vocabulary: Vocabulary
) -> None:
    matcher = start_matcher(compiled(vocabulary, "regex", "[0-9]+"), OPEN)
    say(matcher, tokenizer, "<t")
    assert all(b"hink>".startswith(one) for one in spellings(tokenizer, allowed(matcher)))
    say(matcher, tokenizer, "hink></think>7")
    assert END in allowed(matcher)


def test_stop_tokens_are_hidden_in_reasoning_when_asked(
    tokenizer: Tokenizer, vocabulary: Vocabulary, grammar: Grammar
) -> None:
    matcher = start_matcher(grammar, INSIDE)
    assert everything(vocabulary) - allowed(matcher, stops=(300,)) == {END, 300}
    assert 300 in allowed(matcher)


def test_a_token_that_says_more_than_the_marker_is_hidden(tokenizer: Tokenizer) -> None:
    """And one of a model with more or fewer ids than its tokenizer is no trouble."""
    for vocab_size in (tokenizer.vocab_size + 77, tokenizer.vocab_size - 5):
        vocabulary = vocabulary_of(tokenizer, vocab_size)
        # The marker is the first half of a token that exists.
        whole = next(
            i
            for i in range(vocab_size - 100, 0, -1)
            if len(tokenizer.token_bytes(i)) == 4 and tokenizer.token_bytes(i).isalpha()
        )
        marker = tokenizer.token_bytes(whole)[:2].decode()
        matcher = start_matcher(
            compiled(vocabulary, "regex", "[0-9]+"), ReasoningFirst("<", marker, True)
        )
        hidden = matcher.hidden()
        assert hidden is not None
        assert len(hidden) == vocab_size
        assert hidden[whole]
        spelled = [tokenizer.token_bytes(int(i)) for i in np.flatnonzero(hidden) if i != END]
        assert all(marker.encode() in one[:-1] for one in spelled)


def test_without_reasoning_it_is_the_grammars_own(grammar: Grammar) -> None:
    assert type(start_matcher(grammar, None)) is TokenMatcher


# ---- budgets of reasoning


@pytest.fixture(scope="module")
def free(vocabulary: Vocabulary) -> Grammar:
    return compiled(vocabulary, FREE_TEXT.kind, FREE_TEXT.text)


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of one-character tokens that say `text`."""
    found = []
    for char in text:
        ids = range(tokenizer.vocab_size)
        found.append(next(i for i in ids if tokenizer.token_bytes(i) == char.encode()))
    return found


def forced_text(matcher: TokenMatcher, tokenizer: Tokenizer) -> str:
    """What is said while hardly anything may follow, by whichever token is allowed first."""
    said = b""
    while True:
        hidden = matcher.hidden()
        if hidden is None or hidden.sum() < len(hidden) - 8:
            return said.decode()
        token = int(np.flatnonzero(hidden == 0)[0])
        said += tokenizer.token_bytes(token)
        matcher.accept(token)
        assert matcher.error is None


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_the_end_is_forced_behind_exactly_so_many_tokens(
    tokenizer: Tokenizer, free: Grammar, budget: int
) -> None:
    matcher = start_matcher(free, INSIDE, budget)
    said = letters(tokenizer, "abcde"[:budget])
    for token in said:
        assert matcher.hidden() is None
        matcher.accept(token)
    again = start_matcher(free, INSIDE, budget)  # as after a retraction
    again.replay(said)
    assert allowed(again) == allowed(matcher)
    assert forced_text(matcher, tokenizer) == "</think>"
    for token in letters(tokenizer, "</think>abc"):
        assert matcher.hidden() is None  # it is over for good
        matcher.accept(token)


def test_the_end_is_forced_with_the_fewest_tokens(tokenizer: Tokenizer, free: Grammar) -> None:
    pieces = {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    marker = b"</think>"
    longest = max((marker[:n] for n in range(1, 9) if marker[:n] in pieces), key=len)
    matcher = start_matcher(free, INSIDE, 0)
    assert spellings(tokenizer, allowed(matcher)) == {longest}


def test_an_end_that_was_begun_is_gone_on_with(tokenizer: Tokenizer, free: Grammar) -> None:
    matcher = start_matcher(free, INSIDE, 4)
    matcher.replay(letters(tokenizer, "a</t"))
    assert forced_text(matcher, tokenizer) == "hink>"
    matcher = start_matcher(free, INSIDE, 4)
    matcher.replay(letters(tokenizer, "</tx"))
    assert forced_text(matcher, tokenizer) == "</think>"


def test_reasoning_that_ends_in_time_is_not_touched(tokenizer: Tokenizer, free: Grammar) -> None:
    matcher = start_matcher(free, INSIDE, 30)
    for token in letters(tokenizer, "abc</think>" + 40 * "d"):
        assert matcher.hidden() is None
        matcher.accept(token)


def test_a_text_that_may_begin_with_reasoning_is_bounded_where_it_does(
    tokenizer: Tokenizer, free: Grammar
) -> None:
    for before in ("", " \n"):
        matcher = start_matcher(free, OPEN, 2)
        for token in letters(tokenizer, f"{before}<think>ab"):
            assert matcher.hidden() is None
            matcher.accept(token)
        assert forced_text(matcher, tokenizer) == "</think>"
    matcher = start_matcher(free, OPEN, 2)
    for token in letters(tokenizer, "a<think>abcdef"):
        assert matcher.hidden() is None
        matcher.accept(token)


def test_a_grammar_begins_behind_the_forced_end(tokenizer: Tokenizer, grammar: Grammar) -> None:
    matcher = start_matcher(grammar, INSIDE, 2)
    matcher.replay(letters(tokenizer, "a"))
    assert END not in allowed(matcher)
    matcher.replay(letters(tokenizer, "b"))
    assert forced_text(matcher, tokenizer).startswith("</think>")
    assert matcher.error is None
    held = start_matcher(grammar, INSIDE, 2)
    held.replay(letters(tokenizer, "ab</think>"))
    assert allowed(held) == allowed(grammar.matcher())


def test_stop_tokens_are_hidden_before_free_text_when_asked(
    tokenizer: Tokenizer, vocabulary: Vocabulary, free: Grammar
) -> None:
    matcher = start_matcher(free, INSIDE, 1)
    for text in ("", "a</think>", "b"):
        matcher.replay(letters(tokenizer, text))
        assert everything(vocabulary) - allowed(matcher, stops=(300,)) == {END, 300}
    assert free.end_ids == frozenset()  # a text goes on behind an end that is ignored
